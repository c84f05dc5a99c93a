"""Checkpoints: atomic save, resume at any number of ranks, prune.

A checkpoint is a folder `checkpoints/step-00001000/`: `model.safetensors` and `config.yaml` (all that embedding needs),
`optimizer.safetensors`, `plan.safetensors` and `state.json`; `loss.safetensors` where the loss learns or remembers
something; with mining.mode=table also each rank's part of the table, `mining_table-00000.safetensors` and so on; and
`SHA256SUMS`, which proves that it is whole.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save as array_bytes
from safetensors.torch import load_file as load_tensors
from torch import Tensor

from facetrain.checkpoint.folder import aside_of, checkpoint_folder, flush_and_sum, prune, publish
from facetrain.checkpoint.weights import read_tensors, save_tensors, save_weights
from facetrain.config import Config
from facetrain.engine import Engine
from facetrain.losses.loss import Loss
from facetrain.world import World

log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """What resume needs besides weights and optimizer: everything else is a function of (config, step)."""

    step: int
    """The next optimizer step, from 0."""
    draws: npt.NDArray[np.int64]
    """Times that each trained identity was in a batch."""
    mined: dict[int, npt.NDArray[np.int64]] = field(default_factory=dict)
    """Mined batches that are still to come: step -> identities [N]."""
    best_value: float = -1.0
    """Highest value of `eval.best_metric` so far."""
    best_step: int = -1
    """The step that has it; -1 before the first evaluation."""
    shards_sha256: str = ""
    """Content of the shards that the run trains on."""


def save_checkpoint(
    run_dir: Path,
    engine: Engine,
    state: TrainState,
    config: Config,
    world: World,
    *,
    table_rows: Mapping[str, Tensor] | None = None,
    loss_state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write the checkpoint of `state.step`; every rank must call it.

    Args:
        run_dir: The run folder; with table rows, one that all ranks see.
        engine: Holds weights and optimizer.
        state: What else is saved.
        config: Stored beside the weights.
        world: The ranks.
        table_rows: This rank's part of the mining table: consecutive rows of each tensor, and in `first_row` the number
            of the first. None or empty is no table.
        loss_state: What `Loss.state` returned; None or empty where the loss holds nothing.

    Raises:
        OSError: A rank can't write, as on a full disk; on every rank. Nothing is left of it, and nothing is pruned.
    """
    weights, optimizer_state = engine.weights(), engine.optimizer_state()  # over all ranks
    return write_checkpoint(
        run_dir, weights, optimizer_state, state, config, world, table_rows=table_rows, loss_state=loss_state
    )


