"""Best-first search of hard classes: the lists of `greedy_classes`, from a graph that the batches of a round share.

Adding the class of the largest score to those selected is taking the heaviest edge that leaves them, where the edge
s -> c weighs <a_s, p_c> - <a_s, p_s>. With the edges of each class sorted, a heap of the heaviest unread edge of each
selected class finds it without looking at the rest, which is nearly all of them.

Dims: C candidate classes, K neighbours of a class, N classes selected (`num`).
"""

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from facetrain.mining.greedy import GreedyResult, check_number

Row = tuple[NDArray[np.int32], NDArray[np.float32]]
"""Classes, int32 [length], and their scores, float32 [length], falling."""

Extend = Callable[[int, int], Row]
"""(class, length) -> the first `length` entries of that class's full row, those of the graph among them."""


@dataclass(frozen=True)
class NeighbourGraph:
    """For each class, those that are hardest against it."""

    neighbours: NDArray[np.int32]
    """int32 [C, K]; row s holds the classes c of largest <a_s, p_c>, s itself among them if its score says so. Where an
    approximate search found fewer, -1 fills the row."""
    scores: NDArray[np.float32]
    """float32 [C, K]; <a_s, p_c> of each neighbour, falling along a row."""
    own: NDArray[np.float32]
    """float32 [C]; <a_s, p_s>, or 0 where there is one image a class."""
    capped: Mapping[int, NDArray[np.int32]] = field(default_factory=dict)
    """Classes that may not join a batch after class s, for the similarity cap; not limited to the K neighbours."""


def best_first_classes(
    graph: NeighbourGraph,
    num: int,
    generator: np.random.Generator,
    *,
    hinge: bool = False,
    margin: float = 0.0,
    extend: Extend | None,
    subset: NDArray[np.int64] | None = None,
) -> GreedyResult:
    """Select classes that are hard for one another, as `greedy_classes` does, without its C products per class.

    The result is that of `greedy_classes` for the same generator, equal scores included, if the graph's rows are exact
    and `extend` gives more of them. With an approximate graph it is whatever the graph's edges lead to; where all rows
    have run dry, a random class is drawn, counted as a filler, and the search goes on from there.

    Args:
        graph: Of all C candidates; from `neighbour_graph`, or approximate.
        num: Classes to select, 1 to C, or to the size of the subset.
        generator: Draws the first class and the ties.
        hinge: As in `greedy_classes`.
        margin: As in `greedy_classes`.
        extend: Gives a longer row of the same scores; None takes the graph for all there is.
        subset: int64, rising; the classes that can be selected. None is all of them.

    Returns:
        Classes as rows of the graph.

    Raises:
        ValueError: `num` is out of bounds.
    """
    candidates = np.arange(len(graph.own)) if subset is None else subset
    check_number(num, len(candidates))
    draws = generator.random(num).tolist()
    search = _Search(graph, candidates, hinge, margin, extend)
    chosen = int(candidates[int(draws[0] * len(candidates))])
    order, violations, ties, fillers = [chosen], [0.0], 0, 0
    for draw in draws[1:]:
        search.select(chosen)
        violation, equals = search.hardest()
        if equals:
            ties += len(equals) > 1
        else:
            violation, equals = 0.0, search.open_classes() or np.setdiff1d(candidates, order).tolist()
            fillers += 1
        chosen = equals[int(draw * len(equals))]
        order.append(chosen)
        violations.append(violation)
    return GreedyResult(np.array(order), np.array(violations, dtype=np.float32), ties, fillers)


class _Frontier:
    """The unread edges of a selected class, heaviest first."""

    __slots__ = ("bound", "classes", "loaded", "next", "row", "source", "values")

    def __init__(self, source: int | None, classes: NDArray[np.int32], values: NDArray[np.float32]) -> None:
        self.source = source  # None: a row of ties, which has no more edges than these
        self.row = (classes, values)
        self.loaded = 0
        # The part of the row that is being read, as numbers that Python is fast with.
        self.classes: list[int] = []
        self.values: list[float] = []
        self.next = 0
        self.bound = float(values[0])  # on what is not loaded

    @property
    def value(self) -> float:
        """Weight of the next edge, or a bound on it where it has yet to be loaded."""
        return self.values[self.next] if self.next < len(self.values) else self.bound


_HEAD = 32


