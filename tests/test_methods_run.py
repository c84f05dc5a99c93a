"""Runs with other losses than N-pair: several images of each identity, resume at any step and with other ranks."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
from commands import ROOT, assert_user_error, facetrain, run
from safetensors.numpy import load_file
from test_train import training

pytestmark = pytest.mark.slow


def flags(synthetic: Path, run_dir: Path, *more: str) -> list[str]:
    settings = {
        "run.dir": run_dir,
        "data.shards": synthetic / "shards",
        "data.image_px": 32,
        "train.global_pairs": 16,
        "train.steps": 8,
        "train.save_every_steps": 4,
        "train.log_every_steps": 2,
        "tracking.backend": "none",
    }
    return [*(word for key, value in settings.items() for word in (f"--{key}", str(value))), *more]


def train(world_size: int, *words: str, cwd: Path) -> str:
    done = run(*training(world_size, *words), cwd=cwd, timeout_s=280)
    assert done.returncode == 0, done.stderr
    return done.stderr


def forget_the_end(folder: Path) -> None:
    """Leave a run as if it had been killed after its checkpoint at step 4."""
    (folder / "results.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-00000008")


SGD = ("--train.optimizer", "sgd", "--train.learning_rate", "0.01")
CASES = {
    "group": ("--loss.name", "group", "--train.images_per_identity", "4"),
    "softmax": ("--loss.name", "softmax", *SGD),
    "npair-mc": ("--loss.memory_batches", "3", "--train.micro_pairs", "4"),
    "triplet": ("--loss.name", "triplet", "--loss.triplet.mining", "random", "--train.micro_pairs", "4"),
}


@pytest.mark.parametrize("case", CASES)
def test_resume_equals_no_stop(case: str, synthetic: Path, tmp_path: Path) -> None:
    words = flags(synthetic, tmp_path / "run", *CASES[case])
    log = train(1, *words, cwd=tmp_path)
    assert ("with 4 images at a time" in log) == (case == "group")
    last = tmp_path / "run" / "checkpoints" / "step-00000008"
    files = ["model.safetensors", *(["loss.safetensors"] if (last / "loss.safetensors").exists() else [])]
    assert len(files) == (1 if case == "triplet" else 2)
    before = [load_file(last / name) for name in files]
    forget_the_end(tmp_path / "run")
    assert "continues at step 4" in train(1, *words, cwd=tmp_path)
    for name, tensors in zip(files, before, strict=True):
        after = load_file(last / name)
        assert after.keys() == tensors.keys()
        assert all((after[key] == value).all() for key, value in tensors.items())


def test_class_vectors_go_on_with_other_ranks(synthetic: Path, tmp_path: Path) -> None:
    words = flags(synthetic, tmp_path / "run", "--loss.name", "arcface", "--model.norm", "none", *SGD)
    train(2, *words, cwd=tmp_path)
    before = load_file(tmp_path / "run" / "checkpoints" / "step-00000008" / "loss.safetensors")
    forget_the_end(tmp_path / "run")
    assert "continues at step 4" in train(1, *words, cwd=tmp_path)
    after = load_file(tmp_path / "run" / "checkpoints" / "step-00000008" / "loss.safetensors")
    assert len(after["rows"]) == 48
    for key, value in before.items():
        assert abs(after[key] - value).max() <= 1e-3 * max(1.0, abs(value).max()), key


def test_class_mining_feeds_the_triplet_loss(synthetic: Path, tmp_path: Path) -> None:
    mining = ("--mining.mode", "gathered", "--mining.warmup_steps", "1", "--mining.batches_per_round", "2")
    words = ("--loss.name", "triplet", "--loss.triplet.mining", "random", *mining, "--mining.lag_steps", "4")
    log = train(1, *flags(synthetic, tmp_path / "run", *words), cwd=tmp_path)
    assert "mining round 0" in log
    figures = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in figures if "mining/violation" in line] == [1, 3]
    served = [line for line in figures if "train/data_loss" in line and line["step"] > 1 + 4]
    assert [line["step"] for line in served] == [6, 8]
    assert all(math.isfinite(line["train/data_loss"]) for line in served)
    assert served[-1]["train/max_draws_of_an_identity"] > 3  # each once in three steps, but for mined ones


def test_what_cannot_be_done_is_one_line(synthetic: Path, tmp_path: Path) -> None:
    many = ("--train.images_per_identity", "8", "--train.global_pairs", "16")
    done = facetrain("train", *flags(synthetic, tmp_path / "run", *many), cwd=tmp_path)
    assert_user_error(done, "train.images_per_identity", "4 identities with 8 images each", "only 0")


def test_every_method_of_the_benchmark_has_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import methods

    from facetrain.command_line import parse_config

    monkeypatch.setattr(sys, "argv", ["methods.py", *REQUIRED, "--out", str(tmp_path / "none.jsonl")])
    args = methods.parse_arguments()
    for name, method in (methods.METHODS | methods.SHAPES).items():
        run = methods.Run("final", name, 1e-3, 0, 60_000)
        flags = methods.flags_of(run, tmp_path, args).items()
        words = [word for key, value in flags for word in (f"--{key}", str(value))]
        config = parse_config(["--config", str(methods.CONFIG), *words], prog="x")
        assert config.loss.name == method.loss
        assert 2 * config.train.global_pairs * config.train.steps in range(60_000, 60_000 + 2 * method.pairs)


REQUIRED = ("--shards", "s", "--lfw-images", "i", "--pairs", "p", "--open-set-people", "o", "--work", "w")
