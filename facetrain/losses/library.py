"""LibraryLoss: losses of pytorch-metric-learning over the faces of all ranks. Its sole importer.

Dims: M faces of the global batch, T triplets, D embedding width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from facetrain.config import LossConfig
from facetrain.losses.loss import Loss, generator_of_step
from facetrain.world import GatherInFlight, World

Indices = tuple[Tensor, ...] | None
"""Triplets, or positive and negative pairs, as the library passes them; None: all."""


class LibraryLoss(Loss):
    """contrastive, triplet, lifted, ranked-list, multi-similarity, on unit vectors.

    Every rank computes the loss of all faces: the same value and gradient everywhere, of which it keeps its own rows'.
    That is exact, and costs on W ranks W times the work of one; it is meant for batches of some hundred faces.
    docs/methods.md says what each is, and where it differs from its paper.
    """

    def __init__(self, config: LossConfig, world: World, *, seed: int) -> None:
        """Find the loss in the library, which takes a second to import."""
        import pytorch_metric_learning as library
        import pytorch_metric_learning.losses
        import pytorch_metric_learning.miners  # which also imports the distances and reducers

        super().__init__(config, world)
        self.seed = seed
        self._function, self._mine = _FUNCTIONS[config.name](config, library)

    def data_loss(
        self, anchors_nD: Tensor, positives_nD: Tensor, labels_n: Tensor, gather: GatherInFlight | None, step: int
    ) -> Tensor:
        """Return the loss of all ranks' faces, the same on each of them."""
        faces_MD, labels_M = self.gather_faces(anchors_nD, positives_nD, labels_n)
        if self.config.name == "triplet" and self.config.triplet.mining == "random":
            indices: Indices = random_triplets(labels_M, seed=self.seed, step=step)
        else:
            indices = self._mine(faces_MD.detach(), labels_M) if self._mine else None
        loss: Tensor = self._function(faces_MD, labels_M, indices)
        return loss


def random_triplets(labels_M: Tensor, *, seed: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a random positive and a random negative of each face, [M] each, by (seed, step): the same on all ranks.

    A face without either makes no triplet.
    """
    shape = (2, len(labels_M), len(labels_M))
    keys_2MM = torch.rand(shape, generator=generator_of_step(seed, step)).to(labels_M.device)
    is_same_MM = labels_M[:, None] == labels_M
    is_other_MM = ~torch.eye(len(labels_M), dtype=torch.bool, device=labels_M.device)
    masks_2MM = torch.stack([is_same_MM & is_other_MM, ~is_same_MM])
    largest = keys_2MM.masked_fill(~masks_2MM, -1.0).max(dim=2)
    anchors_T = (largest.values >= 0).all(dim=0).nonzero()[:, 0]
    positives_T, negatives_T = largest.indices[:, anchors_T]
    return anchors_T, positives_T, negatives_T


Function = Callable[[Tensor, Tensor, Indices], Tensor]
Miner = Callable[[Tensor, Tensor], Indices]


def _euclidean(library: Any, *, power: int = 1) -> Any:
    """Return distances of unit vectors, each from the difference of its two.

    From 26 faces on the library's own come from inner products: in float32 nothing is right of a distance of 1e-3.
    """

    class Distance(library.distances.LpDistance):  # type: ignore[misc]
        def compute_mat(self, query_emb: Tensor, ref_emb: Tensor | None) -> Tensor:
            others = query_emb if ref_emb is None else ref_emb
            return torch.cdist(query_emb, others, p=self.p, compute_mode="donot_use_mm_for_euclid_dist")

    return Distance(power=power)


def _contrastive(config: LossConfig, library: Any) -> tuple[Function, Miner | None]:
    margin, distance = config.contrastive.margin, _euclidean(library)
    return library.losses.ContrastiveLoss(pos_margin=0.0, neg_margin=margin, distance=distance), None


def _triplet(config: LossConfig, library: Any) -> tuple[Function, Miner | None]:
    settings, squared = config.triplet, _euclidean(library, power=2)
    mean = library.reducers.MeanReducer()
    function = library.losses.TripletMarginLoss(margin=settings.margin, distance=squared, reducer=mean)
    miners = {
        "random": None,
        "semi-hard": library.miners.TripletMarginMiner(settings.margin, "semihard", distance=squared),
        "batch-hard": library.miners.BatchHardMiner(distance=squared),
    }
    return function, miners[settings.mining]


def _lifted(config: LossConfig, library: Any) -> tuple[Function, Miner | None]:
    margin, distance = config.lifted.margin, _euclidean(library)
    return library.losses.LiftedStructureLoss(neg_margin=margin, pos_margin=0.0, distance=distance), None


def _ranked_list(config: LossConfig, library: Any) -> tuple[Function, Miner | None]:
    settings = config.ranked_list
    function = library.losses.RankedListLoss(
        margin=settings.margin,
        Tn=settings.temperature,
        imbalance=settings.negative_share,
        alpha=settings.alpha,
        distance=_euclidean(library),
    )
    return function, None


def _multi_similarity(config: LossConfig, library: Any) -> tuple[Function, Miner | None]:
    settings = config.multi_similarity
    function = library.losses.MultiSimilarityLoss(alpha=settings.alpha, beta=settings.beta, base=settings.base)
    return function, library.miners.MultiSimilarityMiner(epsilon=settings.epsilon)


_FUNCTIONS: dict[str, Callable[[LossConfig, Any], tuple[Function, Miner | None]]] = {
    "contrastive": _contrastive,
    "triplet": _triplet,
    "lifted": _lifted,
    "ranked-list": _ranked_list,
    "multi-similarity": _multi_similarity,
}
