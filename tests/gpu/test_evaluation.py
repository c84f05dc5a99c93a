"""Searches on a CUDA device find what they find on the CPU."""

import numpy as np
import pytest
import torch

from facetrain.evaluation.clustering import cluster
from facetrain.evaluation.distractors import open_crowd, search_crowd
from facetrain.evaluation.retrieval import read_labels, retrieve, verify_against_negatives
from facetrain.world import World

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)


def corners(num):
    """Unit vectors whose inner products are exact, so that ties are ties on any device."""
    return (np.random.default_rng(num).choice([-1, 1], (num, 16)) / 4).astype(np.float32)


def test_retrieval_on_the_device_equals_the_cpus():
    embeddings, labels = corners(500), read_labels(np.arange(500) % 60)
    on_cuda = retrieve(embeddings, labels, device=CUDA).figures()
    assert on_cuda == pytest.approx(retrieve(embeddings, labels).figures())
    assert verify_against_negatives(embeddings, labels, [1, 59], device=CUDA) == pytest.approx(
        verify_against_negatives(embeddings, labels, [1, 59])
    )
    (found,) = cluster(embeddings, labels.label, [0], device=CUDA)
    assert 0 < found.nmi < 1


def test_a_crowd_on_the_device_scores_as_on_the_cpu(tmp_path):
    np.save(tmp_path / "crowd.npy", corners(900))
    crowd = open_crowd([tmp_path / "crowd.npy"])
    on_cuda = search_crowd(corners(40), crowd, World(device=CUDA))
    assert np.array_equal(on_cuda.best, search_crowd(corners(40), crowd, World()).best)


def test_clusters_of_a_crowd_are_searched_from_the_device(tmp_path):
    pytest.importorskip("faiss", reason="faiss is not installed")
    np.save(tmp_path / "crowd.npy", corners(900))
    crowd = open_crowd([tmp_path / "crowd.npy"])
    exact = search_crowd(corners(40), crowd, World(device=CUDA))
    found = search_crowd(corners(40), crowd, World(device=CUDA), search="ivf")
    assert np.all(found.best <= exact.best)
    assert 0 < found.recall["ivf_recall_at_1"] <= 1
