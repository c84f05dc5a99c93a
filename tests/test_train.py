"""The run as a user starts it: torchrun, interruption, resume, and what it says when it can't."""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from commands import assert_user_error, facetrain, kill, run, started_job, wait_until
from safetensors.numpy import load_file

from facetrain.cli import main
from facetrain.command_line import config_yaml, load_config
from facetrain.tracking import sync


def flags(synthetic: Path, run_dir: Path, **more: object) -> list[str]:
    """A run of seconds: a small network input, 8 pairs a step, mining from step 4 on."""
    settings = {
        "run.dir": run_dir,
        "data.shards": synthetic / "shards",
        "data.image_px": 32,
        "data.crop_jitter_px": 4,
        "train.global_pairs": 8,
        "train.steps": 16,
        "train.save_every_steps": 4,
        "train.log_every_steps": 2,
        "mining.mode": "gathered",
        "mining.warmup_steps": 4,
        "mining.batches_per_round": 3,
        "mining.lag_steps": 4,
        "tracking.backend": "none",
    } | {key.replace("__", "."): value for key, value in more.items()}
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def training(world_size: int, *words: str) -> list[str]:
    """The command of a training: a process by itself, or several by torchrun, which takes seconds more."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    return [sys.executable, *(launcher if world_size > 1 else ()), "-m", "facetrain.train", *words]


def train(world_size: int, *words: str, cwd: Path) -> str:
    done = run(*training(world_size, *words), cwd=cwd, timeout_s=240)
    assert done.returncode == 0, done.stderr
    return done.stderr


def send_what_is_left(run_dir: Path, said: str) -> None:
    """Send what a run says that MLflow lacks: on a slow machine its end doesn't wait for all of it to arrive."""
    assert "MLflow failed" not in said
    assert "MLflow gets no" not in said
    if "MLflow lacks some of this run" in said:
        sync(run_dir)


