import http.server
import json
import os
import shutil
import sys
import threading
import time

import pytest
from commands import ROOT, run
from distributed.ranks import run_ranks
from mlflow_server import free_port, mlflow_server, wait_until
from proxy import TcpProxy

from facetrain.config import TrackingConfig
from facetrain.tracking import Tracker, environment, lacks_results, sync
from facetrain.tracking import tracker as tracker_module
from facetrain.tracking.mlflow_store import MlflowStore
from facetrain.tracking.outbox import Outbox
from facetrain.world import World

mlflow = pytest.importorskip("mlflow")


@pytest.fixture(autouse=True)
def _own_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr(tracker_module, "CLOSE_WAIT_S", 300.0)  # a busy machine takes its time to make a database


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_job_continues_its_run_and_logs_each_step_once(tmp_path):
    (tmp_path / "logs").mkdir()
    parameters = {"train.steps": 4, "data.workers": 1, "data.shards": "https://me:pass@host/faces"}
    first = Tracker(TrackingConfig(), tmp_path, World(), parameters=parameters)
    for step in (1, 2):
        first.metrics(step, {"train/loss": 1.0 / step})
    first.finish(status="KILLED")
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 3, "tra')  # cut off by a crash

    again = Tracker(TrackingConfig(), tmp_path, World(), parameters={"train.steps": 4, "data.workers": 2})
    for step in (2, 3):
        again.metrics(step, {"train/loss": 1.0 / step})
    (tmp_path / "results.json").write_text("{}")
    again.finish()

    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("facetrain").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"train.steps": "4", "data.workers": "1", "data.shards": "https://***@host/faces"}
    assert run.data.tags["version.torch"]
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2, 3]


class BadServer(http.server.ThreadingHTTPServer):
    """Takes every request, and either never answers or answers 500."""

    daemon_threads = True

    def __init__(self, behaviour):
        super().__init__(("127.0.0.1", 0), _BadAnswers)
        self.behaviour = behaviour
        self.closing = threading.Event()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return f"http://me:secret@127.0.0.1:{self.server_address[1]}"

    def __exit__(self, *_):
        self.closing.set()
        self.shutdown()
        self.server_close()


class _BadAnswers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.server.behaviour == "hangs":
            self.server.closing.wait()
        else:
            self.send_error(500)

    do_POST = do_GET  # noqa: N815 - the library's name

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("behaviour", ["hangs", "answers 500", "isn't there"])
def test_a_bad_server_stops_no_training_and_another_gets_all_of_it_later(tmp_path, monkeypatch, caplog, behaviour):
    sqlite = os.environ["MLFLOW_TRACKING_URI"]
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with BadServer(behaviour) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri if behaviour != "isn't there" else "http://127.0.0.1:9")
        tracker = Tracker(TrackingConfig(), tmp_path, World(), parameters={"train.steps": 4})
        for step in range(300):
            tracker.metrics(step, {"train/loss": 1.0, "train/grad_norm": 2.0})
        (tmp_path / "results.json").write_text("{}")
        monkeypatch.setattr(tracker_module, "write_model", lambda run_dir: run_dir / "results.json")
        tracker.results()
        tracker.finish()
        assert "secret" not in tracker.where()
    assert "training goes on" in caplog.text
    assert f"`facetrain sync {tmp_path}`" in caplog.text
    assert "secret" not in caplog.text
    assert len(rows(tmp_path)) == 300

    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite)
    for _ in range(2):  # the second time there is nothing left
        sync(tmp_path)
    run, history = tracked_run()
    assert [metric.step for metric in history] == list(range(300))
    assert run.info.status == "FINISHED"
    assert [file.path for file in mlflow.MlflowClient().list_artifacts(run.info.run_id)] == ["results.json"]


def test_a_run_that_was_killed_when_it_had_finished_is_completed_later(tmp_path, monkeypatch):
    tracker = Tracker(TrackingConfig(), tmp_path, World(), parameters={"train.steps": 4})
    tracker.metrics(4, {"train/loss": 1.0})
    assert not lacks_results(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    tracker.finish()  # so that its thread ends
    assert not lacks_results(tmp_path)
    Outbox.open(tmp_path).update(status="RUNNING", sent_status="RUNNING")  # as a kill before results() leaves it
    assert lacks_results(tmp_path)
    monkeypatch.setattr(tracker_module, "write_model", lambda run_dir: run_dir / "results.json")
    sync(tmp_path)
    assert not lacks_results(tmp_path)
    run, _ = tracked_run()
    assert run.info.status == "FINISHED"
    assert [file.path for file in mlflow.MlflowClient().list_artifacts(run.info.run_id)] == ["results.json"]


def test_a_damaged_line_of_figures_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "at": 2.0, "train/loss": 1.0}\n{"step": 2, "tra\n{"step": 3}\n'
    )
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: expected a line of figures and their step, as JSON"):
        Tracker(TrackingConfig(backend="none"), tmp_path, World(), parameters={})


