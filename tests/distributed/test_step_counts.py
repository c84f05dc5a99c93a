"""What a step costs besides the network, in numbers that don't depend on the machine: more of any is a slower step."""

import os
import platform
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from distributed.ranks import run_ranks
from estimate.traffic import Traffic, tensors_of

from facetrain.batch import PairBatch, network_input
from facetrain.config import LossConfig, ModelConfig, TrainConfig
from facetrain.engine import Engine
from facetrain.losses.npair import NPairLoss
from facetrain.models import build_backbone
from facetrain.step import train_step
from facetrain.watch.health import FiniteWatch
from facetrain.watch.stop import StopRequest
from facetrain.watch.stragglers import StepClock, TimedLoss

pytestmark = pytest.mark.xdist_group("step counts")  # the steps are taken once

PAIRS, IMAGE_PX = 16, 16
WAITS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")
"""Operations for which the host waits until the device has an answer: `.item()`, `bool(tensor)`, `tensor[mask]`."""

UNUSED = ("mlflow", "pandas", "scipy", "matplotlib", "torchvision", "onnxruntime", "pyarrow", "faiss", "sklearn")
"""Modules that take from half a second to some seconds to import."""


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
    loss, batch = TimedLoss(NPairLoss(LossConfig(), world), clock), batch_of(world)

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
    """What a plain loop does with this rank's pairs alone."""
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
        loss = F.cross_entropy(anchors @ positives.T, batch.labels_n - batch.labels_n[0])
        (loss + 0.002 * (anchors.square().sum() + positives.square().sum()) / (2 * len(anchors))).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with Operations() as counted:
        step()
    return counted.names, counted.new_bytes


def cases(world):
    programs = []
    sys.addaudithook(lambda event, args: programs.append(str(args[0])) if event == "subprocess.Popen" else None)
    import facetrain.train  # noqa: F401 - what a run imports

    configs = {"at once": TrainConfig(optimizer="sgd", global_pairs=PAIRS)}
    configs["in chunks"] = replace(configs["at once"], micro_pairs=4)
    steps = {name: counts_of_a_step(world, config) for name, config in configs.items()}
    started = [program for program in programs if not program.endswith("ldconfig")]  # by torch, to find libraries
    return steps, counts_of_a_bare_step(world), [name for name in UNUSED if sys.modules.get(name)] + started


@pytest.fixture(scope="module")
def counted():
    return run_ranks(cases, 2, timeout_s=240)[0]


@pytest.mark.parametrize("name", ["at once", "in chunks"])
def test_the_host_waits_for_the_device_at_log_lines_alone(counted, name):
    in_step, _, _, in_log_line, _ = counted[0][name]
    # The one is the answer to the stop request, which never was on a device.
    assert {wait: in_step[wait] for wait in WAITS if in_step[wait]} == {"_local_scalar_dense": 1}
    assert sum(in_log_line[wait] for wait in WAITS) <= 4  # three of them for the ranks' times, which are on the host


@pytest.mark.parametrize("name", ["at once", "in chunks"])
def test_a_step_exchanges_six_times_and_a_log_line_twice(counted, name):
    _, calls, _, _, log_calls = counted[0][name]
    parameters, statistics = 1_751_904 + 2_880, 2 * 1_440
    assert sorted(calls) == sorted(
        [
            ("all-reduce", 1),  # whether to stop
            ("all-gather", 4 * PAIRS * 320),  # positives
            ("all-gather", 8 * PAIRS),  # labels
            ("reduce-scatter", 4 * PAIRS * 320),  # gradients of positives
            ("all-reduce", 4 * parameters),
            ("all-reduce", 4 * statistics),
        ]
    )
    # The figures of the batch; the ranks' times are an object: its size, then its bytes.
    assert len(log_calls) <= 3


def test_a_step_does_little_beyond_a_bare_one(counted):
    (names, _, new_bytes, _, _), (bare_names, bare_bytes) = counted[0]["at once"], counted[1]
    # Two thirds are the copies of 30 gradients to one tensor and back; one rank alone has 48 operations more than bare.
    assert sum(names.values()) - sum(bare_names.values()) <= 250
    gradients = 4 * (1_751_904 + 2_880)
    assert new_bytes - bare_bytes <= 1.1 * gradients  # gathered for the exchange


def test_the_first_step_needs_no_unused_import_and_no_compiler(counted):
    assert counted[2] == []


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_large_tensors_of_later_steps_take_no_new_pages() -> None:
    """In a process of its own, since it can't be undone.

    Where small ones lie between them, which differs from process to process, some steps pass until they fit.
    """
    script = """
import resource
import torch
from facetrain.engine.host_memory import keep_freed_memory
keep_freed_memory()
steps_without = 0
for step in range(30):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(2**24).add(1)
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    steps_without += pages < 100  # two tensors of 64 MiB are 32,768
print(steps_without)
"""
    env = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}  # which would do the same
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) >= 10  # 25 at the least in 50 processes, none without the call
