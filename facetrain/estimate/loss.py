"""What the loss of a config holds, computes and moves on one GPU, counted from its own code.

Dims: n pairs of a rank, N of all, C trained identities, c of them with their vectors on this rank, D embedding width.
"""

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from facetrain.config import LossConfig
from facetrain.config.loss import NPAIR_LOSSES
from facetrain.estimate.cluster import Cluster
from facetrain.estimate.counting import Work, WorkCounter, without_data
from facetrain.losses.angular import AngularLoss
from facetrain.losses.class_vectors import ClassVectors
from facetrain.losses.classes import ClassLoss
from facetrain.losses.group import GroupLoss
from facetrain.losses.loss import Loss
from facetrain.losses.npair import NPairLoss
from facetrain.world import World


@dataclass(frozen=True)
class LossWork:
    """The loss on one GPU, forward and backward, given the embeddings; collectives are counted elsewhere.

    Of the N-pair losses two tiles of rows and three are counted, or as many as there are; more lie on the straight line
    through them. Others are counted whole.
    """

    tiles: int
    """Tiles that the logits of an N-pair loss are made in; 1 for others."""
    two: Work
    """With two tiles, or the one that there is."""
    three: Work
    """With three tiles, or as many as there are."""
    class_numel: int
    """Numbers of the class vectors that a rank holds, c D; 0 where the loss learns none."""
    remembered_bytes: int
    """Of the batches before, with `loss.memory_batches`."""

    @property
    def peak_bytes(self) -> int:
        """The most that lives at once: gathered embeddings, tiles, and gradients of all of them.

        Without the gradient of class vectors, which goes on to live until they are updated.
        """
        peak_bytes = self.two.peak_bytes + max(0, self.tiles - 2) * (self.three.peak_bytes - self.two.peak_bytes)
        return peak_bytes - 4 * self.class_numel

    def seconds(self, cluster: Cluster) -> float:
        """Return the time on a GPU; the loss is float32 beside any network."""
        two_s, three_s = (work.seconds(cluster, cluster.gpu_float32_tflops) for work in (self.two, self.three))
        return two_s + max(0, self.tiles - 2) * (three_s - two_s)


def measure_loss(
    config: LossConfig, *, pairs: int, global_pairs: int, embedding_dim: int, classes: int = 0
) -> LossWork:
    """Return the work of the loss.

    Args:
        config: The section `loss`.
        pairs: n.
        global_pairs: N.
        embedding_dim: D.
        classes: c, of losses that learn a vector for each class.

    Raises:
        ValueError: The loss is one of pytorch-metric-learning's, whose work depends on the embeddings.
    """
    sizes = {"global_pairs": global_pairs, "embedding_dim": embedding_dim, "classes": classes}
    held = {
        "class_numel": classes * embedding_dim if config.has_classes else 0,
        "remembered_bytes": config.memory_batches * global_pairs * (4 * embedding_dim + 8),
    }
    if config.name not in NPAIR_LOSSES:
        work = _count_loss(config, pairs=pairs, **sizes)
        return LossWork(tiles=1, two=work, three=work, **held)
    rows = max(1, config.tile_bytes // (4 * global_pairs * (1 + config.memory_batches)))
    two, three = (_count_loss(config, pairs=min(pairs, tiles * rows), **sizes) for tiles in (2, 3))
    return LossWork(tiles=math.ceil(pairs / rows), two=two, three=three, **held)


@lru_cache
def _count_loss(config: LossConfig, *, pairs: int, global_pairs: int, embedding_dim: int, classes: int) -> Work:
    with without_data():
        embeddings_VnD = torch.empty(2, pairs, embedding_dim, requires_grad=True)
        loss = _build(config, _OneOfMany(others=global_pairs - pairs), classes, embedding_dim)
        if config.memory_batches:
            labels_BN = torch.empty(config.memory_batches, global_pairs, dtype=torch.int64)
            loss.load_state({"labels": labels_BN, "rows": torch.empty(*labels_BN.shape, embedding_dim)})
        learned = [loss.class_vectors.rows_cD] if loss.class_vectors is not None else []
        labels_n = torch.empty(pairs, dtype=torch.int64)
        counter = WorkCounter()
        with counter:
            value = loss(embeddings_VnD[0], embeddings_VnD[1], labels_n)
            torch.autograd.grad(value.total, [embeddings_VnD, *learned])
    return counter.work()


def _build(config: LossConfig, world: World, classes: int, embedding_dim: int) -> Loss:
    if config.name in NPAIR_LOSSES:
        return NPairLoss(config, world)
    if config.name in ("angular", "npair-angular"):
        return AngularLoss(config, world)
    if not config.has_classes:
        raise ValueError(
            "loss.name: estimated are all but those of pytorch-metric-learning, whose work depends on the"
            f" embeddings; got '{config.name}'"
        )
    vectors = _VectorsWithoutData(classes, embedding_dim)
    return GroupLoss(config, world, vectors, seed=0) if config.name == "group" else ClassLoss(config, world, vectors)


class _VectorsWithoutData(ClassVectors):
    """The vectors of a rank, which nobody draws."""

    def __init__(self, classes: int, embedding_dim: int) -> None:
        self.first, self.end = 0, classes
        self.rows_cD = torch.empty(classes, embedding_dim, requires_grad=True)
        self._identities_C = torch.empty(classes, dtype=torch.int64)


@dataclass(frozen=True)
class _OneOfMany(World):
    """A rank among others that hold `others` rows in all, and send nothing."""

    others: int = field(kw_only=True)

    def all_gather(self, x_local: Tensor) -> Tensor:
        return torch.cat([x_local, x_local.new_empty(self.others, *x_local.shape[1:])]) if self.others else x_local

    def all_gather_with_grad(self, x_local: Tensor, *, reduce_dtype: torch.dtype | None = None) -> Tensor:
        return self.all_gather(x_local)

    def start_gather_with_grad(self, x_local: Tensor, *, reduce_dtype: torch.dtype | None = None) -> Any:
        return _Gathered(self.all_gather(x_local))


@dataclass(frozen=True)
class _Gathered:
    rows: Tensor

    def finish(self) -> Tensor:
        return self.rows
