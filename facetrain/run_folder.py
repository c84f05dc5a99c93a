"""The run folder: whether it is new, to be continued, or finished; and the log inside it."""

import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from facetrain.checkpoint.folder import newest_checkpoint, tidy
from facetrain.checkpoint.weights import save_config
from facetrain.command_line import differing_keys, load_config
from facetrain.config import Config
from facetrain.lock import hold_folder
from facetrain.world import World

# What may change between an interruption and its continuation: nothing that the weights depend on.
FREE_KEYS = (
    "run.dir",
    "run.resume",
    "run.device",
    "run.timeout_s",
    "run.rendezvous_timeout_s",
    "run.checkpoint_timeout_s",
    "data.shards",  # a checkpoint knows their content
    "data.cache_dir",
    "data.cache_bytes",
    "data.fetch_timeout_s",
    "data.fetch_attempts",
    "data.on_bad_image",  # the weights depend on it only where the run would have ended
    "data.workers",
    "data.prefetch",
    "data.start_method",
    "train.micro_pairs",  # it must divide the pairs of a rank; as with W, batch statistics depend on it
    "train.zero_stage",  # how the same optimizer's state is shared out
    "train.log_every_steps",
    "train.save_every_steps",
    "train.keep_checkpoints",
    "train.async_checkpoint",
    "train.max_failed_saves",
    "train.straggler_factor",
    "train.profile_steps",
    "eval.every_steps",
    "eval.at_start",
    "eval.dataset",
    "eval.images",
    "eval.pairs",
    "eval.view1",
    "eval.open_set_people",
    "eval.mirror",
    "eval.draws",
    "tracking.backend",
    "tracking.experiment",
    "tracking.run_name",
    "tracking.sweep",
    "tracking.register_as",
)


_SEEN_WITHIN_S = 90.0
"""Seconds that other hosts may take to see a new file: NFS takes a folder that was looked up before it existed for
missing for up to 60 s."""
_LOST_LOCK_WITHIN_S = 120.0
"""Seconds that a restarted job waits for the lock of the one before: NFS keeps that of a dead host for up to 90 s."""
_RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", "FACETRAIN_RESTART_COUNT")
"""Environment variables of torchrun, SLURM and launch/torchrun.sh: how often each has started this job again."""


@dataclass(frozen=True)
class RunFolder:
    """Where a run stands."""

    path: Path
    """`run.dir`."""
    resume_from: Path | None
    """The folder of the newest checkpoint that is whole; None starts from step 0."""
    damaged: dict[Path, str]
    """Checkpoints that would be newer, and what is wrong with each."""
    is_finished: bool
    """Whether the run has its results already."""


def is_restart() -> bool:
    """Return whether a launcher has started this process in place of one that was lost, as it says by a variable."""
    return any(os.environ.get(name, "") not in ("", "0") for name in _RESTART_COUNTS)


def open_run_folder(config: Config, *, restarted: bool | None = None) -> RunFolder:
    """Decide what `run.resume` means for the folder as it is; nothing is written.

    Args:
        config: Names the folder.
        restarted: Whether the job was started again by its launcher, and goes on whatever `run.resume` says of the
            first start; None: as this process's environment says.

    Raises:
        ValueError: The folder holds a run of another config (the keys are named), a run where a fresh folder was
            asked for, none where one must be, or checkpoints of which none is whole.
    """
    path = Path(config.run.dir)
    if path.exists() and not path.is_dir():
        raise ValueError(f"run.dir: expected a folder, {path} is a file")
    stored, (newest, damaged) = path / "config.yaml", newest_checkpoint(path)
    if damaged and newest is None:
        each = "; ".join(f"{folder.name}: {damage}" for folder, damage in damaged.items())
        raise ValueError(
            f"{path / 'checkpoints'}: no checkpoint is whole ({each}); remove that folder to start from step 0"
        )
    if not stored.is_file():
        if newest is not None:
            raise ValueError(f"{stored}: missing, though {newest} is there; put it back, or give another run.dir")
        if config.run.resume == "must":
            raise ValueError(f"run.resume: 'must' continues a run, but {path} holds none")
        return RunFolder(path=path, resume_from=None, damaged={}, is_finished=False)
    if config.run.resume == "never" and not (is_restart() if restarted is None else restarted):
        raise ValueError(f"run.dir: {path} holds a run already, expected a fresh folder with run.resume=never")
    differing = differing_keys(load_config(stored), config, ignore=FREE_KEYS)
    if differing:
        raise ValueError(
            f"run.dir: {path} holds a run of another config ({'; '.join(differing)});"
            " give the same config to continue it, or another run.dir"
        )
    return RunFolder(path=path, resume_from=newest, damaged=damaged, is_finished=_is_finished(path))


