"""The tracker: what training calls, and the thread that sends to MLflow beside it.

Figures go to metrics.jsonl first, which costs microseconds. The thread sends what is new there, and tries again later
when it can't: a server that is down, hangs or refuses neither stops training nor slows it.
"""

import errno
import json
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from facetrain.config import TrackingConfig
from facetrain.masking import mask_secrets
from facetrain.tracking.environment import environment_tags
from facetrain.tracking.mlflow_model import write_model
from facetrain.tracking.mlflow_store import MlflowStore
from facetrain.tracking.outbox import METRICS_FILE, Outbox
from facetrain.world import World

log = logging.getLogger(__name__)

RETRY_AFTER_S = 30.0
"""Seconds for which MLflow is left alone after a failure."""
CLOSE_WAIT_S = 30.0
"""Seconds that the end of a run waits for the last figures and files to arrive."""
FAILED_WAIT_S = 2.0
"""The same after an error: the other ranks wait 3 s for rank 0 to say what went wrong."""
MAX_NOTE = 5000
"""Characters of a description that MLflow takes."""
_RESULTS = ("config.yaml", "results.json", "report.html", "figures", "model_card.md")
"""What MLflow gets of the folder of a finished run, besides a model."""


class Tracker:
    """Where a run's figures go. Every rank may call it; rank 0 alone writes."""

    def __init__(self, config: TrackingConfig, run_dir: Path, world: World, *, parameters: Mapping[str, Any]) -> None:
        """Open the run, or continue the one that the run folder knows; every rank must do so.

        Args:
            config: The section `tracking`.
            run_dir: The run folder, which exists; metrics.jsonl, and in logs/ what MLflow still lacks, are kept in it.
            world: Rank 0 writes.
            parameters: The resolved config, recorded when MLflow's run is made; secrets in it are masked.

        Raises:
            ValueError: A line of metrics.jsonl is damaged; on every rank.
        """
        self.is_main = world.is_main
        self._metrics_file = run_dir / METRICS_FILE
        self._unwritten = ""
        # After an interruption some steps run again, with the same figures: what is logged stays logged once.
        self._logged: dict[int, set[str]] = {}
        world.on_main(self._read_logged)  # over all ranks: where the file is damaged, all end with that
        self._sender: _Sender | None = None
        if world.is_main and config.backend == "mlflow":
            try:
                name, tags = config.run_name or run_dir.name, environment_tags() | {"run_dir": str(run_dir.absolute())}
                outbox = Outbox.start(
                    run_dir,
                    experiment=config.experiment,
                    run_name=name,
                    parameters=parameters,
                    tags=tags,
                    sweep=config.sweep or "",
                    register_as=config.register_as or "",
                )
                self._sender = _Sender(MlflowStore(outbox), outbox)
            except (ImportError, ValueError, OSError) as error:
                log.warning(f"MLflow can't be used ({error}); training goes on, and metrics.jsonl has all figures")

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record figures of a step, the same as before or a later one; what is recorded of it isn't repeated."""
        if not self.is_main:
            return
        for earlier in [logged for logged in self._logged if logged < step]:
            del self._logged[earlier]
        logged = self._logged.setdefault(step, set())
        fresh = {key: value for key, value in values.items() if key not in logged}
        if not fresh:
            return
        logged.update(fresh)
        self._write(json.dumps({"step": step, "at": round(time.time(), 3), **fresh}) + "\n")
        if self._sender is not None:
            self._sender.wake()

    def describe(self, text: str) -> None:
        """Record the description that stands at the head of the run's page, in Markdown."""
        if self._sender is not None:
            self._sender.add_tag("mlflow.note.content", text[:MAX_NOTE])

    def results(self) -> None:
        """Record the files of a finished run, and its network in MLflow's pyfunc form, registered where asked for."""
        if self._sender is None:
            return
        run_dir = self._sender.outbox.run_dir
        self._sender.add_artifacts(_results_in(run_dir))
        try:
            # Here, not in the thread: a process that ends while that one imports pandas is aborted.
            self._sender.add_artifacts([write_model(run_dir)])
        except Exception as error:  # whatever MLflow, pandas or a full disk can raise: the run itself is whole
            log.warning(f"MLflow gets no model ({error}); `facetrain sync {run_dir} --register NAME` tries again")

    def finish(self, *, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        """End MLflow's run, after what is left to send or a while; a continued job opens it again."""
        if self._unwritten:
            self._write("")  # there is no other next time
        if self._sender is not None:
            self._sender.close(status)

    def where(self) -> str:
        """Return how to see the figures."""
        if self._sender is None:
            return str(self._metrics_file)
        uri = self._sender.store.uri
        return f"mlflow ui --backend-store-uri {uri}" if uri.startswith("sqlite") else mask_secrets(uri)

    def _read_logged(self) -> None:
        self._logged = _logged_keys(self._metrics_file)

    def _write(self, line: str) -> None:
        """Append to metrics.jsonl; on a full disk keep the line for the next time."""
        self._unwritten += line
        try:
            with self._metrics_file.open("ab", buffering=0) as file:
                end, data = file.tell(), self._unwritten.encode()
                if file.write(data) < len(data):  # the last bytes of a disk
                    file.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            log.warning(f"{self._metrics_file}: can't be written ({error}); its figures are kept for the next time")
        else:
            self._unwritten = ""


class _Sender:
    """The thread that sends, from the start of a run to its end."""

    def __init__(self, store: MlflowStore, outbox: Outbox) -> None:
        self.store, self.outbox = store, outbox
        self._wake = threading.Event()
        self._is_closing = False
        self._is_failing = False
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self.wake()
        self._thread.start()

    def wake(self) -> None:
        """Say that there is something to send."""
        self._wake.set()

    def add_artifacts(self, paths: Sequence[Path]) -> None:
        """Ask for files and folders to be sent."""
        try:
            for path in paths:
                self.outbox.add_artifact(path)
        except OSError as error:
            log.warning(f"{error}; MLflow gets no more files of this run")
        self.wake()

    def add_tag(self, key: str, value: str) -> None:
        """Ask for a tag to be sent."""
        try:
            self.outbox.update(tags={**self.outbox.contents.tags, key: value}, is_described=False)
        except OSError as error:
            log.warning(f"{error}; MLflow won't learn the {key} of this run")
        self.wake()

    def close(self, status: str) -> None:
        """Send what is left, wait for it a while, and say so if something stays behind; again does nothing."""
        if self._is_closing:
            return
        try:
            self.outbox.update(status=status)
        except OSError as error:
            log.warning(f"{error}; MLflow won't learn that this run is {status}")
        self._is_closing = True
        self.wake()
        self._thread.join(FAILED_WAIT_S if status == "FAILED" else CLOSE_WAIT_S)
        if not self.outbox.is_empty():
            log.warning(f"MLflow lacks some of this run; later, `facetrain sync {self.outbox.run_dir}` sends it")

    def _run(self) -> None:
        retry_at = 0.0
        while True:
            self._wake.wait(RETRY_AFTER_S if self._is_failing else None)
            self._wake.clear()
            is_last = self._is_closing
            if is_last or time.monotonic() >= retry_at:
                self._attempt()
                retry_at = time.monotonic() + RETRY_AFTER_S if self._is_failing else 0.0
            if is_last:
                return

    def _attempt(self) -> None:
        try:
            self.store.send()
        except Exception as error:  # whatever a server or a database can raise
            if not self._is_failing:
                message = " ".join(mask_secrets(str(error)).split())[:200]
                log.warning(f"MLflow failed ({message}); training goes on, and what is missing there is sent later")
            self._is_failing = True
        else:
            if self._is_failing:
                log.info("MLflow is back, and has all figures")
            self._is_failing = False


def sync(run_dir: Path, *, register_as: str | None = None) -> str:
    """Send what MLflow lacks of a run, and return where it went.

    Args:
        run_dir: The run folder.
        register_as: Send the model too, and register it under this name.

    Raises:
        ValueError: The folder holds no run with tracking.backend=mlflow.
        OSError: MLflow can't be reached, refuses or doesn't know the run; nothing is lost.
    """
    outbox = Outbox.open(run_dir)
    if lacks_results(run_dir):
        for path in (*_results_in(run_dir), write_model(run_dir)):
            outbox.add_artifact(path)
        outbox.update(status="FINISHED")
    if register_as is not None:
        if not (run_dir / "model.safetensors").is_file():
            raise ValueError(f"--register: {run_dir} is not finished, it has no model.safetensors")
        outbox.update(register_as=register_as)
        outbox.add_artifact(write_model(run_dir))
    store = MlflowStore(outbox)
    try:
        store.send()
    except LookupError as error:
        raise OSError(str(error)) from None
    except Exception as error:  # whatever a server or a database can raise
        message = " ".join(mask_secrets(str(error)).split())[:200]
        raise OSError(
            f"MLFLOW_TRACKING_URI: {mask_secrets(store.uri)} failed ({message}); run it again later"
        ) from None
    return f"{mask_secrets(store.uri)}, run {outbox.contents.run_id}"


def lacks_results(run_dir: Path) -> bool:
    """Return whether a run with MLflow is finished, but its last job was ended before it could ask for that to be sent.

    Raises:
        ValueError: The outbox can't be read; the message names the file.
    """
    if not (run_dir / "results.json").is_file() or not Outbox.is_in(run_dir):
        return False
    return Outbox.open(run_dir).contents.status == "RUNNING"


def _results_in(run_dir: Path) -> list[Path]:
    return [run_dir / name for name in _RESULTS if (run_dir / name).exists()]


def _logged_keys(metrics_file: Path) -> dict[int, set[str]]:
    """Return the names of the figures of each step in the file; a last line that a crash cut off is removed from it.

    Raises:
        ValueError: A line is damaged; the message names it.
    """
    if not metrics_file.is_file():
        return {}
    data = metrics_file.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        os.truncate(metrics_file, end)
    logged = dict[int, set[str]]()
    for number, line in enumerate(data[:end].splitlines(), start=1):
        try:
            row = json.loads(line)
            logged.setdefault(row.pop("step"), set()).update(row.keys() - {"at"})
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f"{metrics_file}:{number}: expected a line of figures and their step, as JSON") from None
    return logged
