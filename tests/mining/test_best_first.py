"""Best-first search against greedy selection, which it must repeat to the last class."""

import numpy as np
import pytest
import torch
from mining.clustered import clustered
from torch import Tensor

from facetrain.mining.best_first import NeighbourGraph, best_first_classes
from facetrain.mining.greedy import GreedyResult, greedy_classes
from facetrain.mining.neighbours import neighbour_graph
from facetrain.world import World


def integers(seed: int, num: int, dim: int) -> tuple[Tensor, Tensor]:
    """Embeddings of small integers, whose scores are often equal."""
    anchors, positives = torch.randint(-2, 3, (2, num, dim), generator=torch.Generator().manual_seed(seed)).float()
    return anchors, positives


def check_same(
    anchors: Tensor,
    positives: Tensor | None,
    num: int,
    *,
    neighbours: int = 8,
    seeds: int = 4,
    cap: float | None = None,
    hinge: bool = False,
    margin: float = 0.0,
) -> list[GreedyResult]:
    """Compare lists, scores, ties and fillers for several generators; return the lists."""
    graph, extend = neighbour_graph(anchors, positives, World(), num_neighbours=neighbours, similarity_cap=cap)
    found = []
    for seed in range(seeds):
        greedy, search = np.random.default_rng(seed), np.random.default_rng(seed)
        expected = greedy_classes(anchors, positives, num, greedy, hinge=hinge, margin=margin, similarity_cap=cap)
        result = best_first_classes(graph, num, search, hinge=hinge, margin=margin, extend=extend)
        assert result.order.tolist() == expected.order.tolist()
        assert result.violations.tolist() == expected.violations.tolist()
        assert (result.ties, result.fillers) == (expected.ties, expected.fillers)
        assert greedy.random() == search.random()  # both drew as much
        found.append(result)
    return found


@pytest.mark.parametrize(("num", "neighbours"), [(60, 4), (300, 4), (300, 64), (300, 300), (1, 4), (2, 1)])
def test_lists_are_those_of_greedy_selection(num: int, neighbours: int) -> None:
    check_same(*clustered(300, 24), num, neighbours=neighbours)


@pytest.mark.parametrize("width", [1, 3, 97, 512])
def test_lists_are_equal_at_any_width(width: int) -> None:
    anchors, positives = torch.randn(2, 203, width, generator=torch.Generator().manual_seed(width))
    check_same(3.7 * anchors, 3.7 * positives, 150)


@pytest.mark.parametrize(("hinge", "margin"), [(False, 0.0), (True, 0.0), (True, 3.0), (True, 0.1)])
@pytest.mark.parametrize("neighbours", [1, 7, 90])
def test_ties_are_drawn_over_classes_and_not_over_edges(hinge: bool, margin: float, neighbours: int) -> None:
    for seed in range(3):
        found = check_same(*integers(seed, 90, 4), 90, neighbours=neighbours, seeds=2, hinge=hinge, margin=margin)
        assert found[0].ties > 5


@pytest.mark.parametrize("margin", [0.0, 0.4, 2.0])
def test_hinge_gives_the_lists_of_greedy_selection(margin: float) -> None:
    found = check_same(*clustered(200, 16), 200, hinge=True, margin=margin)
    assert any(result.ties for result in found)


def test_equal_embeddings_give_the_lists_of_greedy_selection() -> None:
    for neighbours in (3, 70):
        found = check_same(torch.full((70, 5), 0.3), torch.full((70, 5), 0.3), 70, neighbours=neighbours)
        assert found[0].ties == 68  # the last of the 70 is alone
    check_same(torch.zeros(40, 5), torch.zeros(40, 5), 40)


