"""A crowd in the gallery equals that many more people in it, block by block, on any number of ranks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed.ranks import run_ranks
from face_lists import tied_set, write_pairs
from numpy.typing import NDArray

from facetrain.cli import main
from facetrain.evaluation import distractors
from facetrain.evaluation.distractors import RANKS_KEPT, DistractorScores, open_crowd, search_crowd
from facetrain.evaluation.inputs import unit_vectors
from facetrain.evaluation.lfw import evaluate
from facetrain.evaluation.lists import Request
from facetrain.search import top_k_of_blocks
from facetrain.world import World


def corners(seed: int, num: int) -> NDArray[np.float32]:
    """Vectors of -/+ 0.5, whose inner products are exact, so that ties are ties."""
    return (np.random.default_rng(seed).choice([-1, 1], (num, 4)) / 2).astype(np.float32)


def unit(seed: int, num: int, width: int = 24) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((num, width)).astype(np.float32)
    return unit_vectors([str(row) for row in range(num)], vectors)


def crowd_file(folder: Path, vectors: NDArray[Any], name: str = "crowd.npy") -> Path:
    np.save(folder / name, vectors)
    return folder / name


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distractors, "BLOCK_ITEMS", 50)


@pytest.mark.parametrize("num_strangers", [7, 20, 230])
def test_every_figure_equals_that_of_a_gallery_with_the_crowd_in_it(tmp_path: Path, num_strangers: int) -> None:
    names, embeddings = tied_set(0, num_people=120)
    strangers = corners(1, num_strangers)
    people = tmp_path / "people.txt"
    people.write_text("\n".join(f"Person_{number}" for number in range(40) if number % 6))
    pairs = write_pairs(tmp_path / "pairs.txt", names)
    request = Request(pairs=pairs, open_set_people=people, dataset="drawn")
    scores = search_crowd(embeddings, open_crowd([crowd_file(tmp_path, strangers)]), World())
    got = evaluate(names, embeddings, request, scores)
    plain = evaluate(names, embeddings, request)

    everything = embeddings @ strangers.T  # exact
    for name, (outcome,) in got.closed.items():
        (before,) = plain.closed[name]
        above = (everything[before.probe_rows] >= before.own_scores[:, None]).sum(axis=1)
        assert np.array_equal(np.minimum(outcome.ranks, RANKS_KEPT), np.minimum(before.ranks + above, RANKS_KEPT))
        assert outcome.gallery == before.gallery + num_strangers
    for name, (opened,) in got.open.items():
        (without,) = plain.open[name]
        above = (everything[without.probe_rows] >= without.own_scores[:, None]).sum(axis=1)
        assert np.array_equal(np.minimum(opened.ranks, RANKS_KEPT), np.minimum(without.ranks + above, RANKS_KEPT))
        best = np.maximum(without.impostor_scores, everything[without.impostor_rows].max(axis=1))
        assert np.array_equal(opened.impostor_scores, best)
    assert got.results["verification"] == plain.results["verification"]
    assert got.results["distractors"] == {"count": num_strangers}


def test_a_crowd_among_which_everybody_is_leaves_nobody_at_rank_1(tmp_path: Path) -> None:
    names, embeddings = tied_set(0, num_people=60)
    scores = search_crowd(embeddings, open_crowd([crowd_file(tmp_path, embeddings)]), World())
    results = evaluate(names, embeddings, Request(dataset="drawn"), scores).results
    assert results["closed-full"]["rank1"] == 0.0
    assert results["open-counts"]["rank1"] == 0.0


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_files_are_searched_as_one_in_any_float_type_and_length(tmp_path: Path, dtype: Any) -> None:
    embeddings, strangers = unit(0, 30), unit(1, 131).astype(dtype)
    files = [
        crowd_file(tmp_path, 3 * strangers[:101], "a.npy"),  # lengths don't matter
        crowd_file(tmp_path, strangers[101:], "b.npy"),
    ]
    crowd = open_crowd(files)
    assert len(crowd) == 131
    scores = search_crowd(embeddings, crowd, World())
    whole = strangers.astype(np.float64)
    expected = np.sort(embeddings @ (whole / np.linalg.norm(whole, axis=1, keepdims=True)).T)[:, ::-1]
    np.testing.assert_allclose(scores.best, expected[:, :RANKS_KEPT], atol=1e-3 if dtype == np.float16 else 1e-6)


def searches(world: World, cases: list[list[Path]], search: distractors.Search = "exact") -> list[DistractorScores]:
    distractors.BLOCK_ITEMS = 50  # also on ranks that are processes of their own
    return [search_crowd(unit(0, 70), open_crowd(files), world, search=search) for files in cases]


def test_any_number_of_ranks_finds_the_same_to_the_bit(tmp_path: Path) -> None:
    large, small = crowd_file(tmp_path, unit(1, 330), "a.npy"), crowd_file(tmp_path, unit(2, 40), "b.npy")
    cases = [[large, small], [small]]  # the small one is a single block, so that other ranks have none
    alone = searches(World(), cases)
    for world_size in (2, 3):
        for found in run_ranks(searches, world_size, cases):
            for got, expected in zip(found, alone, strict=True):
                assert np.array_equal(got.best, expected.best)
                assert got.count == expected.count


def test_blocks_give_the_head_of_a_full_sort() -> None:
    queries, items = torch.from_numpy(unit(0, 150)), torch.from_numpy(unit(1, 90))
    blocks = [(0, items[:40]), (40, items[40:45]), (45, items[45:])]
    scores, numbers = top_k_of_blocks(queries, blocks, 7, block_bytes=1)
    expected = (queries @ items.T).sort(dim=1, descending=True)
    torch.testing.assert_close(scores, expected.values[:, :7])
    assert torch.equal(numbers, expected.indices[:, :7])
    scores, numbers = top_k_of_blocks(queries, blocks[1:2], 7)
    assert torch.all(scores[:, 5:] == -torch.inf)
    assert torch.all(numbers[:, 5:] == -1)


def test_ivf_says_how_much_it_finds(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    files = [crowd_file(tmp_path, unit(1, 4000))]
    (exact,), (found,) = searches(World(), [files]), searches(World(), [files], "ivf")
    assert set(found.recall) == {"ivf_recall_at_1", f"ivf_recall_at_{RANKS_KEPT}"}
    hits = np.abs(found.best[:, 0] - exact.best[:, 0]) < 1e-6
    assert 0 < found.recall["ivf_recall_at_1"] < 1
    assert found.recall["ivf_recall_at_1"] == pytest.approx(hits.mean())
    assert np.all(found.best <= exact.best + 1e-6)
    assert "approximate search: ivf recall at 1 0." in found.describe()


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.ones((3, 4), dtype=int), r"crowd\.npy: expected floats \[rows, D\], got int64 \(3, 4\)"),
        (np.ones(4), r"crowd\.npy: expected floats \[rows, D\], got float64 \(4,\)"),
        (np.ones((0, 4)), r"distractors: expected embeddings in .*crowd\.npy, got none"),
        (np.array([None, "x"], dtype=object), r"crowd\.npy: not a readable \.npy file"),
    ],
)
def test_files_that_are_no_embeddings_are_named(tmp_path: Path, vectors: NDArray[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_crowd([crowd_file(tmp_path, vectors)])


def test_files_of_other_widths_are_named(tmp_path: Path) -> None:
    files = [crowd_file(tmp_path, np.ones((3, 5)), "a.npy"), crowd_file(tmp_path, np.ones((3, 4)), "b.npy")]
    with pytest.raises(ValueError, match=r"b\.npy: expected embeddings 5 wide, as in .*a\.npy, got 4"):
        open_crowd(files)
    with pytest.raises(ValueError, match=r"a\.npy: expected embeddings 24 wide, got 5"):
        search_crowd(unit(0, 3), open_crowd(files[:1]), World())


def test_a_file_that_is_cut_off_is_named(tmp_path: Path) -> None:
    file = crowd_file(tmp_path, np.ones((100, 4)))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"crowd\.npy: not a readable \.npy file"):
        open_crowd([file])
    for content in (b"", b"PK\x03\x04 no zip"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"crowd\.npy: not a readable \.npy file"):
            open_crowd([file])


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_distractor_that_is_no_direction_is_named(tmp_path: Path, bad: float) -> None:
    vectors = unit(1, 120)
    vectors[77] = bad
    with pytest.raises(ValueError, match=r"for row 77 of .*crowd\.npy"):
        search_crowd(unit(0, 3), open_crowd([crowd_file(tmp_path, vectors)]), World())


def test_the_command_enlarges_every_gallery(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names, embeddings = tied_set(0, num_people=60)
    np.savez(tmp_path / "e.npz", names=np.array(names), embeddings=embeddings)
    crowd = crowd_file(tmp_path, corners(1, 20))
    words = ("lfw", "--embeddings", tmp_path / "e.npz", "--dataset", "drawn", "--out", tmp_path, "--device", "cpu")
    main([str(word) for word in (*words, "--distractors", crowd)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["distractors"] == {"count": 20}
    assert results["closed-full"]["gallery"] == 80
    assert "every gallery but BLUFR's holds 20 more people" in capsys.readouterr().out
    assert "holds 20 more people" in (tmp_path / "report.html").read_text().replace("&#x27;", "'")
