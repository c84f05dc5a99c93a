"""Retrieval: does an item find others of its class? Recall@K, MAP@R, R-precision, kNN, verification; all exact.

Every item is a query, searched for among all others; items that are alone in their class can't be found and are no
queries. The rank of a class mate is 1 + the number of others before it, where others of other classes that score the
same come before it: ties count against the system.

Dims: I items, q queries of one block, M class mates (padded to the largest class of the block), C classes, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from facetrain.evaluation.identification import Embeddings
from facetrain.search import similarity_blocks

RECALL_AT = (1, 2, 4, 8, 10, 100)
"""K of Recall@K."""
NEIGHBOURS = (1, 5)
"""K of the kNN accuracies."""


@dataclass(frozen=True, eq=False)
class Labels:
    """The classes of I items."""

    label: NDArray[np.int64]
    """[I], in [0, C)."""
    members: NDArray[np.int64]
    """[I], the items, class by class."""
    first: NDArray[np.int64]
    """[C], where the items of each class begin in `members`."""
    counts: NDArray[np.int64]
    """[C], items of each class."""
    queries: NDArray[np.int64]
    """Items that aren't alone in their class."""


@dataclass(frozen=True, eq=False)
class Retrieval:
    """What queries found. Shares are in [0, 1]."""

    recall_at: Mapping[int, float]
    """By K: the share of queries with a class mate among the K nearest."""
    map_at_r: float
    """Mean over queries of (1/R) sum_{i<=R} (precision at i if the i-th is a class mate), R = number of mates."""
    r_precision: float
    """Mean over queries of the share of class mates among the R nearest."""
    knn_accuracy: Mapping[int, float]
    """By K: the share of queries whose class has the most votes of the K nearest, and more than any other class.

    Items that score the same as the K-th nearest vote as well.
    """
    num_queries: int

    def figures(self) -> dict[str, float]:
        """Return the figures by their metric keys."""
        return {
            **{f"recall_at_{k}": share for k, share in self.recall_at.items()},
            "map_at_r": self.map_at_r,
            "r_precision": self.r_precision,
            **{f"knn_{k}_accuracy": share for k, share in self.knn_accuracy.items()},
            "queries": self.num_queries,
        }


def read_labels(classes: ArrayLike) -> Labels:
    """Number the classes of items.

    Args:
        classes: [I], names or numbers.

    Raises:
        ValueError: No class has two items, or there is one class alone.
    """
    _, label, counts = np.unique(np.asarray(classes), return_inverse=True, return_counts=True)
    if len(counts) < 2 or counts.max() < 2:
        found = f"{len(label)} items of {len(counts)}"
        raise ValueError(f"labels: expected two classes or more, and two items or more of one, got {found}")
    return Labels(
        label=label,
        members=np.argsort(label, kind="stable"),
        first=counts.cumsum() - counts,
        counts=counts,
        queries=np.flatnonzero(counts[label] > 1),
    )


def check_depths(num_items: int, **depths: Sequence[int]) -> None:
    """Check how far down the others of an item are looked at, by the names of the settings.

    Raises:
        ValueError: A K is out of bounds.
    """
    for name, ks in depths.items():
        if not all(1 <= k < num_items for k in ks):
            raise ValueError(f"{name}: expected 1 to {num_items - 1}, the number of others, got {list(ks)}")


def check_negatives(labels: Labels, num_negatives: Sequence[int]) -> None:
    """Check numbers of negatives.

    Raises:
        ValueError: An M is out of bounds.
    """
    num_others = len(labels.counts) - 1
    if not all(1 <= num <= num_others for num in num_negatives):
        raise ValueError(f"negatives: expected 1 to {num_others}, the number of other classes, got {[*num_negatives]}")


def retrieve(
    embeddings: Embeddings,
    labels: Labels,
    *,
    recall_at: Sequence[int] = RECALL_AT,
    neighbours: Sequence[int] = NEIGHBOURS,
    device: torch.device | None = None,
) -> Retrieval:
    """Search for every query among all other items.

    Args:
        embeddings: float32 [I, D], unit vectors.
        labels: Of the items.
        recall_at: K of Recall@K, each 1 to I - 1.
        neighbours: K of the kNN accuracies, each 1 to I - 1.
        device: Where products are made; the CPU by default.

    Raises:
        ValueError: A K is out of bounds.
    """
    check_depths(len(embeddings), recall_at=recall_at, neighbours=neighbours)
    items_ID = torch.from_numpy(embeddings).to(device)
    label_I, members_I, first_C, counts_C, queries = (
        torch.from_numpy(x).to(device)
        for x in (labels.label, labels.members, labels.first, labels.counts, labels.queries)
    )
    deepest = max(*recall_at, int(counts_C.max()) - 1)
    # Where a rank is `deepest` or better, fewer than these others score as high: ranks up to it are exact.
    depth = min(max(deepest + int(counts_C.max()), *neighbours), len(embeddings) - 1)
    best_rank, map_at_r, r_precision = [], [], []
    knn: dict[int, list[Tensor]] = {k: [] for k in neighbours}
    for rows, scores_qI in similarity_blocks(items_ID[queries], items_ID):
        own_q = queries[rows]
        scores_qI[torch.arange(len(own_q), device=device), own_q] = -torch.inf  # nobody finds himself
        nearest_qd = scores_qI.topk(depth, dim=1).values
        counts_q1, first_q1 = counts_C[label_I[own_q]][:, None], first_C[label_I[own_q]][:, None]
        place_M = torch.arange(int(counts_q1.max()), device=device)
        mates_qM = members_I[(first_q1 + place_M).clamp(max=len(members_I) - 1)]
        mate_scores_qM = scores_qI.gather(1, mates_qM).masked_fill(place_M >= counts_q1, -torch.inf)
        ranks_qM = _ranks(mate_scores_qM.sort(dim=1, descending=True).values, nearest_qd)
        num_mates_q1 = counts_q1 - 1
        found_qM = (place_M < num_mates_q1) & (ranks_qM <= num_mates_q1)
        best_rank.append(ranks_qM[:, 0])
        map_at_r.append((found_qM * (place_M + 1) / ranks_qM.double() / num_mates_q1).sum(dim=1))
        r_precision.append((found_qM.double() / num_mates_q1).sum(dim=1))
        for k, right in knn.items():
            right.append(_most_votes(scores_qI, nearest_qd[:, k - 1], label_I, own_q))
    return Retrieval(
        recall_at={k: _mean([rank <= k for rank in best_rank]) for k in recall_at},
        map_at_r=_mean(map_at_r),
        r_precision=_mean(r_precision),
        knn_accuracy={k: _mean(right) for k, right in knn.items()},
        num_queries=len(queries),
    )


