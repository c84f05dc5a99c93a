"""The graph of candidates against all products written out, and the scores behind it."""

import numpy as np
import pytest
import torch
from distributed.ranks import run_ranks
from mining.clustered import clustered

from facetrain.mining.best_first import NeighbourGraph, best_first_classes
from facetrain.mining.neighbours import graph_pays, neighbour_graph, neighbours_needed
from facetrain.mining.scores import on_grid
from facetrain.world import World


def test_products_are_the_same_to_the_bit_however_they_are_computed() -> None:
    for width in (3, 97, 512):
        anchors, positives = (
            on_grid(x) for x in 9.3 * torch.randn(2, 157, width, generator=torch.Generator().manual_seed(width))
        )
        whole = anchors @ positives.T
        for s in (0, 11, 156):
            assert torch.equal(positives @ anchors[s], whole[s])
            assert torch.equal((positives * anchors[s]).sum(1), whole[s])
            assert torch.equal((positives[20:53] @ anchors[s]), whole[s, 20:53])
            assert torch.equal(positives.flip(1) @ anchors[s].flip(0), whole[s])


def test_rounding_moves_scores_no_more_than_float32_arithmetic_does() -> None:
    anchors, positives = 7 * torch.nn.functional.normalize(
        torch.randn(2, 400, 512, generator=torch.Generator().manual_seed(0)), dim=2
    )
    exact = anchors.double() @ positives.double().T
    moved = on_grid(anchors) @ on_grid(positives).T - exact
    off_in_float32 = (anchors @ positives.T).double() - exact
    assert moved.std() < 49 * 8e-9
    assert moved.abs().max() < 49 * 4e-8
    assert moved.std() < off_in_float32.std()


def test_embeddings_on_a_grid_stay_as_they_are() -> None:
    embeddings = on_grid(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)))
    assert on_grid(embeddings) is embeddings
    assert torch.equal(on_grid(embeddings[7:9]), embeddings[7:9])
    assert torch.equal(on_grid(torch.zeros(3, 2)), torch.zeros(3, 2, dtype=torch.float64))
    whole_numbers = torch.tensor([[1.0, -3.0], [0.5, 2.0]])
    assert torch.equal(on_grid(whole_numbers), whole_numbers.double())


@pytest.mark.parametrize("one_image", [False, True])
def test_rows_hold_the_largest_products_in_falling_order(one_image: bool) -> None:
    anchors, positives = clustered(150, 10)
    graph, extend = neighbour_graph(anchors, None if one_image else positives, World(), num_neighbours=20)
    products = anchors.double() @ (anchors if one_image else positives).double().T
    expected = products.sort(dim=1, descending=True)
    assert np.array_equal(graph.neighbours, expected.indices[:, :20])
    np.testing.assert_allclose(graph.scores, expected.values[:, :20], rtol=1e-6)
    np.testing.assert_allclose(graph.own, np.zeros(150) if one_image else products.diagonal(), rtol=1e-6)
    neighbours, scores = extend(31, 77)
    assert np.array_equal(neighbours, expected.indices[31, :77])
    assert np.array_equal(scores[:20], graph.scores[31])


def test_own_score_is_the_one_in_the_row() -> None:
    anchors, positives = clustered(90, 33)
    graph, _ = neighbour_graph(anchors, positives, World(), num_neighbours=90)
    place = np.argmax(graph.neighbours == np.arange(90)[:, None], axis=1)
    assert np.array_equal(graph.scores[np.arange(90), place], graph.own)


def test_capped_classes_are_all_of_higher_cosine() -> None:
    anchors, positives = clustered(150, 10)
    graph, _ = neighbour_graph(anchors, positives, World(), num_neighbours=3, similarity_cap=0.6)
    cosines = torch.nn.functional.cosine_similarity(anchors[:, None].double(), positives[None].double(), dim=2)
    expected = {s: np.flatnonzero(row > 0.6).tolist() for s, row in enumerate(cosines)}
    assert {s: capped.tolist() for s, capped in graph.capped.items()} == {s: c for s, c in expected.items() if c}
    assert max(len(c) for c in expected.values()) > 3


def graph_and_list(world: World) -> tuple[NeighbourGraph, list[int]]:
    graph, extend = neighbour_graph(*clustered(131, 16), world, num_neighbours=9, similarity_cap=0.8)
    return graph, best_first_classes(graph, 100, np.random.default_rng(0), extend=extend).order.tolist()


def test_ranks_that_share_the_rows_end_with_the_graph_of_one() -> None:
    expected, expected_list = graph_and_list(World())
    for graph, found in run_ranks(graph_and_list, 3):
        assert np.array_equal(graph.scores, expected.scores)
        assert np.array_equal(graph.neighbours, expected.neighbours)
        assert np.array_equal(graph.own, expected.own)
        assert {s: c.tolist() for s, c in graph.capped.items()} == {s: c.tolist() for s, c in expected.capped.items()}
        assert found == expected_list


def test_more_ranks_than_candidates_is_no_trouble() -> None:
    for rank_list in run_ranks(list_of_two, 3):
        assert sorted(rank_list) == [0, 1]


def list_of_two(world: World) -> list[int]:
    graph, extend = neighbour_graph(*clustered(2, 4), world, num_neighbours=5)
    return best_first_classes(graph, 2, np.random.default_rng(0), extend=extend).order.tolist()


def test_a_graph_pays_for_many_batches_of_a_round() -> None:
    assert not graph_pays(10_000, 10_000, 320, 1)
    assert graph_pays(10_000, 10_000, 320, 64)
    assert not graph_pays(100_000, 50_000, 320, 1)


def test_neighbours_suffice_for_the_batches_and_fit_into_memory() -> None:
    assert neighbours_needed(10_000, 10_000, 1000) == 1100
    assert neighbours_needed(10_000, 5000, 320) == 704
    assert neighbours_needed(10_000, 5000, 8) == 128
    assert neighbours_needed(100, 50, 90) == 100
    assert neighbours_needed(100_000, 50_000, 4000) == 335


def test_no_row_of_so_many_neighbours_runs_dry() -> None:
    anchors, positives = clustered(600, 6, num_groups=3)
    num_neighbours = neighbours_needed(600, 300, 150)
    graph, _ = neighbour_graph(anchors, positives, World(), num_neighbours=num_neighbours)
    assert num_neighbours == 330
    for seed in range(5):
        subset = np.sort(np.random.default_rng(seed).choice(600, 300, replace=False))
        best_first_classes(graph, 150, np.random.default_rng(seed), extend=never, subset=subset)


def never(s: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    raise AssertionError(f"class {s} was extended to {length}")
