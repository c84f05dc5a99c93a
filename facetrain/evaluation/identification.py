"""Identification: who is this, among the people of a gallery? Ranks of people, CMC and DIR@FAR, all exact.

Dims: P genuine probes, I impostor probes, G gallery images, K people in the gallery, D width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facetrain.evaluation.threshold import AcceptRate, OperatingPoint, at_far, at_threshold
from facetrain.search import group_maxima, top_k

Embeddings = NDArray[np.float32]
"""[n, D], unit vectors, so that inner products are cosine similarities."""


@dataclass(frozen=True, eq=False)
class ClosedSet:
    """Where every probe's person is in the gallery: the rank of that person for each probe."""

    ranks: NDArray[np.int64]
    """From 1, which is best."""
    gallery: int
    """Gallery images."""
    people: NDArray[np.int64]
    """The person of each probe."""
    own_scores: NDArray[np.float32]
    """Best score of the own person for each probe."""
    probe_rows: NDArray[np.int64]
    """The image of each probe, a row of the set."""

    def rank_rate(self, rank: int) -> float:
        """Return the share of probes of this rank or better, in [0, 1]."""
        return float(np.mean(self.ranks <= rank))

    def cmc(self, max_rank: int) -> NDArray[np.float64]:
        """Return the shares of probes of rank 1, 2, ... max_rank or better."""
        counts = np.bincount(self.ranks, minlength=max_rank + 1)[1 : max_rank + 1]
        return counts.cumsum() / len(self.ranks)

    def figures(self) -> dict[str, float]:
        """Return the figures by their metric keys, without the counts."""
        return {"rank1": self.rank_rate(1), "rank5": self.rank_rate(5)}


@dataclass(frozen=True, eq=False)
class OpenSet:
    """Where some probes' people aren't in the gallery: genuine probes by rank and score, impostors by best score."""

    ranks: NDArray[np.int64]
    """Rank of the own person of each genuine probe, from 1."""
    own_scores: NDArray[np.float32]
    """Best score of the own person for each genuine probe."""
    impostor_scores: NDArray[np.float32]
    """Best score of anybody in the gallery for each impostor probe."""
    gallery: int
    """Gallery images."""
    people: NDArray[np.int64]
    """The person of each genuine probe."""
    impostor_people: NDArray[np.int64]
    """The person of each impostor probe."""
    probe_rows: NDArray[np.int64]
    """The image of each genuine probe, a row of the set."""
    impostor_rows: NDArray[np.int64]
    """The image of each impostor probe."""

    @property
    def rank1(self) -> float:
        """The share of genuine probes of rank 1, without a threshold."""
        return float(np.mean(self.ranks <= 1))

    def dir_at_far(self, far: float, rank: int = 1) -> AcceptRate:
        """Return DIR: the share of genuine probes found at this rank or better with a score at the FAR's threshold.

        Raises:
            ValueError: too few impostor probes for the FAR.
        """
        return self._rate(at_far(self.impostor_scores, far), rank)

    def dir_at_threshold(self, threshold: float, rank: int = 1) -> AcceptRate:
        """Return DIR at a given threshold."""
        return self._rate(at_threshold(self.impostor_scores, threshold), rank)

    def dir_curve(self, rank: int = 1) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return realised FARs, ascending, and the DIR at each: one point for each distinct impostor score."""
        impostor = np.sort(self.impostor_scores)
        found = np.sort(self.own_scores[self.ranks <= rank])
        thresholds = np.unique(impostor)[::-1]
        far = (len(impostor) - np.searchsorted(impostor, thresholds)) / len(impostor)
        return far, (len(found) - np.searchsorted(found, thresholds)) / len(self.ranks)

    def figures(self, far: float = 1e-2) -> dict[str, float]:
        """Return the figures at FAR=1% by their metric keys, without rank-1 and the counts."""
        rate = self.dir_at_far(far)
        return {
            "dir_rank1_at_far_1e-2": rate.value,
            "threshold": rate.point.threshold,
            "far_realised": rate.point.far_realised,
        }

    def found(self, threshold: float, rank: int = 1) -> NDArray[np.bool_]:
        """Return which genuine probes are found at this rank or better with a score of the threshold or above."""
        return (self.ranks <= rank) & (self.own_scores >= np.float64(threshold))

    def _rate(self, point: OperatingPoint, rank: int) -> AcceptRate:
        found = self.found(point.threshold, rank)
        return AcceptRate(float(found.mean()), len(found), point)


def rank_probes(
    probes_PD: Embeddings, people_P: NDArray[np.int64], gallery_GD: Embeddings, people_G: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Find each probe's own person in the gallery.

    A person scores by the best of their gallery images. The rank is 1 + the number of other people who score >= the
    own person, so that ties count against the system.

    Args:
        probes_PD: unit vectors.
        people_P: the person of each probe; everyone of them is in the gallery.
        gallery_GD: unit vectors.
        people_G: the person of each gallery image.

    Returns:
        The ranks, from 1, int64 [P]; the own person's score, float32 [P].
    """
    ranks_P = np.empty(len(people_P), dtype=np.int64)
    own_scores_P = np.empty(len(people_P), dtype=np.float32)
    for rows, best_pK, own_p1 in _search_people(probes_PD, people_P, gallery_GD, people_G):
        # The own person is >= itself and stands for the 1 of the definition.
        ranks_P[rows] = (best_pK >= own_p1).sum(1).numpy()
        own_scores_P[rows] = own_p1[:, 0].numpy()
    return ranks_P, own_scores_P