def write_checkpoint(
    run_dir: Path,
    weights: dict[str, Tensor],
    optimizer_state: dict[str, Tensor],
    state: TrainState,
    config: Config,
    world: World,
    *,
    table_rows: Mapping[str, Tensor] | None = None,
    loss_state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a checkpoint from what the engine gave; every rank must call it. More in `save_checkpoint`."""
    finish = begin_checkpoint(
        *(run_dir, weights, optimizer_state, state, config, world), table_rows=table_rows, loss_state=loss_state
    )
    world.on_main(finish)
    return checkpoint_folder(run_dir, state.step)


def begin_checkpoint(
    run_dir: Path,
    weights: dict[str, Tensor],
    optimizer_state: dict[str, Tensor],
    state: TrainState,
    config: Config,
    world: World,
    *,
    table_rows: Mapping[str, Tensor] | None = None,
    loss_state: Mapping[str, Tensor] | None = None,
) -> Callable[[], None]:
    """Begin a checkpoint on all ranks; what is returned does the rest on rank 0, also in a thread beside the training.

    Rank 0 writes aside, flushes to disk, adds checksums and renames; only then it removes checkpoints that are neither
    among the newest `train.keep_checkpoints` nor the best. Arguments and errors, of both parts: `save_checkpoint`.
    """
    final = checkpoint_folder(run_dir, state.step)
    aside = aside_of(final)
    sums: dict[str, str] = {}

    def begin() -> bool:
        if final.exists():
            return False
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        return True

    def write_table_rows() -> tuple[str, str]:
        file = aside / f"mining_table-{world.rank:05d}.safetensors"
        save_tensors(dict(table_rows or {}), file)
        return file.name, flush_and_sum(file)

    def finish() -> None:
        with _nothing_left_of(aside):
            save_weights(weights, config, aside)
            save_tensors(optimizer_state, aside / "optimizer.safetensors")
            if loss_state:
                save_tensors(dict(loss_state), aside / "loss.safetensors")
            arrays = {"draws": state.draws} | {f"mined/{step}": ids for step, ids in state.mined.items()}
            (aside / "plan.safetensors").write_bytes(array_bytes(arrays))
            scalars = {key: value for key, value in vars(state).items() if key not in ("draws", "mined")}
            (aside / "state.json").write_text(json.dumps(scalars), encoding="utf-8")
            publish(aside, final, sums)
            _prune(run_dir, config, state)

    with _nothing_left_of(aside if world.is_main else None):
        is_new = world.on_main(begin)
        if is_new and table_rows:
            sums.update(world.on_all(write_table_rows))
    return finish if is_new else lambda: None


def _prune(run_dir: Path, config: Config, state: TrainState) -> None:
    try:
        prune(run_dir, keep=config.train.keep_checkpoints, best_step=state.best_step)
    except OSError as error:  # somebody reads an old one over NFS, say; the new one is there all the same
        log.warning(f"{run_dir}: old checkpoints can't be removed ({error})")


@contextmanager
def _nothing_left_of(aside: Path | None) -> Iterator[None]:
    """Remove what was written aside where writing fails: a full disk needs the room."""
    try:
        yield
    except OSError:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def load_state(folder: Path) -> TrainState:
    """Read the training state of a checkpoint.

    Raises:
        ValueError: A file of it is missing or damaged; the message names it.
    """
    arrays = read_tensors(load_arrays, folder / "plan.safetensors")
    try:
        scalars = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        mined = {int(key.removeprefix("mined/")): ids for key, ids in arrays.items() if key.startswith("mined/")}
        return TrainState(draws=arrays["draws"], mined=mined, **scalars)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: not a whole checkpoint ({error})") from None


def load_table_rows(folder: Path, rows: range) -> dict[str, Tensor]:
    """Read consecutive rows of a checkpoint's mining table, whichever ranks wrote them.

    Returns:
        Each tensor's rows, as they were saved.

    Raises:
        ValueError: Rows are missing, or a file is damaged; the message names it.
    """
    parts: dict[str, list[Tensor]] = {}
    missing = len(rows)
    for file in sorted(folder.glob("mining_table-*.safetensors")):  # by rank, which is by row
        try:
            with safe_open(file, framework="pt") as tensors:
                first = int(tensors.get_tensor("first_row"))
                names = [name for name in tensors.keys() if name != "first_row"]  # noqa: SIM118 - not a dict
                held = range(first, first + tensors.get_slice(names[0]).get_shape()[0])
                start, stop = max(rows.start, held.start), min(rows.stop, held.stop)
                for name in names if start <= stop else ():
                    parts.setdefault(name, []).append(tensors.get_slice(name)[start - first : stop - first])
        except (SafetensorError, IndexError) as error:
            raise ValueError(f"{file}: damaged ({error})") from None
        missing -= max(0, stop - start)
    if missing:
        raise ValueError(
            f"{folder}: not a whole checkpoint ({missing} of {len(rows)} rows of the mining table are gone)"
        )
    return {name: torch.cat(pieces) for name, pieces in parts.items()}


def load_loss(folder: Path, loss: Loss) -> None:
    """Put what the loss held at a checkpoint into it.

    Raises:
        ValueError: The file is missing, damaged, or of another loss.
    """
    file = folder / "loss.safetensors"
    try:
        loss.load_state(read_tensors(load_tensors, file) if file.exists() else {})
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def load_optimizer(folder: Path, engine: Engine) -> None:
    """Put the optimizer's state of a checkpoint into the engine.

    Raises:
        ValueError: The file is missing, damaged, or of another optimizer.
    """
    file = folder / "optimizer.safetensors"
    try:
        engine.load_optimizer_state(read_tensors(load_tensors, file))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
