"""What only a CUDA device can show: the same run over nccl, and the same numbers as the CPU's."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from commands import ROOT, facetrain, run

from facetrain.config import DataConfig
from facetrain.data.loader import PairLoader
from facetrain.data.plan import Plan
from facetrain.data.shards import ShardSet
from facetrain.losses.logit_tiles import one_vs_all, sum_of_rows
from facetrain.mining.greedy import greedy_classes

pytestmark = pytest.mark.gpu


def test_a_run_trains_mines_and_evaluates_on_the_device(synthetic, tmp_path):
    done = facetrain(
        *("train", "--run.device", "cuda", "--run.dir", tmp_path / "run", "--tracking.backend", "none"),
        *("--data.shards", synthetic / "shards", "--data.image_px", "32", "--data.holdout_identities", "20"),
        *("--train.global_pairs", "8", "--train.steps", "20", "--train.precision", "bfloat16"),
        *("--train.zero_stage", "1", "--mining.mode", "gathered", "--mining.batches_per_round", "4"),
    )
    assert done.returncode == 0, done.stderr
    assert "on cuda:0" in done.stderr
    assert "heldout" in json.loads((tmp_path / "run" / "results.json").read_text())


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_are_copied_beside_computation_are_the_cpus(synthetic, workers):
    """The device is kept busy, so that batches overtake each other if a copy isn't waited for or its memory reused."""
    shards = ShardSet.open(synthetic / "shards")
    plan = Plan(shards.table, np.arange(48), global_pairs=16, seed=0)
    config = DataConfig(image_px=32, workers=workers, prefetch=2, crop_jitter_px=3)
    ranks = {"rank": 0, "world_size": 1, "first_step": 0, "last_step": 30}
    with PairLoader(plan, shards, config, **ranks) as loader:
        expected = list(loader)
    busy, sums = torch.randn(2000, 2000, device="cuda"), []
    with PairLoader(plan, shards, config, device=torch.device("cuda"), **ranks) as loader:
        for batch in loader:
            assert batch.images_VnHWC.is_cuda
            for _ in range(5):
                busy = torch.nn.functional.normalize(busy @ busy)
            weights = torch.arange(batch.images_VnHWC.numel(), device="cuda") % 251
            sums.append(((batch.images_VnHWC.flatten().long() * weights).sum(), batch.labels_n.sum()))
    for batch, (images, labels) in zip(expected, sums, strict=True):
        weights = torch.arange(batch.images_VnHWC.numel()) % 251
        assert images.item() == (batch.images_VnHWC.flatten().long() * weights).sum()
        assert labels.item() == batch.labels_n.sum()


def test_a_profile_on_the_device_adds_up_and_finds_its_use(synthetic, tmp_path):
    done = facetrain(
        *("train", "--run.device", "cuda", "--run.dir", tmp_path / "run", "--tracking.backend", "none"),
        *("--data.shards", synthetic / "shards", "--train.global_pairs", "32", "--train.precision", "bfloat16"),
        *("--train.steps", "30", "--train.profile_steps", "20:30", "--eval.at_start", "false"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run" / "profile" / "profile.json").read_text())
    assert sum(found["phases_s"].values()) == pytest.approx(found["step_s"])
    assert 0 < found["mfu"] < 1
    assert (tmp_path / "run" / "profile" / "trace.json.gz").is_file()


def test_a_stopped_run_with_the_fused_optimizer_goes_on_to_the_same_loss(synthetic, tmp_path):
    def train(steps, *more):
        done = facetrain(
            *("train", "--run.device", "cuda", "--tracking.backend", "none", "--data.shards", synthetic / "shards"),
            *("--data.image_px", "32", "--train.global_pairs", "8", "--train.save_every_steps", "5", *more),
            *("--train.log_every_steps", "1", "--train.steps", steps),
        )
        assert done.returncode == 0, done.stderr

    def losses(folder):
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [record["train/loss"] for record in records if "train/loss" in record]

    train("10", "--run.dir", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step-00000010")
    for name in ("results.json", "metrics.jsonl"):
        (tmp_path / "stopped" / name).unlink()
    train("10", "--run.dir", tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == pytest.approx(losses(tmp_path / "whole")[5:], rel=1e-3)


def test_no_step_waits_for_the_device_between_log_lines(tmp_path):
    code = """
import torch
from facetrain.batch import PairBatch
from facetrain.config import LossConfig, ModelConfig, TrainConfig
from facetrain.engine import Engine
from facetrain.losses.npair import NPairLoss
from facetrain.models import build_backbone
from facetrain.step import train_step
from facetrain.watch.health import FiniteWatch
from facetrain.watch.stragglers import StepClock, TimedLoss
from facetrain.world import start_world
with start_world("cuda", 60.0) as world:
    engine = Engine(build_backbone(ModelConfig(), channels=3, image_px=32), TrainConfig(), world, pairs_per_rank=8)
    clock, finite = StepClock(world, factor=2.0), FiniteWatch(world)
    loss = TimedLoss(NPairLoss(LossConfig(), world), clock)
    images = torch.zeros(2, 8, 32, 32, 3, dtype=torch.uint8)
    batch = PairBatch(step=0, images_VnHWC=images, labels_n=torch.arange(8)).pin_memory()
    for step in range(4):
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        clock.begin()
        finite.observe(step, train_step(engine, loss, batch.to(world.device), learning_rate=0.01))
    torch.cuda.set_sync_debug_mode("default")
"""
    done = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr


def test_loss_and_gradient_on_the_device_equal_the_cpus():
    anchors, positives = torch.randn(2, 64, 32)
    labels = torch.arange(64) // 2

    def outcome(device):
        a, p = (x.to(device).requires_grad_() for x in (anchors, positives))
        loss = sum_of_rows(one_vs_all, a, p, labels.to(device), labels.to(device), tile_bytes=4096)
        return [x.cpu() for x in (loss.detach(), *torch.autograd.grad(loss, (a, p)))]

    for got, expected in zip(outcome("cuda"), outcome("cpu"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_mined_classes_on_the_device_are_the_cpus():
    anchors, positives = torch.randint(-3, 4, (2, 200, 16)).float()
    orders = [
        greedy_classes(anchors.to(d), positives.to(d), 50, np.random.default_rng(0)).order.tolist()
        for d in ("cpu", "cuda")
    ]
    assert orders[0] == orders[1]
