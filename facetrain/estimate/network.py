"""What the backbone and the loss of a config hold, compute and move on one GPU, counted from their own code."""

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from facetrain.batch import network_input
from facetrain.config import DataConfig, LossConfig, ModelConfig
from facetrain.estimate.cluster import Cluster
from facetrain.estimate.counting import Work, WorkCounter, without_data
from facetrain.losses.npair import NPairLoss
from facetrain.models import Backbone, build_backbone
from facetrain.world import World

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


@dataclass(frozen=True)
class LossWork:
    """The loss on one GPU, forward and backward, given the embeddings; collectives are counted elsewhere.

    Two tiles of rows and three are counted, or as many as there are; more lie on the straight line through them.
    """

    tiles: int
    """Tiles that the logits are made in."""
    two: Work
    """With two tiles, or the one that there is."""
    three: Work
    """With three tiles, or as many as there are."""

    @property
    def peak_bytes(self) -> int:
        """The most that lives at once: gathered embeddings, tiles, and gradients of all of them."""
        return self.two.peak_bytes + max(0, self.tiles - 2) * (self.three.peak_bytes - self.two.peak_bytes)

    def seconds(self, cluster: Cluster) -> float:
        """Return the time on a GPU; the loss is float32 beside any network."""
        two_s, three_s = (work.seconds(cluster, cluster.gpu_float32_tflops) for work in (self.two, self.three))
        return two_s + max(0, self.tiles - 2) * (three_s - two_s)


def measure_loss(config: LossConfig, *, pairs: int, global_pairs: int, embedding_dim: int) -> LossWork:
    """Return the work of the loss of `pairs` local pairs among `global_pairs`."""
    rows = max(1, config.tile_bytes // (4 * global_pairs))
    two, three = (_count_loss(config, min(pairs, tiles * rows), global_pairs, embedding_dim) for tiles in (2, 3))
    return LossWork(tiles=math.ceil(pairs / rows), two=two, three=three)


@lru_cache
def _count_loss(config: LossConfig, pairs: int, global_pairs: int, embedding_dim: int) -> Work:
    with without_data():
        embeddings_VnD = torch.empty(2, pairs, embedding_dim, requires_grad=True)
        labels_n = torch.empty(pairs, dtype=torch.int64)
        loss = NPairLoss(config, _OneOfMany(others=global_pairs - pairs))
        counter = WorkCounter()
        with counter:
            value = loss(embeddings_VnD[0], embeddings_VnD[1], labels_n)
            torch.autograd.grad(value.total, embeddings_VnD)
    return counter.work()


@dataclass(frozen=True)
class _OneOfMany(World):
    """A rank among others that hold `others` rows in all, and send nothing."""

    others: int = field(kw_only=True)

    def all_gather(self, x_local: Tensor) -> Tensor:
        return torch.cat([x_local, x_local.new_empty(self.others, *x_local.shape[1:])]) if self.others else x_local

    def start_gather_with_grad(self, x_local: Tensor, *, reduce_dtype: torch.dtype | None = None) -> Any:
        return _Gathered(self.all_gather(x_local))


@dataclass(frozen=True)
class _Gathered:
    rows: Tensor

    def finish(self) -> Tensor:
        return self.rows


def _build(model: ModelConfig, data: DataConfig) -> Backbone:
    # Weights from a file change no size, and would have to be read.
    model = replace(model, imagenet_weights=None, init_from=None)
    return build_backbone(model, channels=data.channels, image_px=data.image_px)


def _forward(backbone: nn.Module, data: DataConfig, precision: Precision, images: int) -> Tensor:
    images_BHWC = torch.empty(images, data.image_px, data.image_px, data.channels, dtype=torch.uint8)
    # The casts that autocast inserts are about the same on every device, and this machine may have no GPU.
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        embeddings_BD: Tensor = backbone(network_input(images_BHWC))
    return embeddings_BD
