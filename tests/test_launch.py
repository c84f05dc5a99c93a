"""The scripts in launch/, as a user starts them."""

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
import venv
from pathlib import Path

import pytest
from commands import CONFIG, ROOT, SCRIPTS, assert_user_error, facetrain, run


def launch(script: str, *words: str | Path, cwd: Path, **env: str):  # type: ignore[no-untyped-def]
    return run("bash", ROOT / "launch" / script, *words, cwd=cwd, **env)


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.name for script in SCRIPTS])
def test_a_script_is_valid_bash(script: Path) -> None:
    assert run("bash", "-n", script).returncode == 0


@pytest.mark.parametrize("script", ["torchrun.sh", "quickstart.sh", "sweep.sh"])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_a_script_says_how_it_is_called(script: str, flag: str, tmp_path: Path) -> None:
    done = launch(script, flag, cwd=tmp_path)
    assert done.returncode == 0
    assert f"  bash launch/{script} [-" in done.stdout or f"  bash launch/{script} --" in done.stdout
    assert "set -euo" not in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.name for script in SCRIPTS])
def test_a_script_holds_no_personal_path(script: Path) -> None:
    for word in ("/home/", "/root/", "/Users/", "git checkout", "git clone"):
        assert word not in script.read_text()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], ["--config"]),
        (["--"], ["--config"]),
        (["--config", "x.yaml"], ["--config", "--nproc-per-node"]),
        (["--nproc-per-node", "two", "--", "--config", "x.yaml"], ["--nproc-per-node", "'two'"]),
        (["--nproc-per-node"], ["--nproc-per-node"]),
        (["--", "--train.stepz", "3"], ["train.stepz"]),
        (["--nproc-per-node", "3", "--", "--train.global_pairs", "10"], ["train.global_pairs", "10", "3"]),
        (["--", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
    ],
)
def test_torchrun_names_what_is_wrong_before_any_process_starts(
    words: list[str], named: list[str], tmp_path: Path
) -> None:
    assert_user_error(launch("torchrun.sh", *words, cwd=tmp_path), *named)


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"NNODES": "2", "MASTER_ADDR": "localhost"}, ["NODE_RANK: expected the number of this machine"]),
        ({"NNODES": "2", "NODE_RANK": "0"}, ["MASTER_ADDR"]),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "localhost"}, ["NODE_RANK", "0 to 1"]),
        ({"NNODES": "4:2"}, ["NNODES", "'4:2'"]),
        ({"NNODES": "1-2"}, ["NNODES", "'1-2'"]),
        ({"RESTARTS": "often"}, ["RESTARTS", "'often'"]),
    ],
)
def test_torchrun_names_a_wrong_variable(env: dict[str, str], named: list[str], tmp_path: Path) -> None:
    done = launch("torchrun.sh", "--", "--config", CONFIG, cwd=tmp_path, **env)
    assert_user_error(done, *named)


def test_torchrun_checks_every_number_of_machines_that_there_may_be(tmp_path: Path) -> None:
    env = {"NNODES": "1:2", "NODE_RANK": "0", "MASTER_ADDR": "localhost"}
    words = ("--nproc-per-node", "3", "--", "--train.global_pairs", "9")
    assert_user_error(launch("torchrun.sh", *words, cwd=tmp_path, **env), "train.global_pairs", "9", "6 processes")


STAND_IN = """#!/usr/bin/env bash
case "$*" in
    *torch.distributed.run*) echo "${FACETRAIN_RESTART_COUNT:-0}" >>"$STARTS"; eval "$TORCHRUN" ;;
    *--show*) echo "$WAIT_S" ;;
esac
"""


@pytest.mark.parametrize(
    ("torchrun", "starts", "code"),
    [
        ("true", 1, 0),
        ("exit 1", 1, 1),  # its processes failed, and it has started them again itself
        ('echo lost >"$TORCHELASTIC_ERROR_FILE"; exit 1', 3, 1),
        ("kill -9 $$", 3, 137),
        ('trap "exit 1" TERM; kill -TERM "$PPID"; sleep 5 & wait; exit 0', 1, 1),
    ],
    ids=["ends", "fails", "is lost", "is killed", "is stopped"],
)
def test_torchrun_is_started_again_where_it_was_lost_itself(
    torchrun: str, starts: int, code: int, tmp_path: Path
) -> None:
    """With a stand-in for torchrun that ends as it may."""
    env = stand_in(tmp_path, torchrun)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        done = launch("torchrun.sh", "--", "--config", CONFIG, cwd=tmp_path, **env, MASTER_PORT=port)
    assert done.returncode == code, done.stderr
    restarts = (tmp_path / "starts").read_text().split()
    assert restarts == ["0", "1", "2"][:starts]


def stand_in(folder: Path, torchrun: str, wait_s: float = 600.0) -> dict[str, str]:
    """Put a stand-in for Python first on the PATH, and return the variables of machine 1 of two."""
    (folder / "bin").mkdir()
    (folder / "bin" / "python3").write_text(STAND_IN)
    (folder / "bin" / "python3").chmod(0o755)
    env = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "RESTARTS": "2", "TORCHRUN": torchrun}
    return env | {"FACETRAIN_VENV": str(folder), "STARTS": str(folder / "starts"), "WAIT_S": str(wait_s)}


