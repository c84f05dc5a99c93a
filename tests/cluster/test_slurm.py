"""launch/slurm.sbatch on a real SLURM of two nodes."""

import sys
from pathlib import Path

import pytest
from cluster.slurm import Slurm, missing_program, start_slurm
from commands import ROOT
from safetensors.numpy import load_file

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    reason = missing_program()
    if reason:
        pytest.skip(reason)
    with start_slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def settings_of(synthetic: Path, run_dir: Path) -> list[str | Path]:
    settings: list[str | Path] = ["--run.dir", run_dir, "--data.shards", synthetic / "shards", "--data.image_px", "32"]
    settings += ["--train.global_pairs", "8", "--train.steps", "60", "--train.save_every_steps", "1000"]
    return [*settings, "--train.log_every_steps", "1", "--tracking.backend", "none"]


def submit(slurm: Slurm, settings: list[str | Path], log: Path) -> str:
    """Submit launch/slurm.sbatch itself."""
    variables = f"ALL,FACETRAIN_VENV={sys.prefix},NPROC_PER_NODE=1,FACETRAIN_ROOT={ROOT}"
    command = ["sbatch", "--parsable", "--nodes", "2", "--export", variables, "--output", log]
    return slurm.run(*command, ROOT / "launch" / "slurm.sbatch", *settings, cwd=log.parent)


def launch(slurm: Slurm, words: list[str | Path], cwd: Path) -> str:
    """Submit by `facetrain launch slurm`, and return the job's number."""
    (cwd / "empty.yaml").write_text("{}\n")
    command = [sys.executable, "-m", "facetrain", "launch", "slurm", "--config", "empty.yaml", "--nodes", "2", *words]
    slurm.environment.update(FACETRAIN_VENV=sys.prefix, NPROC_PER_NODE="1", PYTHONPATH=str(ROOT))
    said = slurm.run(*command, cwd=cwd)
    assert said.startswith("job ")
    return said.split()[1]


def test_a_job_of_two_nodes_trains_and_one_that_is_warned_goes_on_to_the_same_weights(slurm, synthetic, tmp_path):
    doctor = launch(slurm, ["--doctor", "--", *settings_of(synthetic, tmp_path / "run")], tmp_path)
    straight = launch(slurm, ["--", *settings_of(synthetic, tmp_path / "straight")], tmp_path)
    log = tmp_path / "warned.log"
    warned = submit(slurm, settings_of(synthetic, tmp_path / "warned"), log)
    for job in (doctor, straight):
        own_log = tmp_path / f"facetrain-{job}.log"
        assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED", own_log.read_text()
    said = (tmp_path / f"facetrain-{doctor}.log").read_text()
    assert "2 on 1 hosts" in said  # both nodes are this machine
    assert "FAIL" not in said
    of_ranks = [file.read_text() for file in (tmp_path / f"facetrain-{straight}").rglob("stderr.log")]
    assert sum("step     60/60" in text for text in of_ranks) == 1
    assert len(of_ranks) == 2

    while not log.exists() or "step      5/60" not in log.read_text():
        assert slurm.state(warned) in ("PENDING", "CONFIGURING", "RUNNING"), log.read_text()
    slurm.run("scancel", "--signal=USR1", "--batch", warned)
    slurm.wait(warned, "PENDING")
    assert "on request; the same command goes on from there" in log.read_text()
    slurm.wait_for_nodes()  # started again while its end is still being cleared up, a job fails
    slurm.run("scontrol", "update", f"jobid={warned}", "StartTime=now")  # SLURM lets a requeued job wait two minutes
    assert slurm.wait(warned, "COMPLETED", "FAILED") == "COMPLETED", log.read_text()
    assert "continues at step" in log.read_text()

    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("straight", "warned")]
    for name, expected in weights[0].items():
        assert weights[1][name].tobytes() == expected.tobytes(), name
