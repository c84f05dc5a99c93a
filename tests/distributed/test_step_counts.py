"""What a step costs besides the network, in numbers that don't depend on the machine: more of any is a slower step."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from distributed.ranks import run_ranks
from estimate.traffic import Traffic, tensors_of

from facetrain.batch import PairBatch, network_input
from facetrain.config import LossConfig, ModelConfig, TrainConfig
from facetrain.engine import Engine
from facetrain.models import build_backbone
from facetrain.step import train_step
from facetrain.watch.health import FiniteWatch
from facetrain.watch.stop import StopRequest
from facetrain.watch.stragglers import StepClock, TimedLoss

PAIRS, IMAGE_PX = 16, 16
WAITS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")
"""Operations for which the host waits until the device has an answer: `.item()`, `bool(tensor)`, `tensor[mask]`."""


class Operations(Traffic):
    """Counts what torch does in a `with` block, and the bytes that it makes anew."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.new_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.names[func.overloadpacket.__name__] += 1
        known = {x.untyped_storage().data_ptr() for x in tensors_of((args, kwargs))}
        self.new_bytes += sum(
            x.untyped_storage().nbytes() for x in tensors_of(result) if x.untyped_storage().data_ptr() not in known
        )
        return result


def batch_of(world):
    n = PAIRS // world.world_size
    images = torch.randint(0, 256, (2, n, IMAGE_PX, IMAGE_PX, 3), dtype=torch.uint8)
    return PairBatch(step=0, images_VnHWC=images, labels_n=torch.arange(n) + world.rank * n)


def counts_of_a_step(world, config):
    """What the training loop does in the second step, when nothing is set up any more, and what its log line does."""
    backbone = build_backbone(ModelConfig(), channels=3, image_px=IMAGE_PX)
    engine = Engine(backbone, config, world, pairs_per_rank=PAIRS // world.world_size)
    clock, finite, stop = StepClock(world, factor=2.0), FiniteWatch(world), StopRequest(world)
    loss, batch = TimedLoss(LossConfig(), world, clock), batch_of(world)

    def step():
        stop.is_due()
        clock.begin()
        stats = train_step(engine, loss, batch, learning_rate=0.01)
        finite.observe(1, stats)
        return stats

    step()
    with Operations() as in_step:
        stats = step()
    with Operations() as in_log_line:
        finite.first_bad_step()
        stats.read(world)
        clock.read()
    return in_step.names, in_step.calls, in_step.new_bytes, in_log_line.names, in_log_line.calls


def counts_of_a_bare_step(world):
    backbone = build_backbone(ModelConfig(), channels=3, image_px=IMAGE_PX)
    optimizer = torch.optim.SGD(
        [
            {"params": [p for p in backbone.parameters() if p.ndim > 1]},
            {"params": [p for p in backbone.parameters() if p.ndim <= 1]},
        ],
        lr=0.01,
        momentum=0.9,
    )
    batch = batch_of(world)

    def step():
        anchors, positives = backbone(network_input(batch.images_VnHWC.flatten(0, 1))).chunk(2)
        loss = F.cross_entropy(anchors @ positives.T, batch.labels_n)
        (loss + 0.002 * (anchors.square().sum() + positives.square().sum()) / (2 * len(anchors))).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with Operations() as counted:
        step()
    return counted.names, counted.new_bytes


def cases(world):
    sgd = {"optimizer": "sgd", "global_pairs": PAIRS}
    configs = {
        "ZeRO 0": TrainConfig(**sgd),
        "ZeRO 1": TrainConfig(**sgd, zero_stage=1),
        "chunks": TrainConfig(**sgd, micro_pairs=4),
        "adamw": TrainConfig(global_pairs=PAIRS),
    }
    found = {name: counts_of_a_step(world, config) for name, config in configs.items()}
    return found, counts_of_a_bare_step(world) if world.world_size == 1 else None


@pytest.fixture(scope="module")
def one():
    return run_ranks(cases, 1)[0]


@pytest.fixture(scope="module")
def two():
    return run_ranks(cases, 2)[0][0]


def test_dump(one, two):
    for found in (one[0], two):
        for name, (names, calls, new_bytes, log_names, log_calls) in found.items():
            print(name, {w: names[w] for w in WAITS}, calls, new_bytes, sum(names.values()))
            print("   log", {w: log_names[w] for w in WAITS}, log_calls)
    bare, bare_bytes = one[1]
    print("bare", sum(bare.values()), bare_bytes, {w: bare[w] for w in WAITS})
    ours = one[0]["ZeRO 0"][0]
    print("extra", {k: ours[k] - bare[k] for k in {**ours, **bare} if ours[k] != bare[k]})