def test_torchrun_starts_on_another_machine_once_machine_0_listens(tmp_path: Path) -> None:
    env = stand_in(tmp_path, "true")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        threading.Timer(3.0, listener.listen).start()
        began_at, port = time.monotonic(), str(listener.getsockname()[1])
        done = launch("torchrun.sh", "--", "--config", CONFIG, cwd=tmp_path, **env, MASTER_PORT=port)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began_at > 3
    assert (tmp_path / "starts").exists()


def test_torchrun_says_where_machine_0_was_waited_for_in_vain(tmp_path: Path) -> None:
    env = stand_in(tmp_path, "true", wait_s=2.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{silent.getsockname()[1]}"
        done = launch("torchrun.sh", "--", "--config", CONFIG, cwd=tmp_path, **env, MASTER_PORT=place.split(":")[1])
    assert done.returncode == 2, done.stderr
    assert f"facetrain: error: MASTER_ADDR: nothing listens at {place} after 2 s" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "starts").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_wait_for_machine_0(number: signal.Signals, tmp_path: Path) -> None:
    env = stand_in(tmp_path, "true")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        env |= {"MASTER_PORT": str(silent.getsockname()[1]), "OMP_NUM_THREADS": "1"}
        command = ["bash", str(ROOT / "launch" / "torchrun.sh"), "--", "--config", str(CONFIG)]
        heard = {each: signal.signal(each, signal.SIG_DFL) for each in (signal.SIGINT, signal.SIGHUP)}
        try:  # what a test runner in the background ignores, its children would ignore too
            script = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **env}, stderr=subprocess.PIPE)
        finally:
            for each, handler in heard.items():
                signal.signal(each, handler)
        with script:
            assert script.stderr is not None
            assert b"meets the others" in script.stderr.readline()
            script.send_signal(number)
            assert script.wait(30) == 143
    assert not (tmp_path / "starts").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--lfw-images", "here"], ["--lfw-images", "--pairs"]),
        (["--pairs", "nowhere.txt"], ["--pairs", "--lfw-images"]),
        (["--lfw-images", "nowhere", "--pairs", "nowhere.txt"], ["nowhere"]),
        (["--identities", "few"], ["--identities", "'few'"]),
        (["--lfw-images"], ["--lfw-images"]),
        (["--train.steps", "3"], ["--train.steps", "--"]),
    ],
)
def test_quickstart_names_a_wrong_argument_before_anything_is_made(
    words: list[str], named: list[str], tmp_path: Path
) -> None:
    assert_user_error(launch("quickstart.sh", *words, cwd=tmp_path), *named)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--config", "c.yaml"], ["--losses"]),
        (["--config", "c.yaml", "--losses", "npair-mc", "--pairs", "8"], ["--name"]),
        (["--loss", "npair-mc"], ["--loss:", "--losses"]),
        (["--name"], ["--name"]),
    ],
)
def test_sweep_names_a_missing_argument(words: list[str], named: list[str], tmp_path: Path) -> None:
    assert_user_error(launch("sweep.sh", *words, cwd=tmp_path), *named)


