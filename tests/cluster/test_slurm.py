"""launch/slurm.sbatch on a real SLURM of two nodes."""

import sys
import time
from pathlib import Path

import pytest
from cluster.measure import same_weights
from cluster.slurm import Slurm, missing_program, start_slurm
from commands import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

STEPS = 100


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    reason = missing_program()
    if reason:
        pytest.skip(reason)
    with start_slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def straight(slurm, synthetic, tmp_path_factory) -> Path:
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("straight")
    job = launch(slurm, ["--", *settings_of(synthetic, folder / "run")], folder)
    log = folder / f"facetrain-{job}.log"
    assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED", log.read_text()
    of_ranks = [file.read_text() for file in (folder / f"facetrain-{job}").rglob("stderr.log")]
    assert sum(f"step {STEPS:6}/{STEPS}" in text for text in of_ranks) == 1
    assert len(of_ranks) == 2
    return folder / "run"


def settings_of(synthetic: Path, run_dir: Path, *, save_every_steps: int = 1000) -> list[str | Path]:
    settings: list[str | Path] = ["--run.dir", run_dir, "--data.shards", synthetic / "shards", "--data.image_px", "32"]
    settings += ["--train.global_pairs", "8", "--train.steps", str(STEPS)]
    settings += ["--train.save_every_steps", str(save_every_steps)]
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


def wait_for(slurm: Slurm, job: str, log: Path, words: str) -> None:
    """Wait for words in the log of a job that runs, or is about to."""
    asked_at, give_up_at = 0.0, time.monotonic() + 600
    while not log.exists() or words not in log.read_text():
        if time.monotonic() > asked_at + 1:
            state, asked_at = slurm.state(job), time.monotonic()
            said = log.read_text() if log.exists() else "no log"
            assert state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), said
            assert time.monotonic() < give_up_at, said
        time.sleep(0.02)


def assert_comes_through(slurm: Slurm, job: str, log: Path, run_dir: Path, straight: Path) -> None:
    assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED", log.read_text()
    assert "continues at step" in log.read_text()
    assert same_weights(run_dir, straight)


def test_the_doctor_looks_at_two_nodes(slurm, synthetic, tmp_path):
    doctor = launch(slurm, ["--doctor", "--", *settings_of(synthetic, tmp_path / "run")], tmp_path)
    log = tmp_path / f"facetrain-{doctor}.log"
    assert slurm.wait(doctor, "COMPLETED", "FAILED") == "COMPLETED", log.read_text()
    assert "2 on 1 hosts" in log.read_text()  # both nodes are this machine
    assert "FAIL" not in log.read_text()


def test_a_job_that_is_warned_goes_on_to_the_same_weights(slurm, synthetic, straight, tmp_path):
    log, run_dir = tmp_path / "job.log", tmp_path / "run"
    job = submit(slurm, settings_of(synthetic, run_dir), log)
    wait_for(slurm, job, log, f"step      5/{STEPS}")
    slurm.run("scancel", "--signal=USR1", "--batch", job)
    slurm.start_again(job)
    assert "on request; the same command goes on from there" in log.read_text()
    assert_comes_through(slurm, job, log, run_dir, straight)


def test_a_job_that_is_warned_before_it_trains_is_queued_again(slurm, synthetic, straight, tmp_path):
    log, run_dir = tmp_path / "job.log", tmp_path / "run"
    job = submit(slurm, settings_of(synthetic, run_dir), log)
    give_up_at = time.monotonic() + 120
    while not (tmp_path / f"facetrain-{job}").is_dir():  # then it takes seconds to check the config
        assert time.monotonic() < give_up_at
        time.sleep(0.02)
    time.sleep(0.3)
    slurm.run("scancel", "--signal=USR1", "--batch", job)
    slurm.start_again(job)
    assert not run_dir.exists()
    assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED", log.read_text()
    assert same_weights(run_dir, straight)


def test_a_job_that_makes_room_for_another_goes_on_after_it(slurm, synthetic, straight, tmp_path):
    log, run_dir = tmp_path / "job.log", tmp_path / "run"
    job = submit(slurm, settings_of(synthetic, run_dir), log)
    wait_for(slurm, job, log, f"step      5/{STEPS}")
    options = ["--partition", "high", "--nodes", "2", "--exclusive", "--output", "/dev/null"]
    urgent = slurm.run("sbatch", "--parsable", *options, "--wrap", "sleep 3")
    assert slurm.wait(urgent, "COMPLETED", "FAILED") == "COMPLETED"
    assert "on request; the same command goes on from there" in log.read_text()
    slurm.start_again(job)
    assert_comes_through(slurm, job, log, run_dir, straight)


def test_a_job_that_is_cancelled_saves_and_the_next_goes_on(slurm, synthetic, straight, tmp_path):
    log, run_dir = tmp_path / "job.log", tmp_path / "run"
    job = submit(slurm, settings_of(synthetic, run_dir), log)
    wait_for(slurm, job, log, f"step      5/{STEPS}")
    slurm.run("scancel", job)
    slurm.wait(job, "CANCELLED")
    slurm.wait_for_nodes()
    assert "on request; the same command goes on from there" in log.read_text()
    job = submit(slurm, settings_of(synthetic, run_dir), log)
    assert_comes_through(slurm, job, log, run_dir, straight)


def test_a_job_whose_node_dies_goes_on_when_there_is_another(slurm, synthetic, straight, tmp_path):
    log, run_dir = tmp_path / "job.log", tmp_path / "run"
    job = submit(slurm, settings_of(synthetic, run_dir, save_every_steps=10), log)
    wait_for(slurm, job, log, f"step     15/{STEPS}")
    slurm.kill_node("n2")
    slurm.wait(job, "PENDING")
    slurm.start_node("n2")
    # SLURM tells the node a minute later what it couldn't tell it before: to end this job.
    slurm.start_again(job, after_s=65)
    assert_comes_through(slurm, job, log, run_dir, straight)
