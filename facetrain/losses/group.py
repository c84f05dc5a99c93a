"""The Group Loss over the faces of all ranks.

Dims: M faces of the global batch, c classes on this rank, D embedding width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from facetrain.config import LossConfig
from facetrain.losses.class_vectors import (
    ClassVectors,
    each_rank_its_classes,
    logsumexp_of_others,
    own_entries,
    own_products,
    sum_over_ranks,
)
from facetrain.losses.loss import Loss, generator_of_step
from facetrain.world import GatherInFlight, World


class GroupLoss(Loss):
    """A classifier whose answers for a batch are refined by how alike its faces are.

    X = softmax(logits / T) over all classes; of each identity some faces, the anchors, are set to their class. W is the
    Pearson correlation of the embeddings of each two faces, 0 where it is negative, and 1 on the diagonal. Repeated:

        X <- X * (W X), each row divided by its sum

    The loss is the mean of -log(X_iy + 1e-12) over all faces, anchors included, plus the cross-entropy of the logits
    without T. The classifier has no bias. Gradients go through W and X. Each rank holds the columns of its classes.

    Source: Elezi et al., The Group Loss for deep metric learning, ECCV 2020, equations 2 to 6.
    """

    def __init__(self, config: LossConfig, world: World, class_vectors: ClassVectors, *, seed: int) -> None:
        super().__init__(config, world)
        self.class_vectors: ClassVectors = class_vectors
        self.seed = seed

    def data_loss(
        self, anchors_nD: Tensor, positives_nD: Tensor, labels_n: Tensor, gather: GatherInFlight | None, step: int
    ) -> Tensor:
        """Return the mean over the faces of all ranks, the same on each of them."""
        settings, world, vectors = self.config.group, self.world, self.class_vectors
        faces_MD, labels_M = self.gather_faces(anchors_nD, positives_nD, labels_n)
        faces_MD, y_cD = each_rank_its_classes(faces_MD, world), vectors.rows_cD.to(faces_MD.dtype)
        columns_M = vectors.classes_of(labels_M) - vectors.first
        others_M = logsumexp_of_others(faces_MD, y_cD, columns_M, tile_bytes=self.config.tile_bytes, world=world)
        cross_entropy = F.softplus(others_M - own_products(faces_MD, y_cD, columns_M, world)).mean()

        logits_Mc = faces_MD @ y_cD.T / settings.temperature
        maxima_M = world.all_reduce_max_(logits_Mc.detach().amax(dim=1))
        answers_Mc = self._normalised((logits_Mc - maxima_M[:, None]).exp())
        is_own_Mc = torch.arange(len(y_cD), device=faces_MD.device) == columns_M[:, None]
        is_anchor_M = draw_anchors(labels_M, settings.anchors, seed=self.seed, step=step)
        answers_Mc = torch.where(is_anchor_M[:, None], is_own_Mc.to(answers_Mc.dtype), answers_Mc)
        alike_MM = likeness(faces_MD)
        for _ in range(settings.iterations):
            answers_Mc = self._normalised(answers_Mc * (alike_MM @ answers_Mc))
        return cross_entropy - (own_entries(answers_Mc, columns_M, world) + 1e-12).log().mean()

    def _normalised(self, x_Mc: Tensor) -> Tensor:
        """Return the rows, which go on over all ranks' columns, divided by their sums."""
        return x_Mc / sum_over_ranks(x_Mc.sum(dim=1), self.world, for_own_classes=True)[:, None]


def likeness(x_MD: Tensor) -> Tensor:
    """Return the correlation of each two rows where it is positive, else 0, [M, M]; 1 on the diagonal.

    A constant row correlates with no other; without its 1 nothing would be left of its answer.
    """
    centred_MD = F.normalize(x_MD - x_MD.mean(dim=1, keepdim=True))
    is_self_MM = torch.eye(len(x_MD), dtype=torch.bool, device=x_MD.device)
    return (centred_MD @ centred_MD.T).relu().masked_fill(is_self_MM, 1.0)


def draw_anchors(labels_M: Tensor, anchors: int, *, seed: int, step: int) -> Tensor:
    """Return which faces are anchors, bool [M]: so many of each label, drawn by (seed, step), the same on all ranks."""
    keys_M = torch.rand(len(labels_M), generator=generator_of_step(seed, step)).to(labels_M.device)
    is_before_MM = (labels_M[:, None] == labels_M) & (keys_M < keys_M[:, None])
    return is_before_MM.sum(dim=1) < anchors
