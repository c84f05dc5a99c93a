"""What the backbone of a config holds, computes and moves on one GPU, counted from its own code."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from facetrain.batch import network_input
from facetrain.config import DataConfig, ModelConfig
from facetrain.estimate.counting import Work, WorkCounter, without_data
from facetrain.models import Backbone, build_backbone

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Network:
    """Sizes of a backbone."""

    group_parameters: tuple[int, ...]
    """Parameters of each of the optimizer's groups: kernels and matrices, then biases and normalisation."""
    group_tensors: tuple[int, ...]
    """How many tensors these are."""
    buffer_bytes: int
    """Bytes of the buffers, running statistics among them."""
    running_statistics: int
    """Numbers that the ranks average after a step."""
    batchnorm_widths: tuple[int, ...]
    """Channels of each BatchNorm."""
    embedding_dim: int
    """D, the width of the embedding."""

    @property
    def parameters(self) -> int:
        """P, all parameters."""
        return sum(self.group_parameters)

    def padded_parameters(self, world_size: int) -> int:
        """Return how many numbers the flat groups of ZeRO 1 and 2 hold, padded so that ranks have equal shares."""
        return sum(padded_numel(numel, world_size) for numel in self.group_parameters)


def padded_numel(numel: int, world_size: int) -> int:
    """Return the numbers of a flat group: the next multiple of 2 W. Source: DeepSpeed 0.19.8, stage_1_and_2.py."""
    return math.ceil(numel / (2 * world_size)) * 2 * world_size


@dataclass(frozen=True)
class Passes:
    """A forward and a backward of the backbone on one GPU."""

    images: int
    """Images of a forward."""
    forward: Work
    """From uint8 images to embeddings."""
    backward: Work
    """From embeddings to the gradients of all parameters."""
    saved_bytes: int
    """What backward needs of forward: activations, and bfloat16 copies of the weights."""
    working_bytes: int
    """What backward makes beyond that at its widest, the gradients of parameters apart."""


@lru_cache
def measure_network(model: ModelConfig, data: DataConfig) -> Network:
    """Return the sizes of a config's backbone."""
    with without_data():
        backbone = _build(model, data)
    groups = [[p for p in backbone.parameters() if (p.ndim > 1) == is_matrix] for is_matrix in (True, False)]
    buffers = dict(backbone.named_buffers())
    statistics = [b for name, b in buffers.items() if name.endswith(("running_mean", "running_var"))]
    return Network(
        group_parameters=tuple(sum(p.numel() for p in group) for group in groups if group),
        group_tensors=tuple(len(group) for group in groups if group),
        buffer_bytes=sum(b.numel() * b.element_size() for b in buffers.values()),
        running_statistics=sum(b.numel() for b in statistics),
        batchnorm_widths=tuple(m.num_features for m in backbone.modules() if isinstance(m, _BatchNorm)),
        embedding_dim=backbone.embedding_dim,
    )


@lru_cache
def measure_passes(model: ModelConfig, data: DataConfig, precision: Precision, *, images: int) -> Passes:
    """Return the work of a forward and a backward of `images` images in train mode."""
    with without_data():
        backbone = _build(model, data).train()
        for parameter in backbone.parameters():  # made before counting starts, so that they aren't counted as new
            parameter.grad = torch.zeros_like(parameter)
        counter = WorkCounter()
        with counter:
            embeddings_BD = _forward(backbone, data, precision, images)
            num_forward, saved_bytes = counter.num_operations, counter.live_bytes
            embeddings_BD.sum().backward()
    return Passes(
        images=images,
        forward=counter.work(last=num_forward),
        backward=counter.work(first=num_forward),
        saved_bytes=saved_bytes,
        working_bytes=counter.peak_bytes - saved_bytes,
    )


@lru_cache
def measure_embedding(model: ModelConfig, data: DataConfig, precision: Precision, *, images: int) -> Work:
    """Return the work of embedding `images` images in eval mode, without gradient."""
    with without_data():
        backbone = _build(model, data).eval()
        counter = WorkCounter()
        with torch.no_grad(), counter:
            _forward(backbone, data, precision, images)
    return counter.work()


def _build(model: ModelConfig, data: DataConfig) -> Backbone:
    return build_backbone(model, channels=data.channels, image_px=data.image_px, with_values=False)


def _forward(backbone: nn.Module, data: DataConfig, precision: Precision, images: int) -> Tensor:
    images_BHWC = torch.empty(images, data.image_px, data.image_px, data.channels, dtype=torch.uint8)
    # The casts that autocast inserts are about the same on every device, and this machine may have no GPU.
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        embeddings_BD: Tensor = backbone(network_input(images_BHWC))
    return embeddings_BD
