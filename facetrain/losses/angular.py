"""The angular loss over the pairs of all ranks, alone and beside N-pair.

Dims: n pairs on this rank, N pairs of the global batch, M = 2N faces of it, D embedding width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from facetrain.losses.logit_tiles import one_vs_all, sum_of_rows
from facetrain.losses.loss import Loss
from facetrain.world import GatherInFlight


class AngularLoss(Loss):
    """The angular loss in its batch form, on unit vectors, and N-pair & angular.

    With t = tan^2(alpha), unit anchors a_i and positives p_i, and sums over the embeddings x of other identities:

        angular          log(1 + sum_x exp(4 t <a_i + p_i, x> - 2 (1 + t) <a_i, p_i>))
        npair-angular    npair-mc on the raw embeddings + weight * angular

    x runs over all 2 (N - 1) embeddings, or over the positives alone (`loss.angular.negatives`). The constant of the
    hinge form that this bounds is dropped.

    Source: Wang et al., Deep metric learning with angular loss, ICCV 2017, equations 6 to 8.
    """

    def data_loss(
        self, anchors_nD: Tensor, positives_nD: Tensor, labels_n: Tensor, gather: GatherInFlight | None, step: int
    ) -> Tensor:
        """Return the mean over the local pairs; both sides are gathered."""
        faces_MD, labels_M = self.gather_faces(anchors_nD, positives_nD, labels_n)  # anchor, positive, anchor, ...
        angular = self._angular(anchors_nD, positives_nD, labels_n, faces_MD, labels_M)
        if self.config.name == "angular":
            return angular / len(anchors_nD)
        npair = sum_of_rows(
            one_vs_all,
            anchors_nD,
            faces_MD[1::2],
            labels_n,
            labels_M[1::2],
            first=self.world.rank * len(anchors_nD),
            tile_bytes=self.config.tile_bytes,
        )
        return (npair + self.config.angular.weight * angular) / len(anchors_nD)

    def _angular(
        self, anchors_nD: Tensor, positives_nD: Tensor, labels_n: Tensor, faces_MD: Tensor, labels_M: Tensor
    ) -> Tensor:
        """Return the sum over the local pairs."""
        every = slice(None) if self.config.angular.negatives == "all" else slice(1, None, 2)
        tan2 = math.tan(math.radians(self.config.angular.angle_deg)) ** 2
        anchors_nD, positives_nD = F.normalize(anchors_nD), F.normalize(positives_nD)
        return sum_of_rows(
            one_vs_all,
            4 * tan2 * (anchors_nD + positives_nD),
            F.normalize(faces_MD[every]),
            labels_n,
            labels_M[every],
            own_n=2 * (1 + tan2) * torch.linalg.vecdot(anchors_nD, positives_nD),
            tile_bytes=self.config.tile_bytes,
        )
