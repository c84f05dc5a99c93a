"""The multi-class N-pair loss and its relatives over the pairs of all ranks.

Dims: n pairs on this rank, N pairs of the global batch (N = n * world size), D embedding width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from facetrain.config import LossConfig
from facetrain.losses.logit_tiles import one_vs_all, one_vs_one, rows_and_columns, sum_of_rows
from facetrain.world import GatherInFlight, World


@dataclass(frozen=True)
class LossValue:
    """This rank's share of the global loss: averaged over the ranks, each field is that of the global batch."""

    total: Tensor
    """What is differentiated: npair + l2_weight * mean squared norm. Scalar."""
    npair: Tensor
    """The N-pair loss alone, detached. Scalar."""
    squared_norm: Tensor
    """Mean ||f||^2 over the 2n embeddings, detached. Scalar."""


class NPairLoss:
    """N-pair-mc, N-pair-ovo or (N+1)-tuplet with a penalty on the norms; row-local anchors, negatives of all ranks.

    With anchors f_i, positives p_i, and sums over the j of other identities than i's:

        npair-mc    log(1 + sum_j exp(<f_i, p_j> - <f_i, p_i>))
        npair-ovo   sum_j log(1 + exp(<f_i, p_j> - <f_i, p_i>))
        tuplet      log(1 + sum_j exp(<f_i, f_j> - <f_i, p_i>))     negatives are the other pairs' anchors

    `loss.symmetric` (npair-mc) takes the mean of this and of the same with anchors and positives in each other's
    place. With `loss.temperature` inner products are cosines over the temperature; the penalty stays on raw norms.

    Source: Sohn, Improved deep metric learning with multi-class N-pair loss objective, NeurIPS 2016, equations 3, 7, 8.
    """

    def __init__(self, config: LossConfig, world: World) -> None:
        self.config = config
        self.world = world

    def start_gather(self, positives_nD: Tensor) -> GatherInFlight:
        """Start to gather what every rank needs of the others; what is computed before the loss runs beside it."""
        dtypes = {"float32": None, "bfloat16": torch.bfloat16}
        with torch.autocast(positives_nD.device.type, enabled=False):
            gathered = _at_least_float32(positives_nD)
            return self.world.start_gather_with_grad(gathered, reduce_dtype=dtypes[self.config.reduce_precision])

    def __call__(
        self, anchors_nD: Tensor, positives_nD: Tensor, labels_n: Tensor, gather: GatherInFlight | None = None
    ) -> LossValue:
        """Return this rank's share of the loss of the global batch.

        Only one side travels, the positives (tuplet: the anchors): it is gathered with gradient, so that averaging
        parameter gradients over ranks (what DeepSpeed does) gives the gradient of the global batch. Sums are divided
        by constants (n, 2n), never by what happens to be in the batch.

        Args:
            anchors_nD: Embeddings, not normalised; bf16 is raised to float32, float64 is kept.
            positives_nD: Embeddings of the same identities, row by row.
            labels_n: int64; pairs with one label are no negatives of each other.
            gather: What `start_gather` returned for these positives (tuplet: anchors); None gathers now.
        """
        config = self.config
        with torch.autocast(anchors_nD.device.type, enabled=False):
            anchors_nD, positives_nD = _at_least_float32(anchors_nD), _at_least_float32(positives_nD)
            penalised = (anchors_nD, positives_nD) if config.l2_weight else (anchors_nD.detach(), positives_nD.detach())
            squared_norm = sum(_SquaredSum.apply(x_nD) for x_nD in penalised) / (2 * len(anchors_nD))
            # Over all ranks; each ends with all N negatives and labels, in rank order.
            gather = gather or self.start_gather(anchors_nD if config.name == "tuplet" else positives_nD)
            labels_N, negatives_ND = self.world.all_gather(labels_n), gather.finish()
            if config.temperature is not None:
                anchors_nD = F.normalize(anchors_nD) / config.temperature
                positives_nD, negatives_ND = F.normalize(positives_nD), F.normalize(negatives_ND)
            npair = self._sum(anchors_nD, positives_nD, negatives_ND, labels_n, labels_N) / len(anchors_nD)
            total = npair + config.l2_weight * squared_norm if config.l2_weight else npair
        return LossValue(total=total, npair=npair.detach(), squared_norm=squared_norm.detach())

    def _sum(
        self, anchors_nD: Tensor, positives_nD: Tensor, negatives_ND: Tensor, labels_n: Tensor, labels_N: Tensor
    ) -> Tensor:
        """Return the sum of the local pairs' losses."""
        tile_bytes = self.config.tile_bytes
        if self.config.symmetric:
            rows_n, columns_n = rows_and_columns(
                anchors_nD, negatives_ND, labels_n, labels_N, tile_bytes=tile_bytes, world=self.world
            )
            own_n = _own_scores(anchors_nD, positives_nD)
            return -0.5 * (F.logsigmoid(own_n - rows_n) + F.logsigmoid(own_n - columns_n)).sum()
        return sum_of_rows(
            one_vs_one if self.config.name == "npair-ovo" else one_vs_all,
            anchors_nD,
            negatives_ND,
            labels_n,
            labels_N,
            first=self.world.rank * len(anchors_nD),
            own_n=_own_scores(anchors_nD, positives_nD) if self.config.name == "tuplet" else None,
            tile_bytes=tile_bytes,
        )


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


def _own_scores(anchors_nD: Tensor, positives_nD: Tensor) -> Tensor:
    return (anchors_nD * positives_nD).sum(dim=1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