def test_what_is_remembered_of_logged_steps_does_not_grow(tmp_path):
    tracker = Tracker(TrackingConfig(backend="none"), tmp_path, World(), parameters={})
    for step in (1, 2, 2, 3):
        tracker.metrics(step, {"train/loss": 1.0, "train/grad_norm": 2.0})
    assert list(tracker._logged) == [3]
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


def test_figures_that_could_not_be_written_are_written_at_the_end(tmp_path, caplog):
    tracker = Tracker(TrackingConfig(backend="none"), tmp_path, World(), parameters={})
    (tmp_path / "metrics.jsonl").mkdir()  # stands in the way, as a full disk does
    tracker.metrics(1, {"train/loss": 1.0})
    assert "kept for the next time" in caplog.text
    (tmp_path / "metrics.jsonl").rmdir()
    tracker.finish(status="KILLED")
    assert [row["step"] for row in rows(tmp_path)] == [1]


def test_the_end_waits_for_a_server_no_longer_than_it_may(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tracker_module, "CLOSE_WAIT_S", 0.1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3600")
    with BadServer("hangs") as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        tracker = Tracker(TrackingConfig(), tmp_path, World(), parameters={"train.steps": 4})
        tracker.metrics(1, {"train/loss": 1.0})
        tracker.finish()  # comes back though no answer ever came
        assert "MLflow lacks some of this run" in caplog.text


def test_recording_a_step_opens_one_file_and_never_waits_for_a_server(tmp_path, monkeypatch):
    """What a step pays for MLflow, whatever its server does: the calls of the thread that trains, counted."""
    seen, is_counting, trains = [], True, threading.get_ident()

    def count(event, arguments):
        if is_counting and threading.get_ident() == trains and event.split(".")[0] in ("open", "socket", "subprocess"):
            seen.append((event, str(arguments[0])))

    sys.addaudithook(count)  # for as long as this process lives, hence the flag
    with BadServer("hangs") as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        tracker = Tracker(TrackingConfig(), tmp_path, World(), parameters={"train.steps": 4})
        seen.clear()
        for step in range(50):
            tracker.metrics(step, {"train/loss": 1.0})
        is_counting = False
        tracker.finish()
    assert seen == [("open", str(tmp_path / "metrics.jsonl"))] * 50


class _SlowStore(http.server.BaseHTTPRequestHandler):
    """Answers to a file as a server does that passes it on: after some seconds."""

    def do_PUT(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(4.0)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_a_server_may_take_its_time_to_store_a_file(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    (tmp_path / "logs").mkdir()
    (tmp_path / "results.json").write_text("{}")
    outbox = Outbox.start(tmp_path, experiment="slow", run_name="a", parameters={}, tags={})
    outbox.add_artifact(tmp_path / "results.json")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _SlowStore) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        location = f"http://127.0.0.1:{server.server_address[1]}/files"
        mlflow.MlflowClient().create_experiment("slow", artifact_location=location)
        MlflowStore(outbox).send()
        server.shutdown()
    assert outbox.is_empty()


def test_a_run_whose_files_cannot_be_stored_is_finished_all_the_same(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "results.json").write_text("{}")
    outbox = Outbox.start(tmp_path, experiment="facetrain", run_name="a", parameters={}, tags={})
    outbox.add_artifact(tmp_path / "results.json")
    outbox.update(status="FINISHED")
    mlflow.MlflowClient().create_experiment("facetrain", artifact_location="http://127.0.0.1:9/files")
    with pytest.raises(Exception, match=r"127\.0\.0\.1"):
        MlflowStore(outbox).send()
    run, _ = tracked_run()
    assert run.info.status == "FINISHED"
    assert outbox.contents.artifacts == ["results.json"]


def tracked_run():
    """Return the one run that MLflow knows, and what it was told of its loss."""
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("facetrain").experiment_id])
    return run, client.get_metric_history(run.info.run_id, "train/loss")


