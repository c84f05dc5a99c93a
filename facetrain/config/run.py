"""Sections `run` and `tracking`: where a run lives, and where its figures go."""

from dataclasses import dataclass
from typing import Literal

from facetrain.config.bounds import at_least

_LONGEST_S = 1e9
"""Some thirty years: process groups count nanoseconds, which don't go much further."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives and how it starts."""

    dir: str = "runs/facetrain"
    """The run folder: config, metrics, weights, checkpoints, figures."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: continue an unfinished run of the same config; never: refuse a folder in use; must: refuse a fresh one.
    Where torchrun, launch/torchrun.sh or SLURM starts the same job again, never is auto."""
    seed: int = 0
    """Seed of weights, plan, augmentation, mining and random losses; 0 to 2^32 - 1."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    timeout_s: float = 600.0
    """Seconds after which a collective whose peer is gone fails."""
    rendezvous_timeout_s: float = 600.0
    """Seconds that processes and machines wait for each other at the start, and when they start again."""
    checkpoint_timeout_s: float = 1800.0
    """Seconds that ranks wait for each other while a checkpoint is written, or verified before a run goes on."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"run.seed: expected 0 to {(1 << 32) - 1}, got {self.seed}")
        at_least("run.rendezvous_timeout_s", self.rendezvous_timeout_s, 1)
        for name in ("timeout_s", "rendezvous_timeout_s", "checkpoint_timeout_s"):
            if not 0 < getattr(self, name) <= _LONGEST_S:
                raise ValueError(
                    f"run.{name}: expected more than 0 seconds, {_LONGEST_S:g} at most, got {getattr(self, name)}"
                )


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where metrics go besides metrics.jsonl in the run folder."""

    backend: Literal["mlflow", "none"] = "mlflow"
    """mlflow writes to MLFLOW_TRACKING_URI; where that is unset, a run goes on where it was logged before (unless that
    URI holds a secret), and a new one is logged in sqlite:///mlflow.db."""
    experiment: str = "facetrain"
    """MLflow experiment."""
    run_name: str | None = None
    """MLflow run name; null takes the name of the run folder."""
    sweep: str | None = None
    """Name of the MLflow run under which this one stands, made by the first run that names it."""
    register_as: str | None = None
    """Name under which MLflow registers the trained model, once the run is finished."""

    def __post_init__(self) -> None:
        """Check the names."""
        if not self.experiment:
            raise ValueError("tracking.experiment: expected a name, got ''")
        for key in ("sweep", "register_as"):
            name = getattr(self, key)
            if name is not None and (not name or set("/:'") & set(name)):
                raise ValueError(f"tracking.{key}: expected a name without / : and ', got '{name}'")