@contextmanager
def claim_run_folder(config: Config, world: World) -> Iterator[RunFolder]:
    """Open the folder for all ranks and, unless the run is finished, hold it for this job alone.

    Rank 0 holds it and stores the resolved config, which starts the same run again.

    Raises:
        ValueError: As `open_run_folder`, another job holds the folder, or a host sees another one; on every rank.
    """
    # Over all ranks: torchrun counts a restart on the machine that failed, which needn't be that of rank 0.
    restarted = any(world.all_gather_object(is_restart()))
    with ExitStack() as held:

        def claim() -> RunFolder:
            path = Path(config.run.dir)
            if not path.is_dir():
                open_run_folder(config, restarted=restarted)  # before anything is made
                path.mkdir(parents=True, exist_ok=True)  # by now another job may have
            if not _is_finished(path):
                wait_s = _LOST_LOCK_WITHIN_S if restarted else 0.0
                held.enter_context(hold_folder(path, name=f"run.dir: {path}", wait_s=wait_s))
            folder = open_run_folder(config, restarted=restarted)
            if not folder.is_finished:
                (path / "logs").mkdir(exist_ok=True)
                save_config(config, path)
                tidy(path, folder.damaged)
            return folder

        with world.waiting_up_to(config.run.checkpoint_timeout_s):  # rank 0 reads whole checkpoints to verify them
            folder = world.on_main(claim)
        if not folder.is_finished:
            _check_all_see(folder.path, world)
        yield folder


def _check_all_see(path: Path, world: World) -> None:
    """Refuse a folder that isn't everyone's: with rank 0 on another host, a restart would begin from step 0.

    Over all ranks: every rank ends with the same answer.
    """
    if world.world_size == 1:
        return
    probe = path / "logs" / f".seen-{world.broadcast_object(uuid.uuid4().hex)}"
    world.on_main(probe.touch)
    give_up_at = time.monotonic() + _SEEN_WITHIN_S
    # os.path takes any error of the file system for no file, so that no rank leaves the others waiting in the gather.
    while not os.path.exists(probe) and time.monotonic() < give_up_at:
        time.sleep(0.1)
    with world.waiting_up_to(_SEEN_WITHIN_S + world.timeout_s):  # for those who see it late
        hosts = world.all_gather_object((socket.gethostname(), os.path.exists(probe)))
    world.on_main(probe.unlink)
    blind = sorted({host for host, sees in hosts if not sees})
    if blind:
        raise ValueError(
            f"run.dir: {path} on {', '.join(blind)} isn't that of rank 0 on {hosts[0][0]}; give a folder on a file"
            " system that all hosts mount"
        )


def _is_finished(path: Path) -> bool:
    return (path / "results.json").is_file()


def start_logging(path: Path | None) -> None:
    """Log to the terminal and, where a run folder is given (rank 0), to its `logs/train.log`."""
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if path is not None and (path / "logs").is_dir():
        handlers.append(logging.FileHandler(path / "logs" / "train.log", encoding="utf-8"))
    logging.basicConfig(
        format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING, handlers=handlers, force=True
    )
    logging.getLogger("facetrain").setLevel(logging.ERROR if path is None else logging.INFO)
