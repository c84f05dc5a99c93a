"""Tracking: parameters, metrics and files of a run, in its own metrics.jsonl always and in MLflow where wanted.

Sole importer of mlflow. Silent off rank 0. A tracking server that fails never stops training.
"""

import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from facetrain.config import TrackingConfig
from facetrain.world import World

log = logging.getLogger(__name__)


_RETRY_AFTER_S = 60.0
"""Seconds for which MLflow is left alone after a failure."""

_PACKAGES = ("facetrain", "torch", "deepspeed", "torchvision", "webdataset", "numpy", "opencv-python-headless")


class Tracker:
    """Where a run's figures go. Every rank may call it; rank 0 alone writes."""

    def __init__(self, config: TrackingConfig, run_dir: Path, world: World, *, parameters: Mapping[str, Any]) -> None:
        """Open the run, or continue the one that the run folder knows.

        Args:
            config: The section `tracking`.
            run_dir: The run folder, which exists; metrics.jsonl and the id of MLflow's run are kept in it.
            world: Rank 0 writes.
            parameters: The resolved config, recorded when MLflow's run is made.
        """
        self.is_main = world.is_main
        self._metrics_file = run_dir / "metrics.jsonl"
        self._run_id_file = run_dir / "logs" / "mlflow_run_id"
        self._run_id = ""
        self._client: Any = None  # mlflow.MlflowClient; None off rank 0, without MLflow, and where no run could be made
        self._retry_at = 0.0
        # After an interruption some steps run again, with the same figures: what is logged stays logged once.
        self._logged = _logged_keys(self._metrics_file) if world.is_main else set()
        if world.is_main and config.backend == "mlflow":
            self._attempt(lambda: self._open_run(config, config.run_name or run_dir.name, parameters))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record figures of a step; what is recorded for this step already isn't repeated."""
        fresh = {key: value for key, value in values.items() if (step, key) not in self._logged}
        if not self.is_main or not fresh:
            return
        self._logged |= {(step, key) for key in fresh}
        now = time.time()
        with self._metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "at": round(now, 3), **fresh}) + "\n")
        if self._client and time.monotonic() >= self._retry_at:
            from mlflow.entities import Metric

            metrics = [Metric(key, value, round(now * 1000), step) for key, value in fresh.items()]
            self._attempt(lambda: self._client.log_batch(self._run_id, metrics=metrics))

    def artifacts(self, *paths: Path) -> None:
        """Record files and folders of the run; those that don't exist are left out."""

        def record(path: Path) -> None:
            if path.is_dir():
                self._client.log_artifacts(self._run_id, str(path), path.name)
            else:
                self._client.log_artifact(self._run_id, str(path))

        for path in paths:
            if self._client and path.exists():
                self._attempt(partial(record, path))

    def finish(self, *, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        """End MLflow's run; a continued job opens it again."""
        if self._client:
            self._attempt(lambda: self._client.set_terminated(self._run_id, status))

    def where(self) -> str:
        """Return how to see the figures."""
        if not self._client:
            return str(self._metrics_file)
        uri = self._client.tracking_uri
        return f"mlflow ui --backend-store-uri {uri}" if uri.startswith("sqlite") else str(uri)

    def _open_run(self, config: TrackingConfig, name: str, parameters: Mapping[str, Any]) -> None:
        # With the defaults a call hangs for four minutes when the server is gone.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        from mlflow import MlflowClient
        from mlflow.entities import Param, RunTag

        client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db"))
        self._run_id = self._run_id_file.read_text(encoding="utf-8") if self._run_id_file.is_file() else ""
        if self._run_id:
            client.update_run(self._run_id, status="RUNNING")
        else:
            self._run_id = client.create_run(_experiment_id(client, config.experiment), run_name=name).info.run_id
            client.log_batch(self._run_id, params=[Param(k, str(value)[:6000]) for k, value in parameters.items()])
            self._run_id_file.parent.mkdir(exist_ok=True)
            self._run_id_file.write_text(self._run_id, encoding="utf-8")
        client.log_batch(self._run_id, tags=[RunTag(key, value) for key, value in _environment().items()])
        self._client = client

    def _attempt(self, call: Callable[[], None]) -> None:
        """Call MLflow; a failure is a warning, since metrics.jsonl has the figures."""
        try:
            call()
        except Exception as error:  # whatever a server or a database can raise
            self._retry_at = time.monotonic() + _RETRY_AFTER_S
            message = " ".join(str(error).split())[:200]
            log.warning("MLflow failed (%s); training goes on, and metrics.jsonl has all figures", message)


def _experiment_id(client: Any, name: str) -> str:
    """Return MLflow's experiment of that name, made where there is none."""
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    location = None
    if client.tracking_uri.startswith("sqlite:///"):
        # MLflow's own default is ./mlruns of whoever starts first: keep a run's files beside its database.
        database = Path(client.tracking_uri.removeprefix("sqlite:///"))
        location = (database.absolute().parent / "mlruns").as_uri()
    return str(client.create_experiment(name, artifact_location=location))


def _logged_keys(metrics_file: Path) -> set[tuple[int, str]]:
    """Return the (step, metric) pairs of the file; a last line that a crash cut off is removed from it."""
    if not metrics_file.is_file():
        return set()
    lines = metrics_file.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        metrics_file.write_text("".join(lines), encoding="utf-8")
    rows = [json.loads(line) for line in lines]
    return {(row["step"], key) for row in rows for key in row if key not in ("step", "at")}


def _environment() -> dict[str, str]:
    """Return versions, machine, and the git state of this package where it is a checkout."""
    tags = {f"version.{name}": version(name) for name in _PACKAGES}
    tags |= {
        "python": platform.python_version(),
        "host": platform.node(),
        "world_size": os.environ.get("WORLD_SIZE", "1"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    for tag, command in {"git_commit": "git rev-parse HEAD", "git_changes": "git status --porcelain"}.items():
        try:
            done = subprocess.run(
                command.split(), cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5, check=True
            )
        except (OSError, subprocess.SubprocessError):
            continue
        tags[tag] = done.stdout.strip()[:5000]
    return tags
