"""The multi-class N-pair loss over the pairs of all ranks.

Dims: n pairs on this rank, N pairs of the global batch (N = n * world size), D width of the embedding.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

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
            rows_n = npair_mc_rows(anchors_nD, positives_nD, positives_ND, labels_n, labels_N)
            npair = rows_n.sum() / len(rows_n)
            squared_norm = (anchors_nD.square().sum() + positives_nD.square().sum()) / (2 * len(rows_n))
            total = npair + self.l2_weight * squared_norm
        return LossValue(total=total, npair=npair.detach(), squared_norm=squared_norm.detach())


def npair_mc_rows(
    anchors_nD: Tensor, positives_nD: Tensor, positives_ND: Tensor, labels_n: Tensor, labels_N: Tensor
) -> Tensor:
    """Return log(1 + sum_j exp(<f_i, p_j> - <f_i, p_i>)) for each local anchor i, over all j of another identity.

    Computed as softplus(logsumexp_j s_ij - s_ii). The own positive never enters the logsumexp: written as a
    cross-entropy the attracting gradient p_ii - 1 cancels once the loss is small (it is lost below about 1e-7 in
    float32), and written as in the formula the exponential overflows. A row without negatives has loss 0, gradient 0.

    Returns:
        [n], in the dtype of the embeddings.

    Source: Sohn, Improved deep metric learning with multi-class N-pair loss objective, NeurIPS 2016, equation 7.
    """
    logits_nN = anchors_nD @ positives_ND.T
    same_identity_nN = labels_n[:, None] == labels_N[None, :]
    negatives_n = logits_nN.masked_fill(same_identity_nN, -torch.inf).logsumexp(dim=1)
    own_n = (anchors_nD * positives_nD).sum(dim=1)
    return -F.logsigmoid(own_n - negatives_n)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
