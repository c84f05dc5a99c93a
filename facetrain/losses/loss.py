"""What every loss is: a share of the loss of the global batch, from this rank's embeddings.

Dims: n pairs on this rank, N pairs of the global batch, M = 2N faces of it, D embedding width.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from facetrain.config import LossConfig
from facetrain.losses.class_vectors import ClassVectors
from facetrain.world import GatherInFlight, World

_LOSS_STREAM = 0x6C6F7373
"""Keeps the random numbers of losses apart from those of dropout, which are of the same seed and step."""


@dataclass(frozen=True)
class LossValue:
    """This rank's share of the global loss: averaged over the ranks, each field is that of the global batch."""

    total: Tensor
    """What is differentiated: data + l2_weight * mean squared norm. Scalar."""
    data: Tensor
    """The loss alone, detached. Scalar."""
    squared_norm: Tensor
    """Mean ||f||^2 over the 2n embeddings, detached. Scalar."""


class Loss(ABC):
    """A function of the embeddings of all ranks, with a penalty on their norms.

    Averaged over the ranks, values and gradients of the network's parameters are those of one process with the whole
    batch, for any number of ranks.
    """

    class_vectors: ClassVectors | None = None
    """What the loss learns beside the network, where it does."""

    def __init__(self, config: LossConfig, world: World) -> None:
        self.config = config
        self.world = world

    @abstractmethod
    def data_loss(
        self, anchors_nD: Tensor, positives_nD: Tensor, labels_n: Tensor, gather: GatherInFlight | None, step: int
    ) -> Tensor:
        """Return this rank's share of the loss without the penalty. Embeddings are float32 or float64."""

    def start_gather(self, positives_nD: Tensor) -> GatherInFlight:
        """Start to gather what every rank needs of the others; what is computed before the loss runs beside it."""
        with torch.autocast(positives_nD.device.type, enabled=False):
            gathered = at_least_float32(positives_nD)
            return self.world.start_gather_with_grad(gathered, reduce_dtype=self._reduce_dtype)

    def __call__(
        self,
        anchors_nD: Tensor,
        positives_nD: Tensor,
        labels_n: Tensor,
        gather: GatherInFlight | None = None,
        *,
        step: int = 0,
    ) -> LossValue:
        """Return this rank's share of the loss of the global batch.

        Args:
            anchors_nD: Embeddings, not normalised; bf16 is raised to float32, float64 is kept.
            positives_nD: Embeddings of the same identities, row by row.
            labels_n: int64; pairs with one label are of one identity.
            gather: What `start_gather` returned for these positives; None gathers now.
            step: The optimizer step, for losses that draw at random: the same draws on every rank.
        """
        l2_weight = self.config.l2_weight
        with torch.autocast(anchors_nD.device.type, enabled=False):
            anchors_nD, positives_nD = at_least_float32(anchors_nD), at_least_float32(positives_nD)
            penalised = (anchors_nD, positives_nD) if l2_weight else (anchors_nD.detach(), positives_nD.detach())
            squared_norm: Tensor = sum(_SquaredSum.apply(x_nD) for x_nD in penalised) / (2 * len(anchors_nD))
            data = self.data_loss(anchors_nD, positives_nD, labels_n, gather, step)
            total = data + l2_weight * squared_norm if l2_weight else data
        return LossValue(total=total, data=data.detach(), squared_norm=squared_norm.detach())

    def state(self) -> dict[str, Tensor]:
        """Return what resume needs of the loss, as whole CPU tensors; empty where it holds nothing. Over all ranks."""
        return self.class_vectors.state() if self.class_vectors is not None else {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave, at any number of ranks.

        Raises:
            ValueError: It is of another loss, of other classes, or of embeddings of another width.
        """
        if self.class_vectors is not None:
            self.class_vectors.load(state)

    def gather_faces(self, anchors_nD: Tensor, positives_nD: Tensor, labels_n: Tensor) -> tuple[Tensor, Tensor]:
        """Return all ranks' embeddings [M, D], with gradient, and labels [M]; an identity's faces in a row."""
        pairs_n2D = torch.stack([anchors_nD, positives_nD], dim=1)
        pairs_N2D = self.world.all_gather_with_grad(pairs_n2D, reduce_dtype=self._reduce_dtype)
        return pairs_N2D.flatten(0, 1), self.world.all_gather(labels_n).repeat_interleave(2)

    @property
    def _reduce_dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if self.config.reduce_precision == "bfloat16" else None


def generator_of_step(seed: int, step: int) -> torch.Generator:
    """Return random numbers of (seed, step) on the CPU, the same on all ranks; seed and step are 0 or more."""
    # Of a seed, torch's generator takes the low 32 bits alone.
    mixed = np.random.SeedSequence([seed, step, _LOSS_STREAM]).generate_state(1)[0]
    return torch.Generator().manual_seed(int(mixed))


def at_least_float32(x: Tensor) -> Tensor:
    """Return x as float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


class _SquaredSum(torch.autograd.Function):
    """The sum of squares, without a temporary as large as the tensor in forward, with one in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.dot(x.reshape(-1), x.reshape(-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        return x * (2 * grad)
