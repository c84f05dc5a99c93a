"""What is counted without data is what real tensors hold, compute and move."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from facetrain.batch import network_input
from facetrain.config import DataConfig, LossConfig, ModelConfig
from facetrain.estimate.cluster import Cluster
from facetrain.estimate.counting import WorkCounter, without_data
from facetrain.estimate.loss import _count_loss, measure_loss
from facetrain.estimate.network import measure_embedding, measure_network, measure_passes
from facetrain.models import build_backbone

CASIANET = ModelConfig(name="casianet")
GREY_32 = DataConfig(image_px=32, colour="grey")


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (CASIANET, 1_751_328 + 2_880),
        (ModelConfig(name="casianet", norm="none"), 1_751_328 + 1_440),
        (ModelConfig(name="iresnet18", embedding_dim=100), None),
    ],
)
def test_sizes_are_the_real_networks(model: ModelConfig, parameters: int | None) -> None:
    data = DataConfig(image_px=48, colour="grey")
    network = measure_network(model, data)
    backbone = build_backbone(model, channels=1, image_px=48)
    assert network.parameters == sum(p.numel() for p in backbone.parameters())
    assert parameters in (None, network.parameters)
    assert network.buffer_bytes == sum(b.numel() * b.element_size() for b in backbone.buffers())
    running = [b for name, b in backbone.named_buffers() if "running" in name]
    assert network.running_statistics == sum(b.numel() for b in running)
    assert sum(network.batchnorm_widths) * 2 == network.running_statistics
    assert network.embedding_dim == backbone.embedding_dim


@pytest.mark.parametrize("name", ["torchvision:convnext_tiny", "torchvision:regnet_y_400mf"])
def test_networks_that_look_at_numbers_while_they_are_made_are_counted_too(name: str) -> None:
    model, data = ModelConfig(name=name), DataConfig(image_px=64)
    backbone = build_backbone(model, channels=3, image_px=64)
    network = measure_network(model, data)
    assert network.parameters == sum(p.numel() for p in backbone.parameters())
    assert network.buffer_bytes == sum(b.numel() * b.element_size() for b in backbone.buffers())
    assert measure_passes(model, data, "float32", images=2).backward.flops.sum() > 0


def test_operations_of_a_product_are_known() -> None:
    with without_data():
        a, b, into = torch.empty(30, 50), torch.empty(50, 70), torch.empty(30, 70)
        with WorkCounter() as counter:
            _ = a @ b
            into.addmm_(a, b)
            _ = into.T
    work = counter.work()
    assert work.flops.tolist() == [2 * 30 * 50 * 70] * 2  # a view is no operation
    assert work.moved_bytes[0] == 4 * (30 * 50 + 50 * 70 + 30 * 70)
    # 210,000 operations at a million a second, 4 bytes a microsecond, or the launch: the slowest bounds.
    slow = Cluster(gpu_gb_per_s=1e9, kernel_us=1e-3)
    assert work.seconds(slow, tflops=1e-6) == pytest.approx(2 * 0.21)
    assert work.seconds(Cluster(kernel_us=1e6), tflops=1.0) == pytest.approx(2.0)


def test_a_convolution_network_takes_three_forwards_of_operations() -> None:
    passes = measure_passes(CASIANET, GREY_32, "float32", images=4)
    forward, backward = passes.forward.flops.sum(), passes.backward.flops.sum()
    first_layer = 4 * 2 * 32 * 32 * 32 * 9  # its input needs no gradient
    assert backward == 2 * forward - first_layer
    embedding = measure_embedding(CASIANET, GREY_32, "float32", images=4)
    assert embedding.flops.sum() == forward
    assert embedding.peak_bytes < passes.saved_bytes


def test_twice_the_images_are_twice_the_activations() -> None:
    few, more = (measure_passes(CASIANET, GREY_32, "float32", images=images) for images in (64, 128))
    assert more.saved_bytes == pytest.approx(2 * few.saved_bytes, rel=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activations_are_what_a_real_forward_saves(precision: str) -> None:
    backbone = build_backbone(CASIANET, channels=1, image_px=32).train()
    own = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            saved[x.untyped_storage().data_ptr()] = x
        return x

    images = torch.zeros(8, 32, 32, 1, dtype=torch.uint8)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        embeddings = backbone(network_input(images))
    real_bytes = sum(x.untyped_storage().nbytes() for x in saved.values())
    found = measure_passes(CASIANET, GREY_32, precision, images=8)
    # Beside what is saved, the embeddings themselves live.
    assert found.saved_bytes == pytest.approx(real_bytes + embeddings.nbytes, rel=0.01)


@pytest.mark.parametrize(
    "loss",
    [
        LossConfig(),
        LossConfig(name="npair-ovo"),
        LossConfig(name="tuplet"),
        LossConfig(symmetric=True, temperature=0.1),
    ],
)
def test_a_line_through_two_tiles_and_three_is_the_loss_of_many(loss: LossConfig) -> None:
    """512 rows in 8 tiles of 64: as many operations as counted one by one, and the same memory."""
    tiled = dataclasses.replace(loss, tile_bytes=64 * 1024 * 4)
    sizes = {"pairs": 512, "global_pairs": 1024, "embedding_dim": 32}
    line = measure_loss(tiled, **sizes)
    whole = _count_loss(tiled, **sizes, classes=0)
    assert line.tiles == 8
    by_line = line.two.flops.sum() + 6 * (line.three.flops.sum() - line.two.flops.sum())
    assert by_line == whole.flops.sum() >= 3 * 2 * 512 * 1024 * 32
    assert line.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.01)
    cluster = Cluster(kernel_us=1e-3)
    assert line.seconds(cluster) == pytest.approx(whole.seconds(cluster, cluster.gpu_float32_tflops), rel=0.01)


PEAK_OF_THE_LOSS = """
import ctypes, sys, torch
from pathlib import Path
from facetrain.config import LossConfig
from facetrain.losses.npair import NPairLoss
from facetrain.world import World

def status(key):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])

torch.set_num_threads(1)
pairs = int(sys.argv[1])
embeddings = torch.randn(2, pairs, 128, requires_grad=True)
for symmetric in (False, True):
    loss = NPairLoss(LossConfig(symmetric=symmetric), World())
    small = embeddings[:, :64]  # what torch loads at its first call is not the loss's
    torch.autograd.grad(loss(small[0], small[1], torch.arange(64)).total, embeddings)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    torch.autograd.grad(loss(embeddings[0], embeddings[1], torch.arange(pairs)).total, embeddings)
    print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_peak_memory_of_the_loss_is_what_is_measured() -> None:
    pairs = 8192
    command = [sys.executable, "-c", PEAK_OF_THE_LOSS, str(pairs)]
    # Without these, what malloc and BLAS keep for themselves makes the peak 4 to 55 MiB higher, now so and now so.
    exact = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MKL_DISABLE_FAST_MM": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **exact})
    for symmetric, measured in zip((False, True), done.stdout.split(), strict=True):
        loss = LossConfig(symmetric=symmetric)
        found = measure_loss(loss, pairs=pairs, global_pairs=pairs, embedding_dim=128)
        assert 0.9 * found.peak_bytes < int(measured) < 1.02 * found.peak_bytes
