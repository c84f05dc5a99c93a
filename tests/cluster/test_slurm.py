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


def submit(slurm: Slurm, synthetic: Path, run_dir: Path, *more: str) -> str:
    settings = ["--run.dir", run_dir, "--data.shards", synthetic / "shards", "--data.image_px", "32"]
    settings += ["--train.global_pairs", "8", "--train.steps", "60", "--train.save_every_steps", "1000"]
    settings += ["--train.log_every_steps", "1", "--tracking.backend", "none", *more]
    variables = f"ALL,FACETRAIN_VENV={sys.prefix},NPROC_PER_NODE=1"
    log = run_dir.with_suffix(".log")
    command = ["sbatch", "--parsable", "--nodes", "2", "--export", variables, "--output", log]
    return slurm.run(*command, "launch/slurm.sbatch", *settings, cwd=ROOT)


def test_a_job_of_two_nodes_trains_and_one_that_is_warned_goes_on_to_the_same_weights(slurm, synthetic, tmp_path):
    straight = submit(slurm, synthetic, tmp_path / "straight")
    assert slurm.wait(straight, "COMPLETED", "FAILED") == "COMPLETED", (tmp_path / "straight.log").read_text()

    warned = submit(slurm, synthetic, tmp_path / "warned")
    log = tmp_path / "warned.log"
    while not log.exists() or "step      5/60" not in log.read_text():
        assert slurm.state(warned) in ("PENDING", "CONFIGURING", "RUNNING"), log.read_text()
    slurm.run("scancel", "--signal=USR1", "--batch", warned)
    slurm.wait(warned, "PENDING")
    assert "on request; the same command goes on from there" in log.read_text()
    slurm.run("scontrol", "update", f"jobid={warned}", "StartTime=now")  # SLURM lets a requeued job wait two minutes
    assert slurm.wait(warned, "COMPLETED", "FAILED") == "COMPLETED", log.read_text()
    assert "continues at step" in log.read_text()

    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("straight", "warned")]
    for name, expected in weights[0].items():
        assert weights[1][name].tobytes() == expected.tobytes(), name