def verify_against_negatives(
    embeddings: Embeddings,
    labels: Labels,
    num_negatives: Sequence[int],
    *,
    seed: int = 0,
    device: torch.device | None = None,
) -> dict[int, float]:
    """Return, for each M, how often a class mate scores higher than M items of M different other classes.

    For each query a mate and negatives are drawn with the seed; a smaller M takes the first of them. A tie is a loss.

    Args:
        embeddings: float32 [I, D], unit vectors.
        labels: Of the items.
        num_negatives: Each M, from 1 to C - 1.
        seed: Seed of the draws.
        device: Where products are made; the CPU by default.

    Raises:
        ValueError: An M is out of bounds.

    Source: Sohn 2016, verification rates at varying numbers of negatives.
    """
    check_negatives(labels, num_negatives)
    items_ID = torch.from_numpy(embeddings).to(device)
    won: dict[int, list[Tensor]] = {num: [] for num in num_negatives}
    for rows, scores_qI in similarity_blocks(items_ID[torch.from_numpy(labels.queries).to(device)], items_ID):
        drawn = [_draw(labels, item, max(num_negatives), seed) for item in labels.queries[rows].tolist()]
        drawn_scores = scores_qI.gather(1, torch.from_numpy(np.array(drawn)).to(device))
        best_negative = drawn_scores[:, 1:].cummax(dim=1).values
        for num, outcomes in won.items():
            outcomes.append(drawn_scores[:, 0] > best_negative[:, num - 1])
    return {num: _mean(outcomes) for num, outcomes in won.items()}


def _ranks(mate_scores_qM: Tensor, nearest_qd: Tensor) -> Tensor:
    """Return the rank of each class mate, best first; those of rank beyond the depth have some rank beyond it."""
    ascending_qd, mates_qM = -nearest_qd, -mate_scores_qM
    not_below = torch.searchsorted(ascending_qd.contiguous(), mates_qM.contiguous(), right=True)
    mates_not_below = torch.searchsorted(mates_qM.contiguous(), mates_qM.contiguous(), right=True)
    # Others of other classes that score as high, and the mates up to this one.
    return not_below - mates_not_below + torch.arange(1, mates_qM.shape[1] + 1, device=mates_qM.device)


def _most_votes(scores_qI: Tensor, threshold_q: Tensor, label_I: Tensor, own_q: Tensor) -> Tensor:
    """Return whether a query's class has more items at or above the threshold than any other class, bool [q]."""
    query, item = (scores_qI >= threshold_q[:, None]).nonzero(as_tuple=True)
    num_classes = int(label_I.max()) + 1
    ballot, votes = torch.unique(query * num_classes + label_I[item], return_counts=True)
    query, label = ballot // num_classes, ballot % num_classes
    is_own = label == label_I[own_q][query]
    others_best, own = votes.new_zeros(len(own_q)), votes.new_zeros(len(own_q))
    others_best.scatter_reduce_(0, query[~is_own], votes[~is_own], "amax")
    own[query[is_own]] = votes[is_own]
    return torch.gt(own, others_best)


def _mean(blocks: Sequence[Tensor]) -> float:
    return float(torch.cat([*blocks]).double().mean())


def _draw(labels: Labels, item: int, num_negatives: int, seed: int) -> NDArray[np.int64]:
    """Return a class mate of an item, then items of as many other classes, each drawn at random."""
    rng = np.random.default_rng([seed, item])
    own = int(labels.label[item])
    mates = labels.members[labels.first[own] :][: labels.counts[own]]
    others = rng.choice(len(labels.counts) - 1, num_negatives, replace=False)
    others += others >= own
    negatives = labels.members[labels.first[others] + rng.integers(labels.counts[others])]
    return np.append(rng.choice(mates[mates != item]), negatives)