def rank_probes_in_draws(
    probes_PD: Embeddings,
    people_P: NDArray[np.int64],
    gallery_GD: Embeddings,
    people_G: NDArray[np.int64],
    drawn_RK: NDArray[np.bool_],
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Rank each probe's own person in R galleries, each a choice of the gallery's people, with one search for all.

    Args:
        probes_PD: unit vectors.
        people_P: the person of each probe; everyone of them is in each of the R galleries.
        gallery_GD: unit vectors.
        people_G: the person of each gallery image.
        drawn_RK: who of the gallery's K people, in ascending order, is in each of the R galleries.

    Returns:
        The ranks as in `rank_probes`, int64 [R, P]; the own person's score, the same in all draws, float32 [P].
    """
    ranks_RP = np.empty((len(drawn_RK), len(people_P)), dtype=np.int64)
    own_scores_P = np.empty(len(people_P), dtype=np.float32)
    drawn_KR = torch.from_numpy(drawn_RK.T.astype(np.float32))
    for rows, best_pK, own_p1 in _search_people(probes_PD, people_P, gallery_GD, people_G):
        # Counting by a product of zeros and ones: float32 counts exactly up to 2^24.
        ranks_RP[:, rows] = ((best_pK >= own_p1).to(torch.float32) @ drawn_KR).T.numpy()
        own_scores_P[rows] = own_p1[:, 0].numpy()
    return ranks_RP, own_scores_P


def best_scores(probes_ID: Embeddings, gallery_GD: Embeddings) -> NDArray[np.float32]:
    """Return each probe's best score in the gallery, float32 [I]."""
    scores_I1, _ = top_k(torch.from_numpy(probes_ID), torch.from_numpy(gallery_GD), 1)
    best: NDArray[np.float32] = scores_I1[:, 0].numpy()
    return best


def _search_people(
    probes_PD: Embeddings, people_P: NDArray[np.int64], gallery_GD: Embeddings, people_G: NDArray[np.int64]
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield a slice of probes, their best score for each of the K people, and for their own person [p, 1]."""
    order = np.argsort(people_G, kind="stable")
    people_K, group_G = np.unique(people_G[order], return_inverse=True)
    own_group_P = np.searchsorted(people_K, people_P)
    assert np.array_equal(people_K[own_group_P], people_P), "every probe's person is in the gallery"
    blocks = group_maxima(
        torch.from_numpy(probes_PD), torch.from_numpy(gallery_GD[order]), torch.from_numpy(group_G), len(people_K)
    )
    for rows, best_pK in blocks:
        yield rows, best_pK, best_pK.gather(1, torch.from_numpy(own_group_P[rows])[:, None])