class _Search:
    """The classes that are open, and a heap of the selected ones' frontiers."""

    def __init__(
        self,
        graph: NeighbourGraph,
        candidates: NDArray[np.int64],
        hinge: bool,
        margin: float,
        extend: Extend | None,
    ) -> None:
        self.graph, self.extend = graph, extend
        self.shift = np.float32(margin if hinge else 0.0)
        self.floor = 0.0 if hinge else -np.inf
        self.is_open = bytearray(len(graph.own))  # faster to index from Python than an array
        self.is_open_C = np.frombuffer(self.is_open, dtype=np.bool_)  # the same memory
        self.is_open_C[candidates] = True
        self.num_open = len(candidates)
        self.heap: list[tuple[float, int, _Frontier]] = []  # (-value, number, frontier); the number settles comparisons
        self.num_pushed = 0

    def open_classes(self) -> list[int]:
        """Return the classes that can be selected, rising."""
        return np.flatnonzero(self.is_open_C).tolist()

    def select(self, s: int) -> None:
        """Close a class and let its edges in."""
        self._close([s, *self.graph.capped.get(s, ())])
        found = self.graph.neighbours[s]
        found = found if found[-1] >= 0 else found[found >= 0]
        if len(found):
            self._push(_Frontier(s, found, self._weigh(s, self.graph.scores[s, : len(found)])))

    def hardest(self) -> tuple[float, list[int]]:
        """Return the largest score of an open class, and all classes that have it, rising; none if edges ran out."""
        heap, tied, best = self.heap, set[int](), self.floor
        while heap and len(tied) < self.num_open and -heap[0][0] >= best and -heap[0][0] > self.floor:
            value, number, frontier = -heap[0][0], *heap[0][1:]
            found = self._read(frontier, value)
            if found:
                best = value
                tied.update(found)
            if self._goes_on(frontier):
                heapq.heapreplace(heap, (-frontier.value, number, frontier))
            else:
                heapq.heappop(heap)
        if not tied and self.floor == 0.0:
            return 0.0, self.open_classes()  # with the hinge, all that don't violate are equal
        equals = sorted(tied)
        if len(equals) > 1:
            # Read, but not all of them will be selected now: a row of their own keeps them on the frontier.
            classes = np.array(equals, dtype=np.int32)
            self._push(_Frontier(None, classes, np.full(len(equals), best, dtype=np.float32)))
        return best, equals

    def _weigh(self, s: int, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        # float32 throughout, as in greedy_classes. Rounding keeps the order, so that rows stay sorted.
        return np.asarray(scores - self.graph.own[s] + self.shift, dtype=np.float32)

    def _close(self, classes: Iterable[int]) -> None:
        for c in classes:
            self.num_open -= self.is_open[c]
            self.is_open[c] = 0

    def _push(self, frontier: _Frontier) -> None:
        heapq.heappush(self.heap, (-frontier.value, self.num_pushed, frontier))
        self.num_pushed += 1

    def _goes_on(self, frontier: _Frontier) -> bool:
        if frontier.next < len(frontier.classes) or frontier.loaded < len(frontier.row[0]):
            return True
        complete = len(frontier.row[0]) == len(self.graph.own)
        return self.extend is not None and frontier.source is not None and not complete

    def _read(self, frontier: _Frontier, value: float) -> list[int]:
        """Read the edges that weigh `value` and return their open classes; closed classes that follow are skipped."""
        if frontier.next == len(frontier.classes):
            self._load(frontier)
        found: list[int] = []
        for i in range(frontier.next, len(frontier.classes)):
            c = frontier.classes[i]
            if self.is_open[c]:
                if frontier.values[i] < value:
                    frontier.next = i
                    return found
                found.append(c)
        frontier.next = len(frontier.classes)
        return found

    def _load(self, frontier: _Frontier) -> None:
        """Load the next part of a row, as long as all before it, without the classes that are closed: they stay so."""
        if frontier.loaded == len(frontier.row[0]):
            self._lengthen(frontier)
        classes, values = (column[frontier.loaded : max(_HEAD, 2 * frontier.loaded)] for column in frontier.row)
        is_open = self.is_open_C[classes]
        frontier.classes, frontier.values = classes[is_open].tolist(), values[is_open].tolist()
        frontier.next, frontier.bound = 0, float(values[-1])
        frontier.loaded += len(classes)

    def _lengthen(self, frontier: _Frontier) -> None:
        """Replace a row that was read to its end by a longer one, read from its start, since equals may change places.

        What was read before is closed by now, or stands in a row of ties that will be looked at together with this one.
        """
        assert self.extend is not None, "only rows that can be extended stay in the heap when they are read"
        assert frontier.source is not None, "a row of ties leaves the heap when it is read"
        classes, scores = self.extend(frontier.source, min(4 * len(frontier.row[0]), len(self.graph.own)))
        frontier.row = (classes, self._weigh(frontier.source, scores))
        frontier.loaded = 0
