"""Checkpoints: atomic save, resume at any number of ranks, prune; and weights alone, for whoever wants to embed.

A checkpoint is a folder `checkpoints/step-00001000/`: `model.safetensors` and `config.yaml` (all that embedding needs),
`optimizer.safetensors`, `plan.safetensors` and `state.json`; with mining.mode=table also each rank's part of the table,
`mining_table-00000.safetensors` and so on. It appears by a rename, so that what is there is whole.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors
from torch import Tensor, nn

from facetrain.command_line import config_yaml, load_config
from facetrain.config import Config
from facetrain.engine import Engine
from facetrain.models import Backbone, build_backbone
from facetrain.world import World

ArrayT = TypeVar("ArrayT")

_STEP_FOLDER = re.compile(r"step-(\d{8})")


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
) -> Path:
    """Write the checkpoint of `state.step`; every rank must call it.

    Rank 0 writes aside, flushes to disk and renames; then it removes checkpoints that are neither among the newest
    `train.keep_checkpoints` nor the best. Raises on every rank if one can't write.

    Args:
        run_dir: The run folder; with table rows, one that all ranks see.
        engine: Holds weights and optimizer.
        state: What else is saved.
        config: Stored beside the weights.
        world: The ranks.
        table_rows: This rank's part of the mining table: consecutive rows of each tensor, and in `first_row` the number
            of the first. None or empty is no table.
    """
    weights, optimizer_state = engine.weights(), engine.optimizer_state()  # over all ranks
    final = checkpoint_folder(run_dir, state.step)
    aside = final.with_name(f".{final.name}.tmp")

    def begin() -> bool:
        if final.exists():
            return False
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        return True

    def write_table_rows() -> None:
        file = aside / f"mining_table-{world.rank:05d}.safetensors"
        save_tensors(dict(table_rows or {}), file)
        _flush(file)

    def write() -> None:
        save_weights(weights, config, aside)
        save_tensors(optimizer_state, aside / "optimizer.safetensors")
        arrays = {"draws": state.draws} | {f"mined/{step}": ids for step, ids in state.mined.items()}
        save_arrays(arrays, aside / "plan.safetensors")
        scalars = {key: value for key, value in vars(state).items() if key not in ("draws", "mined")}
        (aside / "state.json").write_text(json.dumps(scalars), encoding="utf-8")
        _rename_durably(aside, final)
        _prune(run_dir, keep=config.train.keep_checkpoints, best_step=state.best_step)

    if world.on_main(begin):
        if table_rows:
            world.on_all(write_table_rows)
        world.on_main(write)
    return final


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Return where the checkpoint of a step is."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def load_state(folder: Path) -> TrainState:
    """Read the training state of a checkpoint.

    Raises:
        ValueError: A file of it is missing or damaged; the message names it.
    """
    arrays = _read(load_arrays, folder / "plan.safetensors")
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


def load_optimizer(folder: Path, engine: Engine) -> None:
    """Put the optimizer's state of a checkpoint into the engine.

    Raises:
        ValueError: The file is missing, damaged, or of another optimizer.
    """
    file = folder / "optimizer.safetensors"
    try:
        engine.load_optimizer_state(_read(load_tensors, file))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the checkpoint with the highest step, or None."""
    found = _step_folders(run_dir)
    return found[max(found)] if found else None


def save_weights(weights: dict[str, Tensor], config: Config, folder: Path) -> None:
    """Write `model.safetensors` and the config beside it, each by a rename."""
    save_tensors(weights, folder / ".model.tmp")
    os.replace(folder / ".model.tmp", folder / "model.safetensors")
    save_config(config, folder)


def save_config(config: Config, folder: Path) -> None:
    """Write `config.yaml`, by a rename."""
    (folder / ".config.tmp").write_text(config_yaml(config), encoding="utf-8")
    os.replace(folder / ".config.tmp", folder / "config.yaml")


