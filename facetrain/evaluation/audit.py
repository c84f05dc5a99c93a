"""Which identities of a training set look like people of the test, like one another, or like two people each.

Everything here is a candidate for a person to look at, the most striking first: what a network finds alike may be two
people, and it won't find all that are one.

Dims: n images, I identities, T people of the test, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from facetrain.search import top_k

Embeddings = NDArray[np.float32]
"""float32 [n, D], rows of unit length."""
Bounds = NDArray[np.int64]
"""int64 [I + 1]; the images of identity i are rows bounds[i] to bounds[i + 1] - 1, at least one."""

_NEIGHBOURS = 5
"""Identities most like another that are looked at; a person may stand in a set more than twice."""
_IDENTITIES_PER_PAIR = 20
_BLOCK_IDENTITIES = 1024
_LEAST_NORM = 1e-12
"""Images that cancel each other out have no direction; their mean is left at zero."""


@dataclass(frozen=True, order=True)
class Candidate:
    """Two identities, or two parts of one, and the two of their images that show what it is about."""

    score: float
    """Cosine between the mean directions of the two."""
    identity: int
    """An identity of the training set."""
    other: int
    """The test's person or the other identity; the same identity where parts of one are compared."""
    images: tuple[int, int]
    """Rows of the images: the most alike of two identities, the least alike of one."""


def overlaps(embeddings_nD: Embeddings, bounds: Bounds, test_nD: Embeddings, test_bounds: Bounds) -> list[Candidate]:
    """Compare each identity with the person of the test whom it is most like; the most alike first."""
    scores_I1, people_I1 = top_k(_means(embeddings_nD, bounds), _means(test_nD, test_bounds), 1)
    found = zip(scores_I1[:, 0].tolist(), people_I1[:, 0].tolist(), strict=True)
    candidates = [
        Candidate(score, identity, person, _extreme(embeddings_nD, bounds, identity, test_nD, test_bounds, person))
        for identity, (score, person) in enumerate(found)
    ]
    return sorted(candidates, key=_most_alike)


def duplicates(embeddings_nD: Embeddings, bounds: Bounds) -> list[Candidate]:
    """Compare each identity with the five that it is most like; every two of them once, the most alike first."""
    means_ID = _means(embeddings_nD, bounds)
    scores_Ik, others_Ik = top_k(means_ID, means_ID, min(1 + _NEIGHBOURS, len(means_ID)))
    pairs: dict[tuple[int, int], float] = {}
    for identity, (scores, others) in enumerate(zip(scores_Ik.tolist(), others_Ik.tolist(), strict=True)):
        pairs |= {(min(identity, o), max(identity, o)): s for s, o in zip(scores, others, strict=True) if o != identity}
    candidates = [
        Candidate(score, a, b, _extreme(embeddings_nD, bounds, a, embeddings_nD, bounds, b))
        for (a, b), score in pairs.items()
    ]
    return sorted(candidates, key=_most_alike)


def mixtures(embeddings_nD: Embeddings, bounds: Bounds) -> list[Candidate]:
    """Cut each identity in two, around the two images that are least alike; the least alike parts first.

    An image joins the one of the two that it is more like. One foreign image among many makes a part of its own.
    """
    candidates = []
    for identity, (begin, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        if end - begin < 2:
            continue
        images_mD = embeddings_nD[begin:end]
        scores_mm = images_mD @ images_mD.T
        a, b = np.unravel_index(np.argmin(scores_mm), scores_mm.shape)
        near_b = scores_mm[b] > scores_mm[a]
        near_b[[a, b]] = False, True
        score = float(_direction(images_mD[~near_b]) @ _direction(images_mD[near_b]))
        candidates.append(Candidate(score, identity, identity, (begin + int(a), begin + int(b))))
    return sorted(candidates)


def telling_score(embeddings_nD: Embeddings, bounds: Bounds, found: Sequence[Candidate]) -> float:
    """Return a score at which two identities may well be one: the median of what the two halves of an identity score.

    A network that knows these people badly finds nearly everybody so alike. The score is therefore high enough for
    about one pair of every twenty identities, at most, to reach it.

    Args:
        embeddings_nD: The images; a half of an identity is every other one.
        bounds: The identities.
        found: What `duplicates` gives for them.

    Raises:
        ValueError: No identity has two images.
    """
    scores = [
        float(_direction(embeddings_nD[begin:end:2]) @ _direction(embeddings_nD[begin + 1 : end : 2]))
        for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        if end - begin > 1
    ]
    if not scores:
        raise ValueError("audit: no identity has two images, by which to judge likeness; give --min-score")
    enough = len(found) > len(bounds) // _IDENTITIES_PER_PAIR
    return max(float(np.median(scores)), found[len(bounds) // _IDENTITIES_PER_PAIR].score if enough else -1.0)


def bounds_of(identities: Sequence[str]) -> Bounds:
    """Return the bounds of identities whose images stand together."""
    changes = [i for i in range(1, len(identities)) if identities[i] != identities[i - 1]]
    return np.array([0, *changes, len(identities)], dtype=np.int64)


def _means(embeddings_nD: Embeddings, bounds: Bounds) -> torch.Tensor:
    """Return the mean direction of each identity, float32 [I, D]."""
    means_ID = np.empty((len(bounds) - 1, embeddings_nD.shape[1]), np.float32)
    for i in range(0, len(means_ID), _BLOCK_IDENTITIES):  # float64 of all images at once would be twice the set again
        own = bounds[i : i + _BLOCK_IDENTITIES + 1]
        images = embeddings_nD[own[0] : own[-1]].astype(np.float64)
        sums = np.add.reduceat(images, own[:-1] - own[0], axis=0)
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        means_ID[i : i + len(sums)] = sums / np.maximum(norms, _LEAST_NORM)
    return torch.from_numpy(means_ID)


def _direction(images_mD: Embeddings) -> NDArray[np.float64]:
    mean_D = images_mD.mean(axis=0, dtype=np.float64)
    return mean_D / max(np.linalg.norm(mean_D), _LEAST_NORM)  # type: ignore[no-any-return]


def _extreme(
    a_nD: Embeddings, a_bounds: Bounds, identity: int, b_nD: Embeddings, b_bounds: Bounds, other: int
) -> tuple[int, int]:
    """Return the rows of the two most alike images of two identities."""
    first_a, first_b = int(a_bounds[identity]), int(b_bounds[other])
    scores = a_nD[first_a : a_bounds[identity + 1]] @ b_nD[first_b : b_bounds[other + 1]].T
    row, column = np.unravel_index(np.argmax(scores), scores.shape)
    return first_a + int(row), first_b + int(column)


def _most_alike(candidate: Candidate) -> tuple[float, int, int]:
    return -candidate.score, candidate.identity, candidate.other