@pytest.mark.parametrize("copies", [2, 5, 60])
def test_duplicates_give_the_lists_of_greedy_selection(copies: int) -> None:
    anchors, positives = clustered(240 // copies, 16)
    check_same(anchors.repeat(copies, 1), positives.repeat(copies, 1), 120, neighbours=6)


def test_one_image_a_class_drops_the_second_term() -> None:
    anchors, _ = clustered(150, 16)
    anchors = anchors * torch.linspace(0.5, 2, 150)[:, None]
    for result in check_same(anchors, None, 100):
        first, second = result.order[:2]
        scores = anchors.double() @ anchors[first].double()
        scores[first] = -torch.inf
        assert second == scores.argmax()
        assert result.violations[1] == pytest.approx(float(scores.max()))


@pytest.mark.parametrize("cap", [0.95, 0.6, 0.05])
def test_similarity_cap_keeps_like_classes_out_of_a_batch(cap: float) -> None:
    anchors, positives = clustered(200, 16)
    cosines = torch.nn.functional.cosine_similarity(anchors[:, None].double(), positives[None].double(), dim=2)
    for num in (40, 200):
        for result in check_same(anchors, positives, num, cap=cap):
            num_scored = len(result.order) if num == 40 and not result.fillers else _first_filler(result)
            chosen = torch.from_numpy(result.order[:num_scored])
            assert cosines[chosen][:, chosen].triu(diagonal=1).max() <= cap
            assert len(set(result.order.tolist())) == num


def _first_filler(result: GreedyResult) -> int:
    """Fillers begin where the cap has left no class, and only fillers follow."""
    return len(result.order) - result.fillers


def test_classes_of_a_subset_are_those_of_a_graph_of_the_subset() -> None:
    anchors, positives = clustered(300, 24)
    for cap in (None, 0.7):
        graph, extend = neighbour_graph(anchors, positives, World(), num_neighbours=8, similarity_cap=cap)
        for seed in range(6):
            subset = np.sort(np.random.default_rng(100 + seed).choice(300, 120, replace=False))
            rng = np.random.default_rng(seed)
            result = best_first_classes(graph, 110, rng, hinge=seed % 2 == 1, extend=extend, subset=subset)
            alone = greedy_classes(
                anchors[subset],
                positives[subset],
                110,
                np.random.default_rng(seed),
                hinge=seed % 2 == 1,
                similarity_cap=cap,
            )
            assert result.order.tolist() == subset[alone.order].tolist()


def test_an_approximate_graph_goes_on_with_random_classes_and_counts_them() -> None:
    # Two closed circles of three: 0 -> 1 -> 2 -> 0 and 3 -> 4 -> 5 -> 3.
    neighbours = np.array([[1], [2], [0], [4], [5], [3]], dtype=np.int32)
    graph = NeighbourGraph(neighbours, np.ones((6, 1), dtype=np.float32), np.zeros(6, dtype=np.float32))
    for seed in range(8):
        result = best_first_classes(graph, 6, np.random.default_rng(seed), extend=None)
        assert sorted(result.order) == list(range(6))
        assert result.fillers == 1
        assert {*result.order[:3]} in ({0, 1, 2}, {3, 4, 5})
        assert result.violations.tolist() == [0, 1, 1, 0, 1, 1]
        assert result.mean_violation == 1
    assert best_first_classes(graph, 4, np.random.default_rng(0), extend=None, subset=np.arange(4)).fillers == 1


def test_rows_of_an_approximate_graph_may_be_short_or_empty() -> None:
    neighbours = np.array([[1, 2], [-1, -1], [0, -1], [3, 0]], dtype=np.int32)
    scores = np.array([[5, 4], [-np.inf, -np.inf], [3, -np.inf], [7, 6]], dtype=np.float32)
    graph = NeighbourGraph(neighbours, scores, np.full(4, 2, dtype=np.float32))
    found = {}
    for seed in range(40):
        result = best_first_classes(graph, 4, np.random.default_rng(seed), extend=None)
        found[tuple(result.order.tolist())] = (result.violations.tolist(), result.fillers)
    assert found[0, 1, 2, 3] == ([0, 3, 2, 0], 1)
    assert found[3, 0, 1, 2] == ([0, 4, 3, 2], 0)
    assert found[1, 2, 0, 3] == ([0, 0, 1, 0], 2)


def test_rows_are_extended_only_when_they_run_dry() -> None:
    anchors, positives = clustered(300, 24)
    graph, extend = neighbour_graph(anchors, positives, World(), num_neighbours=300)

    def never(s: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        raise AssertionError(f"class {s} was extended to {length}")

    best_first_classes(graph, 300, np.random.default_rng(0), extend=never)
    short, extend = neighbour_graph(anchors, positives, World(), num_neighbours=2)
    asked: list[tuple[int, int]] = []

    def count(s: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        asked.append((s, length))
        return extend(s, length)

    best_first_classes(short, 50, np.random.default_rng(0), extend=count)
    assert 0 < len(asked) < 150
    assert {length for _, length in asked} <= {8, 32, 128, 300}


@pytest.mark.parametrize("num", [0, 7])
def test_more_classes_than_there_are_is_refused(num: int) -> None:
    graph, extend = neighbour_graph(*clustered(6, 4), World(), num_neighbours=2)
    with pytest.raises(ValueError, match=f"expected 1 to 6, the number of candidates, got {num}"):
        best_first_classes(graph, num, np.random.default_rng(0), extend=extend)
