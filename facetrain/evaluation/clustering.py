"""Clustering: do k-means clusters of embeddings agree with the classes? NMI and pairwise F1."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from facetrain.evaluation.identification import Embeddings
from facetrain.search import k_means


@dataclass(frozen=True)
class Agreement:
    """How well clusters agree with classes, in [0, 1]."""

    nmi: float
    """Mutual information / arithmetic mean of the two entropies."""
    nmi_geometric: float
    """Mutual information / geometric mean of the two entropies, as older papers have it."""
    f1: float
    """Harmonic mean of precision and recall of 'these two are of one class', over all pairs of items."""


def cluster(
    embeddings: Embeddings, labels: NDArray[np.int64], seeds: Sequence[int], *, device: torch.device | None = None
) -> list[Agreement]:
    """Run k-means with as many clusters as there are classes, once for each seed.

    Args:
        embeddings: float32 [I, D], unit vectors.
        labels: int [I], in [0, number of classes).
        seeds: Of the first centres.
        device: Where products are made; the CPU by default.
    """
    items_ID = torch.from_numpy(embeddings).to(device)
    num_classes = len(np.unique(labels))
    return [agreement(labels, k_means(items_ID, num_classes, seed=seed).cpu().numpy()) for seed in seeds]


def agreement(labels: NDArray[np.int64], clusters: NDArray[np.int64]) -> Agreement:
    """Compare a clustering with the classes.

    Args:
        labels: int [I], the class of each item, 0 or more.
        clusters: int [I], the cluster of each item, 0 or more.

    Source: Manning et al., Introduction to Information Retrieval, section 16.3.
    """
    num_clusters = int(clusters.max()) + 1
    _, shared = np.unique(labels * num_clusters + clusters, return_counts=True)
    of_classes, of_clusters = np.bincount(labels), np.bincount(clusters)
    classes_entropy, clusters_entropy = _entropy(of_classes), _entropy(of_clusters)
    # I(X; Y) = H(X) + H(Y) - H(X, Y), which may round to just below 0.
    information = max(classes_entropy + clusters_entropy - _entropy(shared), 0.0)
    arithmetic = (classes_entropy + clusters_entropy) / 2
    geometric = math.sqrt(classes_entropy * clusters_entropy)
    return Agreement(
        nmi=information / arithmetic if arithmetic else 1.0,
        nmi_geometric=information / geometric if geometric else float(arithmetic == 0),
        f1=2 * _pairs(shared) / (_pairs(of_classes) + _pairs(of_clusters)),
    )


def _entropy(counts: NDArray[np.int64]) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _pairs(counts: NDArray[np.int64]) -> int:
    return int((counts * (counts - 1) // 2).sum())
