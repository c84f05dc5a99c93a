"""What a finished run leaves in MLflow: its page, and a model to be loaded."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import run as run_command
from test_train import flags, send_what_is_left

import facetrain
from facetrain.cli import main
from facetrain.tracking import sync

mlflow = pytest.importorskip("mlflow")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("model in MLflow")]  # one run is trained for all


def train(synthetic: Path, run_dir: Path, **more: object) -> None:
    """Train two steps, in a process of their own, as part of a sweep; MLflow has all of it then."""
    settings = {"mining__mode": "off", "train__steps": 2, "train__save_every_steps": 2, "tracking__backend": "mlflow"}
    settings |= {"data__holdout_identities": 24, "data__workers": 0, "tracking__sweep": "losses", **more}
    store = f"sqlite:///{run_dir.parent}/mlflow.db"
    command = (sys.executable, "-m", "facetrain", "train", *flags(synthetic, run_dir, **settings))
    done = run_command(*command, cwd=run_dir.parent, timeout_s=280, MLFLOW_TRACKING_URI=store)
    assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", store)
        send_what_is_left(run_dir, done.stderr)


@pytest.fixture(scope="module")
def finished(synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    train(synthetic, folder / "a", tracking__register_as="faces")
    return folder / "a"


@pytest.fixture
def client(finished: Path, monkeypatch: pytest.MonkeyPatch) -> "mlflow.MlflowClient":
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{finished.parent}/mlflow.db")
    return mlflow.MlflowClient()


def test_the_runs_of_a_sweep_stand_under_one_run(
    client: "mlflow.MlflowClient", finished: Path, synthetic: Path
) -> None:
    train(synthetic, finished.parent / "b", loss__name="npair-ovo")
    runs = client.search_runs([client.get_experiment_by_name("facetrain").experiment_id])
    by_name = {run.info.run_name: run for run in runs}
    assert set(by_name) == {"losses", "a", "b"}
    for name in ("a", "b"):
        assert by_name[name].data.tags["mlflow.parentRunId"] == by_name["losses"].info.run_id


def test_the_page_of_a_run_has_card_config_and_model(client: "mlflow.MlflowClient") -> None:
    (version,) = client.search_model_versions("name = 'faces'")
    tracked = client.get_run(version.run_id)
    assert len(tracked.data.params["data.manifest_sha256"]) == 64
    assert "## Results" in tracked.data.tags["mlflow.note.content"]
    assert client.get_run(tracked.data.tags["mlflow.parentRunId"]).info.run_name == "losses"
    kept = {file.path for file in client.list_artifacts(version.run_id)}
    assert kept >= {"config.yaml", "results.json", "model_card.md", "model"}


def test_the_registered_model_embeds_as_the_run_does(
    client: "mlflow.MlflowClient", finished: Path, synthetic: Path, tmp_path: Path
) -> None:
    pandas = pytest.importorskip("pandas")
    pictures = sorted((synthetic / "faces" / "heldout").rglob("*.jpg"))[:3]
    model = mlflow.pyfunc.load_model("models:/faces/1")
    found = model.predict(pandas.DataFrame({"image": [picture.read_bytes() for picture in pictures]}))
    np.testing.assert_array_equal(found, facetrain.load(finished, device="cpu").embed(pictures))
    (column,) = model.metadata.get_input_schema().inputs
    assert column.name == "image"
    example = model.metadata.load_input_example(mlflow.artifacts.download_artifacts("models:/faces/1"))
    assert model.predict(example).shape == (1, found.shape[1])


def test_a_run_is_registered_later_and_once(
    client: "mlflow.MlflowClient", finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        main(["sync", str(finished), "--register", "later"])
    assert len(client.search_model_versions("name = 'later'")) == 1
    with pytest.raises(ValueError, match="not finished"):
        sync_unfinished(finished)


def sync_unfinished(finished: Path) -> None:
    weights = finished / "model.safetensors"
    aside = weights.rename(finished / "aside")
    try:
        sync(finished, register_as="x")
    finally:
        aside.rename(weights)


def test_the_model_loads_where_facetrain_is_not_installed(
    client: "mlflow.MlflowClient", finished: Path, tmp_path: Path
) -> None:
    folder = mlflow.artifacts.download_artifacts("models:/faces/1", dst_path=str(tmp_path))
    code = (
        "import sys; sys.path[:] = [p for p in sys.path if not __import__('os').path.isdir(p + '/facetrain')];"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in repr(f)];"
        "import mlflow.pyfunc; model = mlflow.pyfunc.load_model(sys.argv[1]);"
        "print(model.predict(model.metadata.load_input_example(sys.argv[1])).shape);"
        "import facetrain; print(facetrain.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, folder], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    shape, file = done.stdout.splitlines()[-2:]
    assert shape.startswith("(1, ")
    assert str(tmp_path) in file
