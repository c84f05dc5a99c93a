"""The run folder: whether it is new, to be continued, or finished; and the log inside it."""

import logging
from dataclasses import dataclass
from pathlib import Path

from facetrain.checkpoint import newest_checkpoint
from facetrain.config import Config, config_yaml, differing_keys, load_config

# What may change between an interruption and its continuation: nothing that the weights depend on.
FREE_KEYS = (
    "run.dir",
    "run.resume",
    "run.timeout_s",
    "data.workers",
    "data.prefetch",
    "train.log_every_steps",
    "train.save_every_steps",
    "train.keep_checkpoints",
    "eval.every_steps",
    "eval.dataset",
    "eval.images",
    "eval.pairs",
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
    stored = path / "config.yaml"
    if not stored.is_file():
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
    return RunFolder(path=path, resume_from=newest_checkpoint(path), is_finished=(path / "results.json").is_file())


def create_run_folder(config: Config) -> None:
    """Make the folder and store the resolved config, which starts the same run again."""
    path = Path(config.run.dir)
    (path / "logs").mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text(config_yaml(config), encoding="utf-8")


def start_logging(path: Path | None) -> None:
    """Log to the terminal and, where a run folder is given (rank 0), to its `logs/train.log`."""
    handlers: list[logging.Handler] = []
    if path is not None:
        handlers = [logging.StreamHandler(), logging.FileHandler(path / "logs" / "train.log")]
    level = logging.INFO if path is not None else logging.ERROR
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING, handlers=handlers)
    logging.getLogger("facetrain").setLevel(level)
