"""Floating-point operations: how many the network's training takes, and how many a second the device can do."""

import time
from typing import Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from facetrain.config import DataConfig, ModelConfig
from facetrain.models import build_backbone

_SIDE = {"cuda": 8192, "cpu": 1024}
_REPEATS = 5


def training_flops_per_image(model: ModelConfig, data: DataConfig) -> float:
    """Return the operations of one forward and one backward of an image, a multiplication and an addition being two.

    Matrix products and convolutions count; nothing is computed. A second forward, as GradCache needs, isn't in it: it
    is the price of memory, and no work towards the result.
    """
    images = 2  # BatchNorm wants more than one
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        backbone = build_backbone(model, channels=data.channels, image_px=data.image_px, with_values=False)
        backbone.train()(torch.empty(images, data.channels, data.image_px, data.image_px)).sum().backward()
    return float(counter.get_total_flops()) / images


def matmul_flops_per_s(device: torch.device, precision: Literal["float32", "bfloat16"]) -> float:
    """Return the operations a second of a large matrix product, the fastest of some: what a network can't exceed.

    In float32 on a GPU, TensorFloat-32 is allowed if it is for convolutions, as torch's default is.
    """
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    side = _SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype, generator=_generator(device)) for _ in range(2))
    out = torch.empty_like(a)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        seconds = [_seconds_of_a_product(a, b, out) for _ in range(_REPEATS + 1)][1:]  # the first one warms up
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    return 2.0 * side**3 / min(seconds)


def _generator(device: torch.device) -> torch.Generator:
    """Return random numbers of its own, so that those of training are the same with and without this."""
    return torch.Generator(device).manual_seed(0)


def _seconds_of_a_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> float:
    times = 10 if a.device.type == "cuda" else 1
    _wait_for(a.device)
    begun_at = time.perf_counter()
    for _ in range(times):
        torch.mm(a, b, out=out)
    _wait_for(a.device)
    return (time.perf_counter() - begun_at) / times


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