@pytest.mark.slow
def test_a_server_killed_and_started_again_and_answers_that_are_lost_leave_one_run_with_each_figure_once(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(tracker_module, "RETRY_AFTER_S", 0.2)
    monkeypatch.setattr(tracker_module, "CLOSE_WAIT_S", 10.0)
    port = free_port()
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")

    tracker = Tracker(TrackingConfig(), run_dir, World(), parameters={"train.steps": 4})  # down at the start
    tracker.metrics(1, {"train/loss": 1.0})
    assert not Outbox.open(run_dir).is_empty()
    for step in (2, 3):  # up, then killed in the middle, and up again
        with mlflow_server(port, tmp_path):
            tracker.metrics(step, {"train/loss": 1.0})
            wait_until(lambda: Outbox.open(run_dir).is_empty())
        tracker.metrics(10 + step, {"train/loss": 1.0})
    tracker.finish()  # down at the end
    assert not Outbox.open(run_dir).is_empty()

    with mlflow_server(port, tmp_path), TcpProxy(port) as proxy:
        proxy.num_lost = 3
        again = Tracker(TrackingConfig(), run_dir, World(), parameters={"train.steps": 4})
        again.metrics(20, {"train/loss": 1.0})
        again.finish()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{proxy.port}")
        other = tmp_path / "other"
        other.mkdir()
        lossy = Tracker(TrackingConfig(experiment="lossy"), other, World(), parameters={"train.steps": 4})
        for step in range(5):
            lossy.metrics(step, {"train/loss": 1.0})
        wait_until(lambda: Outbox.open(other).is_empty())
        lossy.finish()
        assert proxy.num_lost == 0

        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        run, history = tracked_run()
        assert [metric.step for metric in history] == [1, 2, 12, 3, 13, 20]
        assert run.info.status == "FINISHED"
        client = mlflow.MlflowClient()
        (run,) = client.search_runs([client.get_experiment_by_name("lossy").experiment_id])
        history = client.get_metric_history(run.info.run_id, "train/loss")
        assert [metric.step for metric in history] == list(range(5))


def test_a_tag_that_is_added_while_others_are_sent_arrives(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    outbox = Outbox.start(tmp_path, experiment="facetrain", run_name="a", parameters={"b": 1}, tags={"c": "1"})
    log_batch = mlflow.MlflowClient.log_batch

    def log_batch_while_a_tag_is_added(client, *args, **kwargs):
        log_batch(client, *args, **kwargs)
        if kwargs.get("tags"):
            monkeypatch.setattr(mlflow.MlflowClient, "log_batch", log_batch)
            outbox.update(tags={**outbox.contents.tags, "late": "2"}, is_described=False)

    store = MlflowStore(outbox)
    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", log_batch_while_a_tag_is_added)
    for _ in range(2):
        store.send()
    assert outbox.is_empty()
    run = mlflow.MlflowClient().get_run(outbox.contents.run_id)
    assert {key: run.data.tags.get(key) for key in ("c", "late")} == {"c": "1", "late": "2"}


def test_a_run_is_sent_where_it_was_logged_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///here.db")
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run_dir.mkdir()
    elsewhere.mkdir()
    tracker = Tracker(TrackingConfig(), run_dir, World(), parameters={"train.steps": 4})
    tracker.finish()
    monkeypatch.chdir(elsewhere)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert sync(run_dir).startswith(f"sqlite:///{tmp_path}/here.db, run ")
    Tracker(TrackingConfig(), run_dir, World(), parameters={}).finish()
    assert list(elsewhere.iterdir()) == []

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    Outbox.open(run_dir).update(is_described=False)
    message = (
        rf"sqlite:///other\.db doesn't know run \w+; expected where that was logged, sqlite:///{tmp_path}/here\.db"
    )
    with pytest.raises(OSError, match=message):
        sync(run_dir)


def test_where_a_run_was_logged_is_not_kept_with_a_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    (tmp_path / "logs").mkdir()
    outbox = Outbox.start(tmp_path, experiment="e", run_name="a", parameters={}, tags={})
    with pytest.raises(Exception, match=r"127\.0\.0\.1"):
        MlflowStore(outbox).send()
    assert "secret" not in (tmp_path / "logs" / "tracking.json").read_text()


def test_packages_that_are_not_installed_under_their_usual_names_have_no_version(monkeypatch):
    monkeypatch.setattr(environment, "_PACKAGES", ("torch", "no-such-package"))
    assert [tag for tag in environment.environment_tags() if tag.startswith("version.")] == ["version.torch"]


def test_the_revision_is_that_of_the_package_not_of_a_checkout_around_it(tmp_path):
    package = tmp_path / "venv" / "facetrain"
    shutil.copytree(ROOT / "facetrain", package)
    git = ("git", "-c", "user.name=me", "-c", "user.email=me@here")
    code = "from facetrain.tracking.environment import environment_tags as e; print('git_commit' in e())"

    def has_revision():
        return run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(package.parent)).stdout.strip()

    for words in (("init", "-q"), ("commit", "-q", "--allow-empty", "-m", "mine")):
        run(*git, *words, cwd=tmp_path)
    assert has_revision() == "False"
    for words in (("add", "venv"), ("commit", "-q", "-m", "its own")):
        run(*git, *words, cwd=tmp_path)
    assert has_revision() == "True"


def track(world, folder):
    tracker = Tracker(TrackingConfig(backend="none"), folder, world, parameters={"a": 1})
    tracker.metrics(1, {"train/loss": 1.0 + world.rank})
    tracker.finish()


def test_other_ranks_are_silent(tmp_path):
    run_ranks(track, 2, tmp_path)
    assert [row["train/loss"] for row in rows(tmp_path)] == [1.0]


def fail_to_track(world, folder):
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: expected a line of figures"):
        track(world, folder)
    return True


def test_a_damaged_line_of_figures_ends_all_ranks(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("cut\n")
    assert run_ranks(fail_to_track, 2, tmp_path, timeout_s=60.0) == [True, True]
