"""What only a CUDA device can show: the same run over nccl, and the same numbers as the CPU's."""

import json

import numpy as np
import pytest
import torch
from commands import facetrain

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