@contextmanager
def one_core() -> Iterator[None]:
    """Processes that are started inside have one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def weights(run_dir: Path) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in load_file(run_dir / "model.safetensors").items()}


@pytest.mark.long
@pytest.mark.parametrize(
    ("world_size", "more"),
    [
        pytest.param(
            2,
            {"train__zero_stage": 2, "train__precision": "bfloat16", "data__workers": 1},
            marks=pytest.mark.slow,
        ),
        (
            1,
            {
                "train__optimizer": "sgd",
                "train__learning_rate": 0.01,
                "data__workers": 0,
                "train__clip_norm": 1.0,
                "train__micro_pairs": 2,
            },
        ),
        pytest.param(
            2,
            {
                "mining__mode": "table",
                "mining__table_neighbours": 8,
                "mining__table_max_age_steps": 6,  # some classes are always left out
                "train__async_checkpoint": True,
                "data__workers": 0,
                "model__norm": "none",
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["two-ranks-zero2-adamw-bf16", "one-rank-sgd", "two-ranks-table-async"],
)
def test_resume_equals_no_interruption_to_the_bit(synthetic, tmp_path, world_size, more):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = more | {"train__steps": 24}  # long enough to be killed in the middle
    train(world_size, *flags(synthetic, whole, **more), cwd=tmp_path)

    with started_job(*training(world_size, *flags(synthetic, cut, **more)), log=tmp_path / "cut.log") as job:
        wait_until((cut / "checkpoints" / "step-00000008").exists, job)
        kill(job)
    output = train(world_size, *flags(synthetic, cut, **more), cwd=tmp_path)
    assert "continues at step" in output
    assert weights(cut) == weights(whole)
    metrics = [json.loads(line) for line in (cut / "metrics.jsonl").read_text().splitlines()]
    logged = [row["step"] for row in metrics if "train/loss" in row]
    assert logged == sorted(set(logged))  # what ran twice is logged once

    finished = train(world_size, *flags(synthetic, cut, **more), cwd=tmp_path)
    assert f"{cut} is finished" in finished


@pytest.mark.slow
def test_one_process_without_a_launcher_trains_at_zero_3(synthetic, tmp_path):
    output = train(1, *flags(synthetic, tmp_path / "run", train__steps=2, train__zero_stage=3), cwd=tmp_path)
    assert re.search(r"casianet: [1-9]\.\d\d million parameters", output)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_at_one_step_with_a_checkpoint(synthetic, tmp_path):
    words = flags(synthetic, tmp_path / "run", train__steps=100_000, train__save_every_steps=100_000)
    log = tmp_path / "job.log"
    with started_job(*training(2, *words), log=log) as job:
        wait_until(lambda: "step     10/" in log.read_text(), job)
        job.children()[-1].terminate()
        assert job.wait(timeout=60) == 0
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert f"stopped at step {int(checkpoint.name.removeprefix('step-'))} on request" in log.read_text()
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.slow
def test_ranks_without_batch_statistics_train_the_same_network(synthetic, tmp_path):
    """Updates agree but for rounding, which a flipped ReLU or maximum makes some thousandths; a wrong factor is 0.5."""
    more = {"model__norm": "none", "mining__mode": "off", "data__workers": 0}
    more |= {"train__optimizer": "sgd", "train__learning_rate": 0.01}  # AdamW blows up rounding of gradients near 0
    for name, world_size, steps in (("start", 1, 0), ("one", 1, 6), ("two", 2, 6)):
        train(world_size, *flags(synthetic, tmp_path / name, train__steps=steps, **more), cwd=tmp_path)
    start, one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "one", "two"))
    for name in one:
        update = np.linalg.norm(one[name] - start[name])
        assert update > 0
        assert np.linalg.norm(one[name] - two[name]) < 0.02 * update, name


@pytest.mark.slow
def test_a_run_leaves_all_that_the_next_command_needs(synthetic, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    evaluation = {
        "data__holdout_identities": 20,
        "eval__dataset": "synthetic",
        "eval__images": f"[{synthetic / 'faces' / 'heldout'}]",
        "eval__pairs": synthetic / "faces" / "heldout_pairs.txt",
        "eval__open_set_people": synthetic / "faces" / "heldout_people.txt",
        "eval__best_metric": "synthetic/closed-full/rank1",
        "train__steps": 4,
        "mining__mode": "off",
        "tracking__backend": "mlflow",
        "data__workers": 2,
    }
    with one_core():
        done = facetrain("train", *flags(synthetic, run_dir, **evaluation), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "data.workers: 2 decode for each process, which has 1 of the CPU's cores" in done.stderr
    assert "DataLoader" not in done.stderr
    for name in ("config.yaml", "metrics.jsonl", "model.safetensors", "results.json", "report.html", "logs/train.log"):
        assert (run_dir / name).is_file(), name
    assert "data:image/jpeg;base64," in (run_dir / "report.html").read_text()
    assert "| heldout | accuracy |" in (run_dir / "model_card.md").read_text()
    monkeypatch.chdir(tmp_path)
    send_what_is_left(run_dir, done.stderr)
    assert list(tmp_path.glob("mlruns/**/report.html"))
    assert list(tmp_path.glob("mlruns/**/model/MLmodel"))
    assert list((run_dir / "figures").glob("*.png"))
    assert [folder.name for folder in (run_dir / "checkpoints").iterdir()] == ["step-00000004"]
    assert config_yaml(load_config(run_dir / "config.yaml")) == (run_dir / "config.yaml").read_text()
    results = json.loads((run_dir / "results.json").read_text())
    assert f"step-00000004  synthetic/closed-full/rank1 {results['closed-full']['rank1']:.2%}" in done.stderr
    assert {"verification", "closed-full", "open-best-rowden", "heldout"} <= results.keys()
    assert "1e-1" in results["thresholds"].pop("heldout")

    # The same figures come out of the weights alone, and of one checkpoint's.
    for weights_of in (run_dir, run_dir / "checkpoints" / "step-00000004" / "model.safetensors"):
        again = facetrain(
            *("lfw", "--checkpoint", weights_of, "--images", synthetic / "faces" / "heldout", "--dataset", "synthetic"),
            *("--pairs", evaluation["eval__pairs"], "--open-set-people", evaluation["eval__open_set_people"]),
            *("--out", tmp_path / "lfw"),
        )
        assert again.returncode == 0, again.stderr
        repeated = json.loads((tmp_path / "lfw" / "results.json").read_text())
        assert repeated == {key: value for key, value in results.items() if key != "heldout"}  # thresholds too

    # New identities can start from these weights, with another head as well.
    more = {"model__init_from": run_dir, "model__embedding_dim": 16, "train__steps": 1, "mining__mode": "off"}
    fresh = facetrain("train", *flags(synthetic, tmp_path / "fresh", **more), cwd=tmp_path)
    assert fresh.returncode == 0, fresh.stderr
    assert "head.weight (missing)" in fresh.stderr

    # Weights of one backbone are refused by another.
    (run_dir / "config.yaml").write_text(
        (run_dir / "config.yaml").read_text().replace("embedding_dim: null", "embedding_dim: 16")
    )
    other = facetrain(
        *("lfw", "--checkpoint", run_dir, "--images", synthetic / "faces" / "heldout", "--dataset", "synthetic"),
        *("--pairs", evaluation["eval__pairs"], "--out", tmp_path / "other"),
    )
    assert_user_error(other, "model.safetensors", "another backbone", "head.weight")


def test_bad_input_is_one_line_before_any_process_group_starts(synthetic, tmp_path, capsys, monkeypatch):
    def check(key: str, value: object, expected: tuple[str, ...]) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["check", *flags(synthetic, tmp_path / "run", **{key: value})])
        assert ended.value.code == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1
        assert said.err.startswith("facetrain: error: ")
        for word in expected:
            assert word in said.err

    check("train.global_pairs", 49, expected=("train.global_pairs", "48", "49"))
    check("train.micro_pairs", 3, expected=("train.micro_pairs", "divisor of the 8 pairs", "3"))
    check("loss.tile_bytes", 31, expected=("loss.tile_bytes", "32 bytes", "31"))
    check("loss.temperature", 0, expected=("loss.temperature", "more than 0"))
    check("data.shards", tmp_path / "nowhere", expected=("nowhere", "facetrain pack"))
    check("data.shard_px", 96, expected=("data.shard_px", "112"))
    check("data.holdout_identities", 49, expected=("data.holdout_identities", "48"))
    check("run.resume", "must", expected=("run.resume", "must"))
    check("model.name", "resnet", expected=("model.name", "casianet"))
    check("model.init_from", tmp_path, expected=("model.safetensors",))
    check("mining.candidates", 7, expected=("mining.candidates", "8", "7"))
    check("mining.table_probes", 0, expected=("mining.table_probes", "1 or more", "0"))
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning", None)
    check("loss.name", "lifted", expected=("loss.name", "lifted", "needs pytorch-metric-learning; pip install"))


BEFORE_OTHERS = {
    "a save": {"train__save_every_steps": 1, "mining__mode": "off"},
    "a round": {"mining__warmup_steps": 2, "mining__batches_per_round": 1},  # step 1 has a finite gradient still
    "an evaluation": {"eval__every_steps": 2, "data__holdout_identities": 20, "mining__mode": "off"},
}


@pytest.mark.slow
@pytest.mark.parametrize("first", BEFORE_OTHERS)
def test_a_gradient_that_is_not_finite_ends_all_ranks_and_names_the_batch(synthetic, tmp_path, first):
    run_dir = tmp_path / "run"
    more = {"train__optimizer": "sgd", "train__learning_rate": 1e30, "model__norm": "none"} | BEFORE_OTHERS[first]
    more |= {"train__log_every_steps": 1000}
    done = run(*training(2, *flags(synthetic, run_dir, **more)), cwd=tmp_path)
    assert done.returncode != 0
    record = json.loads((run_dir / "logs" / "not_finite.json").read_text())
    assert done.stderr.count(f"error: step {record['step']}: train/loss is") == 1
    assert len(set(record["identities"])) == 8
    if first == "a save":
        saved = sorted((run_dir / "checkpoints").iterdir())
        assert [folder.name for folder in saved[-1:]] == [f"step-{record['step'] - 1:08d}"]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_leads_to_the_same_weights(synthetic, tmp_path):
    run_dir = tmp_path / "run"
    words = flags(synthetic, run_dir, train__steps=8, data__workers=0)
    assert facetrain("train", *words).returncode == 0
    expected = weights(run_dir)
    (run_dir / "results.json").unlink()  # as if killed just before the end
    newest = run_dir / "checkpoints" / "step-00000008"
    os.truncate(newest / "optimizer.safetensors", 1000)
    again = facetrain("train", *words)
    assert again.returncode == 0, again.stderr
    assert f"{newest}: damaged (optimizer.safetensors isn't what was saved)" in again.stderr
    assert "continues at step 4" in again.stderr
    assert weights(run_dir) == expected
    assert {path.name for path in newest.parent.iterdir()} == {"step-00000004", newest.name, f"{newest.name}.damaged"}

    (run_dir / "results.json").unlink()
    for file in newest.parent.glob("step-*/state.json"):
        file.unlink()
    refused = facetrain("train", *words)
    assert_user_error(refused, "no checkpoint is whole", "step-00000004: state.json is missing", "remove that folder")


@pytest.mark.slow
def test_another_config_in_a_run_folder_is_refused_by_its_keys(synthetic, tmp_path):
    words = flags(synthetic, tmp_path / "run", train__steps=0)
    assert facetrain("train", *words).returncode == 0
    changed = facetrain("train", *words, "--train.learning_rate", "0.5", "--loss.l2_weight", "0")
    assert_user_error(changed, "train.learning_rate: 0.001 != 0.5", "loss.l2_weight: 0.002 != 0.0")
    assert_user_error(facetrain("train", *words, "--run.resume", "never"), "run.resume=never")


@pytest.mark.slow
def test_a_finished_run_says_what_registers_it(synthetic, tmp_path):
    words = flags(synthetic, tmp_path / "run", train__steps=0)
    assert facetrain("train", *words).returncode == 0
    again = facetrain("train", *words, "--tracking.backend", "mlflow", "--tracking.register_as", "faces")
    assert f"`facetrain sync {tmp_path / 'run'} --register faces` registers it" in again.stderr


@pytest.mark.slow
def test_two_ranks_start_in_a_fresh_folder_and_go_on_with_other_workers(synthetic, tmp_path):
    more = {"mining__mode": "off", "tracking__backend": "mlflow", "train__steps": 2, "train__save_every_steps": 1}
    words = flags(synthetic, tmp_path / "run", **more)
    train(2, *words, "--run.resume", "never", cwd=tmp_path)
    (tmp_path / "run" / "results.json").unlink()  # as if killed just before the end
    output = train(2, *words, "--data.workers", "0", "--run.resume", "must", cwd=tmp_path)
    assert "continues at step 2" in output
    assert "MLflow failed" not in output


@pytest.mark.slow
def test_what_goes_wrong_on_another_rank_alone_is_said_by_it(synthetic, tmp_path):
    """Rank 1 reads the second half of the images, one of which is no image any more."""
    faces = tmp_path / "faces"
    shutil.copytree(synthetic / "faces" / "heldout", faces)
    last = sorted(faces.rglob("*.jpg"))[-1]
    last.write_bytes(b"no JPEG")
    run_dir = tmp_path / "run"
    assert facetrain("train", *flags(synthetic, run_dir, train__steps=0)).returncode == 0
    done = run(
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "facetrain"),
        *("lfw", "--checkpoint", run_dir, "--images", faces, "--pairs", synthetic / "faces" / "heldout_pairs.txt"),
        *("--dataset", "synthetic", "--out", tmp_path / "lfw"),
    )
    assert done.returncode != 0
    assert f"rank 1: {last.parent.name}/{last.name}" in done.stderr


def test_under_torchrun_rank_0_alone_says_what_is_wrong(synthetic, tmp_path):
    done = run(*training(2, *flags(synthetic, tmp_path / "run", train__global_pairs=7)), cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("error: train.global_pairs: expected a multiple of the 2 processes, got 7") == 1
