import json
import socket

import pytest

from facetrain.config import TrackingConfig
from facetrain.tracking import Tracker
from facetrain.world import World

mlflow = pytest.importorskip("mlflow")


@pytest.fixture(autouse=True)
def _own_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_job_continues_its_run_and_logs_each_step_once(tmp_path):
    first = Tracker(TrackingConfig(), tmp_path, World(), parameters={"train.steps": 4, "data.workers": 1})
    for step in (1, 2):
        first.metrics(step, {"train/loss": 1.0 / step})
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 3, "tra')  # cut off by a crash

    again = Tracker(TrackingConfig(), tmp_path, World(), parameters={"train.steps": 4, "data.workers": 2})
    for step in (2, 3):
        again.metrics(step, {"train/loss": 1.0 / step})
    (tmp_path / "results.json").write_text("{}")
    again.artifacts(tmp_path / "results.json")
    again.finish()

    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("facetrain").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"train.steps": "4", "data.workers": "1"}
    assert run.data.tags["version.torch"]
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2, 3]
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["results.json"]


def test_a_server_that_is_not_there_stops_nothing(tmp_path, monkeypatch, caplog):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    tracker = Tracker(TrackingConfig(), tmp_path, World(), parameters={})
    tracker.metrics(1, {"train/loss": 1.0})
    tracker.finish()
    assert "training goes on" in caplog.text
    assert rows(tmp_path)[0]["train/loss"] == 1.0


def test_other_ranks_are_silent(tmp_path):
    tracker = Tracker(TrackingConfig(), tmp_path, World(rank=1, world_size=2), parameters={"a": 1})
    tracker.metrics(1, {"train/loss": 1.0})
    tracker.finish()
    assert not list(tmp_path.iterdir())
