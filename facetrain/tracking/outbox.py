"""What MLflow is to know of a run and what it knows already, kept in the run folder: nothing is lost with a process."""

import json
import os
import threading
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from facetrain.masking import mask_secrets

METRICS_FILE = "metrics.jsonl"
"""A line per recorded step: step, time, and figures by name."""

_OUTBOX_FILE = Path("logs", "tracking.json")
_BATCH_LINES = 20
"""Lines of metrics.jsonl that are sent in one request; MLflow takes 1000 figures."""


@dataclass
class Contents:
    """What `logs/tracking.json` holds."""

    experiment: str
    """MLflow's experiment."""
    run_name: str
    """Name of MLflow's run."""
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """By which the run is found again if the answer to its creation was lost."""
    run_id: str = ""
    """MLflow's name of the run; empty until it is made."""
    uri: str = ""
    """Where the run is logged, a database's path in full; empty before the first try, or where it holds a secret."""
    parameters: dict[str, str] = field(default_factory=dict)
    """The config when the run began, without secrets."""
    tags: dict[str, str] = field(default_factory=dict)
    """Versions and machine of the latest start."""
    is_described: bool = False
    """Whether parameters and tags have arrived."""
    sent_bytes: int = 0
    """How much of metrics.jsonl has arrived."""
    artifacts: list[str] = field(default_factory=list)
    """Files and folders, below the run folder, that are still to be sent."""
    status: str = "RUNNING"
    """RUNNING, FINISHED, FAILED or KILLED."""
    sent_status: str = ""
    """The status that MLflow knows."""
    sweep: str = ""
    """Name of the parent run; empty where there is none."""
    register_as: str = ""
    """Name under which the model is registered when it is sent; empty registers none."""


class Outbox:
    """The contents, safe over two threads: training adds, another sends."""

    def __init__(self, run_dir: Path, contents: Contents) -> None:
        self.run_dir = run_dir
        self.contents = contents
        self._lock = threading.Lock()

    @staticmethod
    def is_in(run_dir: Path) -> bool:
        """Return whether a run has one."""
        return (run_dir / _OUTBOX_FILE).is_file()

    @classmethod
    def open(cls, run_dir: Path) -> "Outbox":
        """Read a run's outbox.

        Raises:
            ValueError: The run has none, or it can't be read; the message names the file.
        """
        file = run_dir / _OUTBOX_FILE
        if not cls.is_in(run_dir):
            raise ValueError(f"{file}: no such file; expected the folder of a run with tracking.backend=mlflow")
        try:
            return cls(run_dir, Contents(**json.loads(file.read_text(encoding="utf-8"))))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: damaged ({error})") from None

    @classmethod
    def start(
        cls,
        run_dir: Path,
        *,
        experiment: str,
        run_name: str,
        parameters: Mapping[str, Any],
        tags: Mapping[str, str],
        sweep: str = "",
        register_as: str = "",
    ) -> "Outbox":
        """Make the outbox of a run that begins, or take up that of one that goes on, which keeps its parameters."""
        if cls.is_in(run_dir):
            outbox = cls.open(run_dir)
        else:
            masked = {key: mask_secrets(str(value)) for key, value in parameters.items()}
            outbox = cls(run_dir, Contents(experiment=experiment, run_name=run_name, parameters=masked, sweep=sweep))
            (run_dir / _OUTBOX_FILE).parent.mkdir(exist_ok=True)
        outbox.update(tags=dict(tags), is_described=False, status="RUNNING", sent_status="", register_as=register_as)
        return outbox

    def update(self, **changes: Any) -> None:
        """Change fields of the contents and write the file."""
        with self._lock:
            for key, value in changes.items():
                setattr(self.contents, key, value)
            self._write()

    def is_described_by(self, tags: Mapping[str, str]) -> None:
        """Take note that the parameters and these tags have arrived; tags that came meanwhile are still to be sent."""
        with self._lock:
            self.contents.is_described = self.contents.tags == tags
            self._write()

    def add_artifact(self, path: Path) -> None:
        """Ask for a file or folder of the run to be sent."""
        name = str(path.relative_to(self.run_dir))
        with self._lock:
            if name not in self.contents.artifacts:
                self.contents.artifacts.append(name)
            self._write()

    def artifact_is_sent(self, name: str) -> None:
        """Take note that a file or folder has arrived."""
        with self._lock:
            self.contents.artifacts.remove(name)
            self._write()

    def _write(self) -> None:
        """Write the file, at once or not at all."""
        file = self.run_dir / _OUTBOX_FILE
        aside = file.with_suffix(".tmp")
        aside.write_text(json.dumps(asdict(self.contents), indent=1), encoding="utf-8")
        os.replace(aside, file)

    def unsent_rows(self) -> Iterator[tuple[list[dict[str, Any]], int]]:
        """Yield the lines of metrics.jsonl that haven't arrived, some at a time, and where in the file they end."""
        file = self.run_dir / METRICS_FILE
        if not file.is_file():
            return
        with file.open("rb") as stream:
            stream.seek(self.contents.sent_bytes)
            rows: list[dict[str, Any]] = []
            end = self.contents.sent_bytes
            for line in stream:
                if not line.endswith(b"\n"):  # being written right now
                    break
                rows.append(json.loads(line))
                end += len(line)
                if len(rows) == _BATCH_LINES:
                    yield rows, end
                    rows = []
            if rows:
                yield rows, end

    def is_empty(self) -> bool:
        """Return whether MLflow knows everything."""
        kept = self.contents
        is_told = kept.is_described and kept.status == kept.sent_status and not kept.artifacts
        return is_told and next(self.unsent_rows(), None) is None