def test_a_dry_run_prints_the_script_of_the_job(tmp_path: Path) -> None:
    words = ("--nodes", "2", "--gpus-per-node", "4", "--partition", "gpu", "--time", "1:00:00", "--dry-run")
    done = facetrain("launch", "slurm", "--config", CONFIG, *words, "--", "--run.dir", "my run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    template = (ROOT / "launch" / "slurm.sbatch").read_text().splitlines()
    added = [line for line in done.stdout.splitlines() if line not in template]
    directives = ["--nodes=2", "--gpus-per-node=4", "--cpus-per-task=20", "--partition=gpu", "--time=1:00:00"]
    root, arguments = f"FACETRAIN_ROOT={ROOT}", f"set -- --config {CONFIG} --run.dir 'my run'"
    assert added == [*(f"#SBATCH {directive}" for directive in directives), root, arguments]
    assert [line for line in template if line not in done.stdout.splitlines()] == []
    (tmp_path / "job.sbatch").write_text(done.stdout)
    assert run("bash", "-n", tmp_path / "job.sbatch").returncode == 0


def test_what_can_not_be_launched_is_said_before_it_is_submitted(tmp_path: Path) -> None:
    config = ("launch", "slurm", "--config", CONFIG)
    wrong = facetrain(*config, "--dry-run", "--", "--train.stepz", "3", cwd=tmp_path)
    assert_user_error(wrong, "train.stepz")
    uneven = facetrain(*config, "--nodes", "7", "--gpus-per-node", "5", "--dry-run", cwd=tmp_path)
    assert_user_error(uneven, "train.global_pairs", "35")
    assert_user_error(facetrain(*config, cwd=tmp_path, PATH="/nowhere"), "sbatch: not found", "--dry-run")


@pytest.mark.slow
def test_the_doctor_measures_what_a_config_needs(tmp_path: Path) -> None:
    words = ("--doctor", "--nproc-per-node", "2", "--", "--config", CONFIG, "--data.shards", "nowhere")
    done = launch("torchrun.sh", *words, "--run.dir", "runs/new", cwd=tmp_path)
    assert done.returncode != 0
    found = {line[:20].strip(): line[21:] for line in done.stdout.splitlines()}
    assert "2 on 1 hosts" in found["ok    ranks"]
    assert found["ok    run folder"] == f"{tmp_path}: seen by all ranks"
    assert found["ok    lock"] == f"{tmp_path}: keeps a second job out"
    assert "no shards" in found["FAIL  shards"]
    assert "GB/s from each rank (gradients)" in done.stdout
    assert "us for an all-reduce of 4 bytes" in found["ok    latency"]
    assert "error: 1 of " in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_environment_without_the_package_is_named(tmp_path: Path) -> None:
    words = ("--", "--config", CONFIG)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to("/usr/bin/false")
    done = launch("torchrun.sh", *words, cwd=tmp_path, FACETRAIN_VENV=str(tmp_path))
    assert_user_error(done, "facetrain isn't installed", str(tmp_path))


def test_the_current_folder_does_not_pass_for_an_installation(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    venv.create(bare, symlinks=True)
    done = launch("sweep.sh", *SWEEP, cwd=ROOT, FACETRAIN_VENV=str(bare), PYTHONPATH="")
    assert_user_error(done, "facetrain isn't installed", str(bare), "torch")


SWEEP = ("--config", "nowhere.yaml", "--losses", "npair-mc", "--pairs", "8", "--name", "x")


@pytest.mark.parametrize(
    ("installed", "env", "taken"),
    [
        ([".venv/installed-package"], {"CONDA_PREFIX": "conda"}, ".venv"),
        ([".venv/lib/python3.12/site-packages/facetrain-0.1.0.dist-info"], {"CONDA_PREFIX": "conda"}, ".venv"),
        ([], {"CONDA_PREFIX": "conda"}, "conda"),
        ([".venv/installed-dev"], {"CONDA_PREFIX": "conda", "VIRTUAL_ENV": "active"}, "active"),
        ([".venv/installed-dev"], {"VIRTUAL_ENV": "active", "FACETRAIN_VENV": "own"}, "own"),
        ([], {}, ".venv"),
    ],
)
def test_the_environment_that_is_taken(installed: list[str], env: dict[str, str], taken: str, tmp_path: Path) -> None:
    """In a checkout whose environments are empty, so that the error names the one that was looked into."""
    (tmp_path / "launch").mkdir()
    for script in ("environment.sh", "sweep.sh"):
        shutil.copy(ROOT / "launch" / script, tmp_path / "launch")
    for file in installed:
        (tmp_path / file).mkdir(parents=True)
    env = {key: str(tmp_path / value) for key, value in env.items()}
    for folder in (".venv", "conda", "active", "own"):
        (tmp_path / folder / "bin").mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "bin" / "python3").symlink_to("/usr/bin/false")
    unset = {"FACETRAIN_VENV": "", "VIRTUAL_ENV": "", "CONDA_PREFIX": ""}
    done = run("bash", tmp_path / "launch" / "sweep.sh", *SWEEP, cwd=tmp_path, **{**unset, **env})
    assert_user_error(done, f"facetrain isn't installed in {tmp_path / taken},")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quickstart_trains_resumes_and_says_so(tmp_path: Path) -> None:
    small = ["--train.steps", "4", "--train.global_pairs", "8", "--train.warmup_steps", "0"]
    small += ["--mining.warmup_steps", "0", "--mining.lag_steps", "4", "--mining.batches_per_round", "2"]
    small += ["--data.holdout_identities", "20"]
    words = ("--identities", "60", "--", *small)
    env = {"CUDA_VISIBLE_DEVICES": ""}

    first = launch("quickstart.sh", *words, cwd=tmp_path, timeout_s=500, **env)
    assert first.returncode == 0, first.stdout + first.stderr
    table = {line.rsplit(maxsplit=2)[0]: line.split()[-2:] for line in first.stdout.splitlines() if line.endswith("%")}
    assert set(table) >= {"verification accuracy", "closed-full rank-1", "open-best-rowden DIR@FAR=1%"}
    for path in ("run/results.json", "run/model.safetensors", "run/figures", "mlflow.db"):
        assert (tmp_path / "quickstart" / path).exists(), path
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart"]

    again = launch("quickstart.sh", *words, cwd=tmp_path, timeout_s=200, **env)
    assert again.returncode == 0, again.stderr
    assert "is finished" in again.stderr + again.stdout

    wrong = launch("quickstart.sh", *words, "--train.stepz", "3", cwd=tmp_path, **env)
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
    assert "train.stepz" in wrong.stderr
    other = launch("quickstart.sh", *words, "--train.learning_rate", "1", cwd=tmp_path, **env)
    assert other.returncode == 2
    assert "train.learning_rate" in other.stderr
