"""Greedy selection of hard classes by best-first search on a graph of nearest classes.

Dims: C classes, K neighbours of a class, N classes selected (`num`).
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrain.mining.greedy import GreedyResult


@dataclass(frozen=True)
class NeighbourGraph:
    """To each class s the classes c of largest <a_s, p_c>."""

    neighbours: NDArray[Any]
    """int [C, K], by falling score."""
    scores: NDArray[np.float32]
    """float32 [C, K]; <a_s, p_c>."""
    own: NDArray[np.float32]
    """float32 [C]; <a_s, p_s>."""


def best_first_classes(
    graph: NeighbourGraph,
    num: int,
    generator: np.random.Generator,
    *,
    hinge: bool = False,
    margin: float = 0.0,
    extend: Callable[[int, int], Any] | None,
    subset: NDArray[np.int64] | None = None,
) -> GreedyResult:
    """Select classes that are hard for one another: the rule of `greedy_classes`, on the graph's edges alone."""
    assert extend is None
    num_classes, num_neighbours = graph.neighbours.shape
    candidates = np.arange(num_classes) if subset is None else subset
    lowest = 0.0 if hinge else -np.inf
    taken = np.ones(num_classes, dtype=np.bool_)
    taken[candidates] = False
    order, violations, ties = [int(candidates[int(generator.random() * len(candidates))])], [0.0], 0
    edges: list[tuple[float, int, int]] = []  # (-score, s, k), the next of each row and some that were put back

    def push(s: int, k: int) -> None:
        while k < num_neighbours and taken[graph.neighbours[s, k]]:
            k += 1
        if k < num_neighbours:
            heapq.heappush(edges, (float(graph.own[s] - graph.scores[s, k]) - margin, s, k))

    while len(order) < num:
        taken[order[-1]] = True
        push(order[-1], 0)
        equals: list[tuple[float, int, int]] = []
        while edges and -edges[0][0] > lowest and (not equals or edges[0][0] == equals[0][0]):
            edge = heapq.heappop(edges)
            push(edge[1], edge[2] + 1)
            if not taken[graph.neighbours[edge[1:]]]:
                equals.append(edge)
        choices = sorted({int(graph.neighbours[edge[1:]]) for edge in equals}) or np.flatnonzero(~taken).tolist()
        violations.append(-equals[0][0] if equals else 0.0)
        ties += len(choices) > 1
        order.append(choices[int(generator.random() * len(choices))])
        for edge in equals:
            heapq.heappush(edges, edge)
    return GreedyResult(np.array(order), np.array(violations, dtype=np.float32), ties)
