"""The scripts in launch/, as a user starts them."""

from pathlib import Path

import pytest
from commands import CONFIG, ROOT, SCRIPTS, assert_user_error, facetrain, run


def launch(script: str, *words: str | Path, cwd: Path, **env: str):  # type: ignore[no-untyped-def]
    return run("bash", ROOT / "launch" / script, *words, cwd=cwd, **env)


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.name for script in SCRIPTS])
def test_a_script_is_valid_bash(script: Path) -> None:
    assert run("bash", "-n", script).returncode == 0


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
    *torch.distributed.run*) echo started >>"$STARTS"; eval "$TORCHRUN" ;;
    *--show*) echo 600.0 ;;
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
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text(STAND_IN)
    (tmp_path / "bin" / "python3").chmod(0o755)
    env = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "localhost", "RESTARTS": "2", "TORCHRUN": torchrun}
    env |= {"FACETRAIN_VENV": str(tmp_path), "STARTS": str(tmp_path / "starts")}
    done = launch("torchrun.sh", "--", "--config", CONFIG, cwd=tmp_path, **env)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "starts").read_text().count("started") == starts


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
