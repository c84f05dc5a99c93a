"""Audit of training identities: planted overlaps, duplicates and mixtures come first."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from facetrain.evaluation.audit import Bounds, bounds_of, duplicates, mixtures, overlaps, telling_score
from facetrain.evaluation.embeddings_npz import load_embeddings_npz
from facetrain.evaluation.inputs import unit_vectors


def people(counts: list[int], *, seed: int, spread: float = 0.4, width: int = 32) -> tuple[NDArray[np.float32], Bounds]:
    """Embeddings of so many images of each person, around a direction of the person's own."""
    rng = np.random.default_rng(seed)
    directions = np.repeat(rng.normal(size=(len(counts), width)), counts, axis=0)
    images = directions + spread * rng.normal(size=directions.shape)
    return unit([images]), np.cumsum([0, *counts])


def unit(blocks: list[NDArray[np.float64]]) -> NDArray[np.float32]:
    images = np.concatenate(blocks)
    return (images / np.linalg.norm(images, axis=1, keepdims=True)).astype(np.float32)


def cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    mean_a, mean_b = a.mean(axis=0, dtype=np.float64), b.mean(axis=0, dtype=np.float64)
    return float(mean_a @ mean_b / np.linalg.norm(mean_a) / np.linalg.norm(mean_b))


def groups(images: NDArray[np.float32], bounds: Bounds) -> list[NDArray[np.float32]]:
    return [images[begin:end] for begin, end in itertools.pairwise(bounds)]


def test_scores_and_pictures_are_those_of_a_count_by_hand() -> None:
    images, bounds = people([1, 3, 2, 5, 4], seed=0)
    test, test_bounds = people([2, 3, 1], seed=1)
    trained, tested = groups(images, bounds), groups(test, test_bounds)
    for found in overlaps(images, bounds, test, test_bounds):
        scores = [cosine(trained[found.identity], person) for person in tested]
        assert found.score == pytest.approx(max(scores), abs=1e-6)
        assert found.other == int(np.argmax(scores))
        alike = trained[found.identity] @ tested[found.other].T
        assert images[found.images[0]] @ test[found.images[1]] == pytest.approx(alike.max())
    pairs = duplicates(images, bounds)
    assert sorted((pair.identity, pair.other) for pair in pairs) == [(a, b) for a in range(5) for b in range(a + 1, 5)]
    assert all(p.score == pytest.approx(cosine(trained[p.identity], trained[p.other]), abs=1e-6) for p in pairs)
    assert [pair.score for pair in pairs] == sorted((pair.score for pair in pairs), reverse=True)


def test_an_identity_is_cut_around_its_two_images_that_are_least_alike() -> None:
    images = unit([np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.8], [0.8, 0.2], [1, 0], [1, 0.1], [0.0, 1.0]])])
    found = mixtures(images, np.array([0, 5, 7, 8]))
    assert [candidate.identity for candidate in found] == [0, 1]  # one image can't be two people
    assert found[0].images == (0, 2)
    assert found[0].score == pytest.approx(cosine(images[[0, 1, 4]], images[[2, 3]]))
    assert found[1].images == (5, 6)
    assert found[1].score == pytest.approx(images[5] @ images[6])


def test_the_telling_score_is_the_median_of_halves() -> None:
    images, bounds = people([1, 3, 2, 5] * 10, seed=3)
    halves = [cosine(person[::2], person[1::2]) for person in groups(images, bounds) if len(person) > 1]
    found = duplicates(images, bounds)
    assert telling_score(images, bounds, found) == pytest.approx(np.median(halves))
    with pytest.raises(ValueError, match="no identity has two images"):
        telling_score(images[:2], np.array([0, 1, 2]), [])


def test_a_network_that_finds_everybody_alike_fills_no_list() -> None:
    images, bounds = people([3] * 100, seed=4, spread=50)  # its images have nothing of the person
    found = duplicates(images, bounds)
    least = telling_score(images, bounds, found)
    assert sum(pair.score >= least for pair in found) == 6


def test_bounds_are_where_the_identity_changes() -> None:
    assert bounds_of(["a", "a", "b", "c", "c", "c"]).tolist() == [0, 2, 3, 6]


def test_images_that_cancel_each_other_out_are_no_candidate() -> None:
    images = unit([np.array([[1.0, 0], [-1, 0], [1, 0.1], [1, 0]])])
    assert [found.score for found in duplicates(images, np.array([0, 2, 4]))] == [0]


def test_what_is_planted_among_real_people_comes_first(face_data: Path) -> None:
    names, embeddings = load_embeddings_npz(face_data / "lfw_embeddings_mobilefacenet.npz")
    images = unit_vectors(names, embeddings)
    order = sorted(range(len(names)), key=lambda row: names[row])
    bounds = bounds_of([names[row].rpartition("_")[0] for row in order])
    everybody = groups(images[order], bounds)
    many = [person[:20] for person in everybody if len(person) >= 8]
    assert len(many) > 180
    twice, in_test, mixed = many[:50], many[50:100], many[100:180]
    train = [person[::2] for person in [*twice, *in_test]] + [person[1::2] for person in twice]
    train += [np.concatenate([a[:3], b[:3]]) for a, b in zip(mixed[::2], mixed[1::2], strict=True)]
    train += [person for person in everybody if len(person) < 8][:1500]
    rows, edges = np.concatenate(train), np.cumsum([0, *map(len, train)])
    test = [person[1::2] for person in in_test]
    # Five pairs of names come among them that nobody planted: LFW has people under two names, and foreign images.
    found = duplicates(rows, edges)[:55]
    assert {(pair.identity, pair.other) for pair in found} > {(person, person + 100) for person in range(50)}
    found = overlaps(rows, edges, np.concatenate(test), np.cumsum([0, *map(len, test)]))[:50]
    assert {(pair.identity, pair.other) for pair in found} == {(50 + person, person) for person in range(50)}
    found = mixtures(rows, edges)[:40]
    assert sum(150 <= candidate.identity < 190 for candidate in found) >= 36
