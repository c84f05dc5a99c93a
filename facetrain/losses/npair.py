"""The multi-class N-pair loss over the pairs of all ranks.

Dims: n pairs on this rank, N pairs of the global batch (N = n * world size), D width of the embedding.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from facetrain.config import LossConfig
from facetrain.world import World


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
    """N-pair-mc with its penalty on the norms, for row-local anchors and the positives of all ranks."""

    def __init__(self, config: LossConfig, world: World) -> None:
        self.l2_weight = config.l2_weight
        self.tile_bytes = config.tile_bytes
        self.world = world

    def __call__(self, anchors_nD: Tensor, positives_nD: Tensor, labels_n: Tensor) -> LossValue:
        """Return this rank's share of the loss of the global batch.

        Only the positives travel: they are gathered with gradient, so that averaging parameter gradients over ranks
        (what DeepSpeed does) gives the gradient of the global batch. Sums are divided by constants (n, 2n), never by
        what happens to be in the batch.

        Args:
            anchors_nD: Embeddings, not normalised; bf16 is raised to float32, float64 is kept.
            positives_nD: Embeddings of the same identities, row by row.
            labels_n: int64; pairs with one label are no negatives of each other.
        """
        with torch.autocast(anchors_nD.device.type, enabled=False):
            anchors_nD, positives_nD = _at_least_float32(anchors_nD), _at_least_float32(positives_nD)
            # Over all ranks; each ends with all N positives and labels, in rank order.
            positives_ND = self.world.all_gather_with_grad(positives_nD)
            labels_N = self.world.all_gather(labels_n)
            rows_n = npair_mc_rows(anchors_nD, positives_nD, positives_ND, labels_n, labels_N, self.tile_bytes)
            npair = rows_n.sum() / len(rows_n)
            squared_norm = (anchors_nD.square().sum() + positives_nD.square().sum()) / (2 * len(rows_n))
            total = npair + self.l2_weight * squared_norm
        return LossValue(total=total, npair=npair.detach(), squared_norm=squared_norm.detach())


def npair_mc_rows(
    anchors_nD: Tensor,
    positives_nD: Tensor,
    positives_ND: Tensor,
    labels_n: Tensor,
    labels_N: Tensor,
    tile_bytes: int = LossConfig.tile_bytes,
) -> Tensor:
    """Return log(1 + sum_j exp(<f_i, p_j> - <f_i, p_i>)) for each local anchor i, over all j of another identity.

    Computed as softplus(logsumexp_j s_ij - s_ii). The own positive never enters the logsumexp: written as a
    cross-entropy the attracting gradient p_ii - 1 cancels once the loss is small (it is lost below about 1e-7 in
    float32), and written as in the formula the exponential overflows. A row without negatives has loss 0, gradient 0.

    Args:
        anchors_nD: Local anchors, [n, D].
        positives_nD: Their positives, row by row, [n, D].
        positives_ND: The positives of all ranks, [N, D].
        labels_n: int64, identities of the local rows.
        labels_N: int64, identities of the gathered rows.
        tile_bytes: Size of a tile of logits, 1 or more; about two tiles exist at a time, in forward and in backward.

    Returns:
        [n], in the dtype of the embeddings.

    Source: Sohn, Improved deep metric learning with multi-class N-pair loss objective, NeurIPS 2016, equation 7.
    """
    negatives_n: Tensor = _NegativesLogsumexp.apply(anchors_nD, positives_ND, labels_n, labels_N, tile_bytes)
    own_n = (anchors_nD * positives_nD).sum(dim=1)
    return -F.logsigmoid(own_n - negatives_n)


class _NegativesLogsumexp(torch.autograd.Function):
    """logsumexp over j of <f_i, p_j>, without the j of i's own identity; -inf for a row without negatives.

    All tensors are local. No more than a tile of rows of the n x N logits exists at a time: forward keeps one number
    a row, and backward computes each tile again, so that memory doesn't grow with n.
    """

    @staticmethod
    def forward(
        ctx: Any, anchors_nD: Tensor, positives_ND: Tensor, labels_n: Tensor, labels_N: Tensor, tile_bytes: int
    ) -> Tensor:
        ctx.rows = max(1, tile_bytes // (len(positives_ND) * anchors_nD.element_size()))
        tiles = zip(anchors_nD.split(ctx.rows), labels_n.split(ctx.rows), strict=True)
        sums_n = torch.cat([_negative_logits(a, positives_ND, y, labels_N).logsumexp(dim=1) for a, y in tiles])
        ctx.save_for_backward(anchors_nD, positives_ND, labels_n, labels_N, sums_n)
        return sums_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_n: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        anchors_nD, positives_ND, labels_n, labels_N, sums_n = ctx.saved_tensors
        grad_anchors_nD, grad_positives_ND = torch.empty_like(anchors_nD), torch.zeros_like(positives_ND)
        # A row without negatives has no gradient: exp(-inf - inf) is 0, where exp(-inf - -inf) would be NaN.
        shifts_n = sums_n.masked_fill(sums_n.isneginf(), torch.inf)
        for start in range(0, len(anchors_nD), ctx.rows):
            tile = slice(start, start + ctx.rows)
            softmax_tN = _negative_logits(anchors_nD[tile], positives_ND, labels_n[tile], labels_N)
            softmax_tN.sub_(shifts_n[tile, None]).exp_().mul_(grad_n[tile, None])
            torch.mm(softmax_tN, positives_ND, out=grad_anchors_nD[tile])
            grad_positives_ND.addmm_(softmax_tN.T, anchors_nD[tile])
        return grad_anchors_nD, grad_positives_ND, None, None, None


def _negative_logits(anchors_tD: Tensor, positives_ND: Tensor, labels_t: Tensor, labels_N: Tensor) -> Tensor:
    logits_tN = anchors_tD @ positives_ND.T
    return logits_tN.masked_fill_(labels_t[:, None] == labels_N[None, :], -torch.inf)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
