"""Sending a run's outbox to MLflow, each figure once. Sole importer of mlflow, with mlflow_model."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from facetrain.masking import mask_secrets
from facetrain.tracking.mlflow_model import MODEL_NAME
from facetrain.tracking.outbox import Outbox

_KEY_TAG = "facetrain.key"
_SWEEP_TAG = "facetrain.sweep"
_SQLITE = "sqlite:///"
_TIMEOUT, _ANSWER_S, _STORE_S = "MLFLOW_HTTP_REQUEST_TIMEOUT", "3", "120"
"""MLflow's setting, and for how long an answer is waited for: to figures, and to a file."""
_BATCH = 100
"""Parameters or tags that MLflow takes in one request."""


class MlflowStore:
    """Where MLFLOW_TRACKING_URI points; where that is unset, where the run was logged before, or sqlite:///mlflow.db."""

    def __init__(self, outbox: Outbox) -> None:
        """Import mlflow; nothing is sent or asked before `send`."""
        # With the defaults a call hangs for four minutes when the server is gone.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault(_TIMEOUT, _ANSWER_S)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        import mlflow  # noqa: F401 - takes a second, which is better spent here than in the sending thread

        self.uri = os.environ.get("MLFLOW_TRACKING_URI") or outbox.contents.uri or "sqlite:///mlflow.db"
        self._outbox = outbox
        self._client: Any = None
        self._is_in_doubt = True

    def send(self) -> None:
        """Send everything that isn't known to have arrived.

        Raises:
            LookupError: MLflow doesn't know the run, though it was made; one line says where it was.
            Exception: Whatever a server or a database can raise; what has arrived until then is noted.
        """
        try:
            self._describe()
            for rows, end in self._outbox.unsent_rows():
                self._send_rows(rows)
                self._outbox.update(sent_bytes=end)
                self._is_in_doubt = False
            status = self._outbox.contents.status
            if status != self._outbox.contents.sent_status:
                self._send_status(status)
                self._outbox.update(sent_status=status)
            for name in list(self._outbox.contents.artifacts):
                with _time_to_store():
                    self._send_artifact(name)
                self._outbox.artifact_is_sent(name)
        except BaseException as error:
            self._is_in_doubt = True  # a request may have arrived, though its answer didn't
            if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST" and self._outbox.contents.run_id:
                raise self._unknown_run() from error
            raise

    def _describe(self) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param, RunTag

        kept = self._outbox.contents
        if self._client is None:
            self._client = MlflowClient(self.uri)
        if not kept.run_id:
            self._outbox.update(uri=_to_remember(self.uri))  # first: a run whose id was lost is looked for there
            self._outbox.update(run_id=self._make_run())
        if kept.is_described:
            return
        parameters = [Param(key, value[:6000]) for key, value in kept.parameters.items()]
        sent_tags = kept.tags
        tags = [RunTag(key, value) for key, value in sent_tags.items()]
        for some in _batches(parameters):
            self._client.log_batch(kept.run_id, params=some)  # again with the same values changes nothing
        for some in _batches(tags):
            self._client.log_batch(kept.run_id, tags=some)
        self._outbox.is_described_by(sent_tags)

    def _unknown_run(self) -> LookupError:
        kept = self._outbox.contents
        known = f", {kept.uri}" if kept.uri not in ("", _to_remember(self.uri)) else ""
        return LookupError(
            f"MLFLOW_TRACKING_URI: {mask_secrets(self.uri)} doesn't know run {kept.run_id}; expected where that was"
            f" logged{known}, and that it isn't deleted there"
        )

    def _make_run(self) -> str:
        """Return the id of the run: of the one made before, if only the answer was lost."""
        kept = self._outbox.contents
        experiment = self._experiment_id(kept.experiment)
        found = self._client.search_runs([experiment], filter_string=f"tags.`{_KEY_TAG}` = '{kept.key}'")
        if found:
            return str(found[0].info.run_id)
        tags = {_KEY_TAG: kept.key}
        if kept.sweep:
            tags["mlflow.parentRunId"] = self._parent_id(experiment, kept.sweep)
        return str(self._client.create_run(experiment, run_name=kept.run_name, tags=tags).info.run_id)

    def _parent_id(self, experiment: str, sweep: str) -> str:
        """Return the id of a sweep's parent run, made by the first of its runs."""
        found = self._client.search_runs([experiment], filter_string=f"tags.`{_SWEEP_TAG}` = '{sweep}'")
        if found:
            return str(found[0].info.run_id)
        parent = str(self._client.create_run(experiment, run_name=sweep, tags={_SWEEP_TAG: sweep}).info.run_id)
        self._client.set_terminated(parent)
        return parent

    def _experiment_id(self, name: str) -> str:
        """Return MLflow's experiment of that name, made where there is none."""
        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None:
            return str(experiment.experiment_id)
        location = None
        if self.uri.startswith(_SQLITE):
            # MLflow's own default is ./mlruns of whoever starts first: keep a run's files beside its database.
            database = Path(self.uri.removeprefix(_SQLITE))
            location = (database.absolute().parent / "mlruns").as_uri()
        return str(self._client.create_experiment(name, artifact_location=location))

    def _send_rows(self, rows: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(key, value, round(row["at"] * 1000), row["step"])
            for row in rows
            for key, value in row.items()
            if key not in ("step", "at")
        ]
        if self._is_in_doubt:  # MLflow would record a figure twice
            run_id = self._outbox.contents.run_id
            known = {
                (key, metric.step)
                for key in {metric.key for metric in metrics}
                for metric in self._client.get_metric_history(run_id, key)
            }
            metrics = [metric for metric in metrics if (metric.key, metric.step) not in known]
        self._client.log_batch(self._outbox.contents.run_id, metrics=metrics)

    def _send_artifact(self, name: str) -> None:
        path, run_id = self._outbox.run_dir / name, self._outbox.contents.run_id
        if name == MODEL_NAME and path.is_dir():
            self._send_model(path)
        elif path.is_dir():
            self._client.log_artifacts(run_id, str(path), path.name)
        elif path.suffix == ".yaml":
            self._client.log_text(run_id, mask_secrets(path.read_text(encoding="utf-8")), path.name)
        elif path.is_file():
            self._client.log_artifact(run_id, str(path))

    def _send_model(self, folder: Path) -> None:
        """Send the model, register it where that is asked for, and remove it here: the weights are there already."""
        run_id, name = self._outbox.contents.run_id, self._outbox.contents.register_as
        self._client.log_artifacts(run_id, str(folder), MODEL_NAME)
        if name:
            if not self._client.search_registered_models(f"name = '{name}'"):
                self._client.create_registered_model(name)
            if not self._client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
                self._client.create_model_version(name, f"runs:/{run_id}/{MODEL_NAME}", run_id=run_id)
        shutil.rmtree(folder)

    def _send_status(self, status: str) -> None:
        run_id = self._outbox.contents.run_id
        if status == "RUNNING":
            self._client.update_run(run_id, status=status)
        else:
            self._client.set_terminated(run_id, status)


@contextmanager
def _time_to_store() -> Iterator[None]:
    """Wait longer for an answer: servers give it once they have passed the file on, as to S3. A user's limit stays."""
    is_ours = os.environ.get(_TIMEOUT) == _ANSWER_S
    if is_ours:
        os.environ[_TIMEOUT] = _STORE_S
    try:
        yield
    finally:
        if is_ours:
            os.environ[_TIMEOUT] = _ANSWER_S


def _to_remember(uri: str) -> str:
    """Return the URI as it may stand in the run folder, good in any working folder; nothing if it holds a secret."""
    if uri.startswith(_SQLITE):
        uri = f"{_SQLITE}{Path(uri.removeprefix(_SQLITE)).absolute()}"
    return uri if mask_secrets(uri) == uri else ""


def _batches(items: list[Any]) -> Iterator[list[Any]]:
    rest = iter(items)
    while some := list(islice(rest, _BATCH)):
        yield some