def load_backbone(run: Path) -> tuple[Backbone, Config]:
    """Build the backbone of a run and load its weights, on the CPU.

    Args:
        run: A run folder (or a checkpoint's folder), or a .safetensors file with `config.yaml` beside it.

    Raises:
        ValueError: The weights are damaged or don't fit the config's backbone.
        FileNotFoundError: There are no weights or there is no config.
    """
    file = weights_file(run)
    config = load_config(file.parent / "config.yaml")
    model = replace(config.model, imagenet_weights=None)  # the run's own weights take their place
    backbone = build_backbone(model, channels=config.data.channels, image_px=config.data.image_px)
    load_weights(backbone, file)
    return backbone, config


def weights_file(run: Path) -> Path:
    """Return the weights of a run: `model.safetensors`, or the newest checkpoint's where the run isn't finished.

    Raises:
        FileNotFoundError: There are none.
    """
    if run.suffix == ".safetensors":
        if not run.is_file():
            raise FileNotFoundError(f"{run}: no such weights")
        return run
    newest = newest_checkpoint(run)
    for folder in (run, newest) if newest else (run,):
        if (folder / "model.safetensors").is_file():
            return folder / "model.safetensors"
    raise FileNotFoundError(f"{run}: expected a run folder with model.safetensors, or a .safetensors file")


def load_weights(backbone: nn.Module, file: Path) -> None:
    """Put weights into a backbone, all of them.

    Raises:
        ValueError: The file is damaged, or of another backbone; the message names the first layers that don't fit.
    """
    unfit, _ = _load_fitting(backbone, file)
    if unfit:
        raise ValueError(f"{file}: weights of another backbone; {len(unfit)} layers don't fit: {', '.join(unfit[:3])}")


def init_weights_from(backbone: nn.Module, run: Path) -> list[str]:
    """Start a backbone from earlier weights (`model.init_from`), leaving layers that don't fit as they are.

    Returns:
        What doesn't fit, a phrase per layer.

    Raises:
        ValueError: The file is damaged, or nothing in it fits.
        FileNotFoundError: There are no weights.
    """
    file = weights_file(run)
    unfit, num_fitting = _load_fitting(backbone, file)
    if num_fitting == 0:
        raise ValueError(f"model.init_from: no layer of {file} fits this backbone, such as {unfit[0]}")
    return unfit


def _load_fitting(backbone: nn.Module, file: Path) -> tuple[list[str], int]:
    """Load the layers that fit; return a phrase for each that is missing, of another shape or unknown; and how many."""
    weights = _read(load_tensors, file)
    expected = backbone.state_dict()
    unfit = [f"{name} (missing)" for name in expected if name not in weights]
    unfit += [f"{name} (unknown)" for name in weights if name not in expected]
    unfit += [
        f"{name} ({list(weights[name].shape)}, expected {list(tensor.shape)})"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    fitting = {n: w for n, w in weights.items() if n in expected and w.shape == expected[n].shape}
    backbone.load_state_dict(fitting, strict=False)
    return unfit, len(fitting)


def _read(load: Callable[[Path], dict[str, ArrayT]], file: Path) -> dict[str, ArrayT]:
    if not file.is_file():
        raise ValueError(f"{file}: missing")
    try:
        return load(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged ({error})") from None


def _rename_durably(aside: Path, final: Path) -> None:
    """Flush the files and the folder to disk, then rename; a crash leaves the whole checkpoint or none."""
    for path in [*aside.iterdir(), aside]:
        _flush(path)
    os.rename(aside, final)
    _flush(final.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _prune(run_dir: Path, *, keep: int, best_step: int) -> None:
    found = _step_folders(run_dir)
    for step in sorted(found)[:-keep]:
        if step != best_step:
            shutil.rmtree(found[step])


def _step_folders(run_dir: Path) -> dict[int, Path]:
    """Return the checkpoints of a run by their step."""
    matches = {path: _STEP_FOLDER.fullmatch(path.name) for path in (run_dir / "checkpoints").glob("step-*")}
    return {int(match[1]): path for path, match in matches.items() if match}
