"""Galleries: exact search against brute force, approximate search by its recall, and what interruption leaves."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from facetrain.gallery import GALLERY_FILE, Gallery, Kind
from facetrain.search import top_k


def unit(num: int, seed: int, width: int = 24) -> NDArray[np.float32]:
    rows = np.random.default_rng(seed).normal(size=(num, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def drawn(kind: Kind, num_images: int, num_people: int, seed: int = 0) -> Gallery:
    """Images scattered around their people, in no order."""
    rng = np.random.default_rng(seed)
    person = rng.integers(0, num_people, num_images)
    rows = unit(num_people, seed)[person] + 0.5 * unit(num_images, seed + 1)
    embeddings = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    names = [f"p{p:03d}/{i}.jpg" for i, p in enumerate(person)]
    return Gallery(kind=kind).with_images(names, [n[:4] for n in names], embeddings, [b""] * num_images)


def brute_force(gallery: Gallery, queries: NDArray[np.float32], k: int) -> tuple[list[list[str]], list[list[float]]]:
    people, scores = [], []
    for query in queries.astype(np.float64):
        best: dict[str, float] = {}
        for person, row in zip(gallery.people, gallery.embeddings.astype(np.float64), strict=True):
            best[person] = max(best.get(person, -2.0), float(row @ query))
        order = sorted(best, key=lambda person: -best[person])[:k]
        people.append(order)
        scores.append([best[person] for person in order])
    return people, scores


@pytest.mark.parametrize("k", [1, 4, 60])
def test_flat_finds_whom_brute_force_finds(k: int) -> None:
    gallery, queries = drawn("flat", 300, 40), unit(25, 9)
    scores, persons = gallery.search(queries, k)
    people, expected = brute_force(gallery, queries, k)
    most = len(people[0])
    assert [[gallery.persons[person] for person in row] for row in persons[:, :most]] == people
    np.testing.assert_allclose(scores[:, :most], expected, atol=1e-6)
    assert (persons[:, most:] == -1).all()
    assert np.isneginf(scores[:, most:]).all()


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_faiss_finds_nearly_everybody_and_never_a_wrong_score(kind: Kind) -> None:
    pytest.importorskip("faiss")
    gallery = drawn(kind, 3000, 300)
    queries = gallery.embeddings[::30] + 0.1 * unit(100, 5)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    scores, persons = gallery.search(queries, 3)
    people, expected = brute_force(gallery, queries, 3)
    found = [[gallery.persons[person] for person in row] for row in persons]
    assert np.mean([a[0] == b[0] for a, b in zip(found, people, strict=True)]) > 0.95
    same = np.array([a[0] == b[0] for a, b in zip(found, people, strict=True)])
    np.testing.assert_allclose(scores[same, 0], np.array(expected)[same, 0], atol=1e-5)


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_a_gallery_that_was_kept_and_changed_is_that_of_one_go(tmp_path: Path, kind: Kind) -> None:
    if kind != "flat":
        pytest.importorskip("faiss")
    whole, queries = drawn(kind, 400, 30), unit(10, 3)
    names, people, pictures = list(whole.names), list(whole.people), [name.encode() for name in whole.names]
    grown = Gallery(kind=kind).with_images(names[:300], people[:300], whole.embeddings[:300], pictures[:300])
    grown.save(tmp_path)
    grown = Gallery.load(tmp_path).with_images(names[250:], people[250:], whole.embeddings[250:], pictures[250:])
    grown.save(tmp_path)
    kept = Gallery.load(tmp_path)
    assert sorted(kept.names) == sorted(whole.names)
    assert kept.pictures == tuple(name.encode() for name in kept.names)
    assert kept.persons == whole.persons
    np.testing.assert_allclose(
        kept.search(queries, 1)[0], whole.search(queries, 1)[0], atol=0.2 if kind != "flat" else 1e-6
    )

    less = kept.without({"p003", "p004"})
    assert {"p003", "p004"} & set(less.persons) == set()
    assert len(less.names) == len(whole.names) - people.count("p003") - people.count("p004")
    found = less.search(kept.embeddings[:5], 1)[1]
    assert (found >= 0).all()


def test_an_interrupted_save_leaves_the_gallery_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = drawn("flat", 20, 5)
    gallery.save(tmp_path)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", die)
    with pytest.raises(KeyboardInterrupt):
        gallery.without({"p001"}).save(tmp_path)
    assert Gallery.load(tmp_path).names == gallery.names


def test_a_gallery_of_an_earlier_revision_is_opened(tmp_path: Path) -> None:
    drawn("flat", 6, 3).save(tmp_path)
    with np.load(tmp_path / GALLERY_FILE) as content:
        np.savez(tmp_path / GALLERY_FILE, **{key: content[key] for key in content.files if key != "onnx"})
    assert Gallery.load(tmp_path).names == drawn("flat", 6, 3).names


def test_what_is_no_gallery_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no gallery in it"):
        Gallery.load(tmp_path)
    for content in (b"", b"PK no zip", b"x" * 100):
        (tmp_path / GALLERY_FILE).write_bytes(content)
        with pytest.raises(ValueError, match=GALLERY_FILE):
            Gallery.load(tmp_path)


def test_what_does_not_fit_is_refused() -> None:
    gallery = drawn("flat", 20, 5)
    with pytest.raises(ValueError, match="expected 24 numbers each, got 3"):
        gallery.search(unit(2, 0, width=3), 1)
    with pytest.raises(ValueError, match="expected 24 numbers each, got 3"):
        gallery.with_images(["a"], ["a"], unit(1, 0, width=3), [b""])
    with pytest.raises(ValueError, match="it is empty"):
        Gallery().search(unit(2, 0), 1)
    with pytest.raises(ValueError, match="'Nobody' is not in the gallery"):
        gallery.without({"Nobody"})


class ExactIndex:
    """An approximate index at its best."""

    def __init__(self, embeddings: NDArray[np.float32]) -> None:
        self.items = torch.from_numpy(embeddings)

    def top_k(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        return top_k(queries, self.items, k)


def test_a_stranger_is_compared_with_other_people_where_one_has_many_images() -> None:
    flat = drawn("flat", 600, 12)
    approximate = replace(flat, kind="hnsw", index=ExactIndex(flat.embeddings))  # type: ignore[arg-type]
    assert np.isneginf(approximate.search(flat.embeddings[:1], 2)[0][0, 1])  # it finds the person's own images alone
    assert np.isfinite(approximate.stranger_scores).all()
    assert np.array_equal(approximate.stranger_scores, flat.stranger_scores)
