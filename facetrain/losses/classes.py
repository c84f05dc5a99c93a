"""Losses with a learned vector for each identity: softmax, ArcFace, Proxy-NCA.

Dims: M faces of the global batch, c classes on this rank, D embedding width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from facetrain.config import LossConfig
from facetrain.losses.class_vectors import ClassVectors, each_rank_its_classes, logsumexp_of_others, own_products
from facetrain.losses.loss import Loss
from facetrain.world import GatherInFlight, World


class ClassLoss(Loss):
    """Each face against the vectors of all identities; the mean over the M faces of all ranks.

    With embeddings f, vectors w, their unit vectors f' and w', y the face's own class, sums over all other classes j:

        softmax      log(1 + sum_j exp(<f, w_j> - <f, w_y>))
        arcface      log(1 + sum_j exp(s cos_j - s cos(angle_y + m)))        cos_j = <f', w'_j>
        proxy-nca    ||f' - w'_y||^2 + log(sum_j exp(-||f' - w'_j||^2))      squared distances times `scale`

    The first two are cross-entropies, in the form that stays exact at small losses; softmax has no bias. Proxy-NCA can
    be negative; `loss.proxy_nca.own_in_denominator` makes it a cross-entropy too. Where the angle plus the margin would
    pass pi, ArcFace's score goes on as a straight line, as its authors' code has it.

    Source: Deng et al., ArcFace: additive angular margin loss for deep face recognition, CVPR 2019, equation 3;
    Movshovitz-Attias et al., No fuss distance metric learning using proxies, ICCV 2017, equation 4.
    """

    def __init__(self, config: LossConfig, world: World, class_vectors: ClassVectors) -> None:
        super().__init__(config, world)
        self.class_vectors: ClassVectors = class_vectors

    def data_loss(
        self, anchors_nD: Tensor, positives_nD: Tensor, labels_n: Tensor, gather: GatherInFlight | None, step: int
    ) -> Tensor:
        """Return the mean over the faces of all ranks, the same on each of them."""
        faces_MD, labels_M = self.gather_faces(anchors_nD, positives_nD, labels_n)
        x_MD, y_cD = each_rank_its_classes(faces_MD, self.world), self.class_vectors.rows_cD.to(faces_MD.dtype)
        if self.config.name != "softmax":
            x_MD, y_cD = F.normalize(x_MD), F.normalize(y_cD)
        columns_M = self.class_vectors.classes_of(labels_M) - self.class_vectors.first
        own_M = own_products(x_MD, y_cD, columns_M, self.world)
        scale = self._scale()
        tile_bytes = self.config.tile_bytes
        others_M = logsumexp_of_others(scale * x_MD, y_cD, columns_M, tile_bytes=tile_bytes, world=self.world)
        if self.config.name == "arcface":
            own_M = cosine_with_margin(own_M, self.config.arcface.margin_rad)
        if self.config.name == "proxy-nca" and not self.config.proxy_nca.own_in_denominator:
            return (others_M - scale * own_M).mean()
        return F.softplus(others_M - scale * own_M).mean()

    def _scale(self) -> float:
        """Return what inner products are multiplied by; -||f' - w'||^2 is 2 <f', w'> and a constant that cancels."""
        scales = {"softmax": 1.0, "arcface": self.config.arcface.scale, "proxy-nca": 2 * self.config.proxy_nca.scale}
        return scales[self.config.name]


def cosine_with_margin(cosines: Tensor, margin_rad: float) -> Tensor:
    """Return cos(angle + margin) from cos(angle); beyond pi - margin the line cos(angle) - margin sin(margin).

    The sine's gradient is infinite at 0 and pi, so that it is kept off them by 1e-6.
    """
    sines = (1 - cosines.square()).clamp_min(1e-12).sqrt()
    beyond = cosines <= -math.cos(margin_rad)
    with_margin = cosines * math.cos(margin_rad) - sines * math.sin(margin_rad)
    return torch.where(beyond, cosines - margin_rad * math.sin(margin_rad), with_margin)
