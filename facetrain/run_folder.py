"""The run folder: whether it is new, to be continued, or finished; and the log inside it."""

import logging
from dataclasses import dataclass
from pathlib import Path

from facetrain.checkpoint import newest_checkpoint, save_config
from facetrain.command_line import differing_keys, load_config
from facetrain.config import Config

# What may change between an interruption and its continuation: nothing that the weights depend on.
FREE_KEYS = (
    "run.dir",
    "run.resume",
    "run.device",
    "run.timeout_s",
    "data.shards",  # a checkpoint knows their content
    "data.cache_dir",
    "data.cache_bytes",
    "data.fetch_timeout_s",
    "data.fetch_attempts",
    "data.on_bad_image",  # the weights depend on it only where the run would have ended
    "data.workers",
    "data.prefetch",
    "data.start_method",
    "train.log_every_steps",
    "train.save_every_steps",
    "train.keep_checkpoints",
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
)


@dataclass(frozen=True)
class RunFolder:
    """Where a run stands."""

    path: Path
    """`run.dir`."""
    resume_from: Path | None
    """The newest checkpoint's folder; None starts from step 0."""
    is_finished: bool
    """Whether the run has its results already."""


def open_run_folder(config: Config) -> RunFolder:
    """Decide what `run.resume` means for the folder as it is; nothing is written.

    Raises:
        ValueError: The folder holds a run of another config (the keys are named), a run where a fresh folder was
            asked for, or none where one must be.
    """
    path = Path(config.run.dir)
    stored, newest = path / "config.yaml", newest_checkpoint(path)
    if not stored.is_file():
        if newest is not None:
            raise ValueError(f"{stored}: missing, though {newest} is there; put it back, or give another run.dir")
        if config.run.resume == "must":
            raise ValueError(f"run.resume: 'must' continues a run, but {path} holds none")
        return RunFolder(path=path, resume_from=None, is_finished=False)
    if config.run.resume == "never":
        raise ValueError(f"run.dir: {path} holds a run already, expected a fresh folder with run.resume=never")
    differing = differing_keys(load_config(stored), config, ignore=FREE_KEYS)
    if differing:
        raise ValueError(
            f"run.dir: {path} holds a run of another config ({'; '.join(differing)});"
            " give the same config to continue it, or another run.dir"
        )
    return RunFolder(path=path, resume_from=newest, is_finished=(path / "results.json").is_file())


def claim_run_folder(config: Config) -> RunFolder:
    """Open the folder and, unless the run is finished, store the resolved config, which starts the same run again."""
    folder = open_run_folder(config)
    if not folder.is_finished:
        (folder.path / "logs").mkdir(parents=True, exist_ok=True)
        save_config(config, folder.path)
    return folder


def start_logging(path: Path | None) -> None:
    """Log to the terminal and, where a run folder is given (rank 0), to its `logs/train.log`."""
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if path is not None and (path / "logs").is_dir():
        handlers.append(logging.FileHandler(path / "logs" / "train.log", encoding="utf-8"))
    logging.basicConfig(
        format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING, handlers=handlers, force=True
    )
    logging.getLogger("facetrain").setLevel(logging.ERROR if path is None else logging.INFO)
