"""train.compile: the same training up to rounding, under the same names."""

import pytest
import torch
from distributed.ranks import run_ranks
from torch import nn

from facetrain.batch import PairBatch
from facetrain.config import LossConfig, TrainConfig
from facetrain.engine import Engine
from facetrain.losses.npair import NPairLoss
from facetrain.step import train_step


def weights_after_steps(world, config):
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 8, kernel_size=3, padding=1)
    backbone = nn.Sequential(convolution, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 16))
    engine = Engine(backbone, config, world, pairs_per_rank=4)
    images = torch.randint(0, 256, (2, 4, 8, 8, 3), dtype=torch.uint8)
    batch = PairBatch(step=0, images_VnHWC=images, labels_n=torch.arange(4) + 4 * world.rank)
    for _ in range(3):
        train_step(engine, NPairLoss(LossConfig(), world), batch, learning_rate=1e-3)
    return engine.weights()


def cases(world):
    return [
        [weights_after_steps(world, TrainConfig(optimizer="sgd", zero_stage=stage, compile=c)) for c in (False, True)]
        for stage in (0, 1)
    ]


@pytest.mark.slow
def test_a_compiled_network_learns_the_same_and_keeps_its_names() -> None:
    for plain, compiled in run_ranks(cases, 2, timeout_s=600)[0]:
        assert list(plain) == list(compiled)
        for name, expected in plain.items():
            torch.testing.assert_close(compiled[name], expected, rtol=1e-3, atol=1e-4)


def test_compiling_sharded_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.compile: goes with train\.zero_stage 0, 1 or 2, got 3"):
        TrainConfig(compile=True, zero_stage=3)
