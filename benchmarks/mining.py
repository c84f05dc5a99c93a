"""What mining a batch costs: greedy selection one by one against best-first search on a graph that batches share.

    OMP_NUM_THREADS=1 python benchmarks/mining.py [--quick] [--json FILE] [--exact 10000] [--approximate 100000 1000000]

Embeddings are drawn, with the structure of faces: identities lie in groups, groups in larger groups, and two images of
an identity differ. Every case is seeded; times are medians over batches mined from different starts.

- `plain` is incremental greedy selection in float32, as one would write it: a product with all positives per class.
- `reference` is `greedy_classes`, whose scores are exact in float64, so that lists can be compared to the bit.
- `search` is `best_first_classes`, given the graph.
- Where the graph is approximate, classes are those of a table in bfloat16, as in `mining.mode=table`.

Dims: C candidate classes, D embedding width, N classes of a batch.
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facetrain.mining.approximate import approximate_graph
from facetrain.mining.best_first import Extend, NeighbourGraph, Row, best_first_classes
from facetrain.mining.embedding_table import EmbeddingTable
from facetrain.mining.greedy import GreedyResult, greedy_classes
from facetrain.mining.neighbours import graph_pays, neighbour_graph, neighbours_needed
from facetrain.world import World

T = TypeVar("T")
Clock = Callable[[], float]
"""Seconds of some clock."""

BATCHES_PER_ROUND = (1, 8, 64)
SEARCHES, GREEDY_RUNS = 5, 2
NEIGHBOURS = 128
"""Of the approximate graph."""
_PIECE = 1 << 16
"""Classes that are drawn at a time."""


@dataclass(frozen=True)
class ExactCase:
    """Best-first search on an exact graph; times in ms, those of a batch unless they say otherwise."""

    candidates: int
    pairs: int
    plain_ms: float
    reference_ms: float
    search_ms: float
    neighbours: int
    search_extends: int
    """Rows that ran dry and were computed anew during the search."""
    same_lists: bool
    graph_ms: float
    """Once a round."""
    batch_ms_by_batches: dict[int, float]
    """Graph and search a batch, by the batches that share the graph."""
    break_even_batches: int
    """Batches from which the graph is faster than plain greedy selection."""
    rule_takes_graph_from: int
    """Batches from which `graph_pays` says so."""


@dataclass(frozen=True)
class ApproximateCase:
    """Best-first search on a table's graph, found in clusters: not exact, so its lists are judged by violations."""

    candidates: int
    pairs: int
    plain_ms: float
    search_ms: float
    fillers: int
    graph_ms: float
    """Once a round."""
    recall: float
    """Share of the true neighbours that the graph holds, over 128 random classes."""
    violation_plain: float
    violation_search: float
    """Mean over the added classes, of one list from the same start."""
    same_classes: float
    """Share of the classes of the two lists that are in both."""
    batch_ms_by_batches: dict[int, float]
    break_even_batches: int


def main() -> None:
    """Measure, print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, under a minute")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--exact", type=int, nargs="*", help="candidates for the exact graph (default 10000)")
    parser.add_argument(
        "--approximate", type=int, nargs="*", help="candidates for an approximate graph (default 100000)"
    )
    parser.add_argument("--probes", type=int, default=16, help="clusters that a class looks into (approximate graph)")
    parser.add_argument("--pairs", type=int, nargs="*", help="classes of a batch (default 320 1000 4000)")
    parser.add_argument("--width", type=int, help="embedding width (default 512)")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of this process: where others run beside it")
    args = parser.parse_args()
    if args.cpu_time:
        torch.set_num_threads(1)
    clock = time.process_time if args.cpu_time else time.perf_counter
    exact = args.exact if args.exact is not None else [3000] if args.quick else [10_000]
    approximate = args.approximate if args.approximate is not None else [8000] if args.quick else [100_000]
    pairs = args.pairs or ([100, 320] if args.quick else [320, 1000, 4000])
    width = args.width or (128 if args.quick else 512)

    where = {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "width": width,
        "clock": "CPU time" if args.cpu_time else "wall time",
    }
    print("  ".join(f"{key} {value}" for key, value in where.items()))
    exact_cases = [case for size in exact for case in measure_exact(size, width, pairs, clock)]
    print_exact(exact_cases)
    approximate_cases = [
        case for size in approximate for case in measure_approximate(size, width, pairs, args.probes, clock)
    ]
    print_approximate(approximate_cases)
    if args.json:
        cases = {"exact": exact_cases, "approximate": approximate_cases}
        report = where | {name: [asdict(case) for case in found] for name, found in cases.items()}
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def grouped_faces(num: int, width: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw anchors and positives, float32 [.., D] of norm 5, piece by piece: groups of 50 classes, in groups of 20."""
    rng = torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tensor:
        return torch.randn(count, width, generator=rng)

    num_groups = max(2, num // 50)
    num_large = max(2, num_groups // 20)
    groups = draw(num_large)[torch.randint(num_large, (num_groups,), generator=rng)] + draw(num_groups)
    for group in torch.randint(num_groups, (num,), generator=rng).split(_PIECE):
        classes = groups[group] + draw(len(group))
        anchors, positives = (5 * torch.nn.functional.normalize(classes + draw(len(group)), dim=1) for _ in range(2))
        yield anchors, positives


@torch.no_grad()
def plain_classes(anchors_CD: Tensor, positives_CD: Tensor, rng: np.random.Generator) -> Iterator[tuple[int, float]]:
    """Yield classes and their scores as `greedy_classes` selects them, in float32 and without looking for ties."""
    best_C, taken_C = torch.full((2, len(anchors_CD)), -torch.inf)
    taken_C.zero_()
    newest, violation = int(rng.random() * len(anchors_CD)), 0.0
    while True:
        yield newest, violation
        taken_C[newest] = -torch.inf
        products_C = positives_CD @ anchors_CD[newest]
        torch.maximum(best_C, products_C - products_C[newest], out=best_C)
        value, place = (best_C + taken_C).max(dim=0)
        newest, violation = int(place), float(value)


def result_of(selected: Sequence[tuple[int, float]]) -> GreedyResult:
    """Return classes and their scores as a list that is mined."""
    order, violations = zip(*selected, strict=True)
    return GreedyResult(np.array(order), np.array(violations, dtype=np.float32), ties=0)


def measure_exact(num_candidates: int, width: int, pairs: list[int], clock: Clock) -> list[ExactCase]:
    """Time all numbers of pairs on exact graphs, and compare the lists."""
    anchors, positives = (torch.cat(views) for views in zip(*grouped_faces(num_candidates, width, seed=0), strict=True))
    cases = []
    for num in pairs:
        graph_ms, (graph, extend) = timed(lambda num=num: build(anchors, positives, num), clock)
        dry: set[tuple[int, int]] = set()

        def extend_and_count(s: int, length: int, dry: set[tuple[int, int]] = dry, extend: Extend = extend) -> Row:
            dry.add((s, length))
            return extend(s, length)

        def search(
            seed: int, num: int = num, graph: NeighbourGraph = graph, extend: Extend = extend_and_count
        ) -> GreedyResult:
            return best_first_classes(graph, num, np.random.default_rng(seed), extend=extend)

        def reference(seed: int, num: int = num) -> GreedyResult:
            return greedy_classes(anchors, positives, num, np.random.default_rng(seed))

        def plain(seed: int, num: int = num) -> GreedyResult:
            return result_of([*islice(plain_classes(anchors, positives, np.random.default_rng(seed)), num)])

        search_ms, found = median_of(search, SEARCHES, clock)
        plain_ms, _ = median_of(plain, GREEDY_RUNS, clock)
        reference_ms, expected = median_of(reference, GREEDY_RUNS, clock)
        cases.append(
            ExactCase(
                candidates=num_candidates,
                pairs=num,
                plain_ms=plain_ms,
                reference_ms=reference_ms,
                search_ms=search_ms,
                neighbours=graph.neighbours.shape[1],
                search_extends=round(len(dry) / SEARCHES),
                same_lists=all(same(a, b) for a, b in zip(found, expected, strict=False)),
                graph_ms=graph_ms,
                batch_ms_by_batches=shared(graph_ms, search_ms),
                break_even_batches=break_even(graph_ms, search_ms, plain_ms),
                rule_takes_graph_from=next(
                    b for b in range(1, 10**6) if graph_pays(num_candidates, num_candidates, num, b)
                ),
            )
        )
    return cases


def build(anchors_CD: Tensor, positives_CD: Tensor, num: int) -> tuple[NeighbourGraph, Extend]:
    """Build the exact graph for batches of `num` out of all candidates."""
    num_neighbours = neighbours_needed(len(anchors_CD), len(anchors_CD), num)
    return neighbour_graph(anchors_CD, positives_CD, World(), num_neighbours=num_neighbours)


def measure_approximate(
    num_candidates: int, width: int, pairs: list[int], probes: int, clock: Clock
) -> list[ApproximateCase]:
    """Time all numbers of pairs on one graph of a table, and say how far its lists are from greedy ones."""
    table = EmbeddingTable(np.arange(num_candidates), dtype=torch.bfloat16, world=World())
    rows = np.arange(num_candidates)
    pieces = zip(torch.from_numpy(rows).split(_PIECE), grouped_faces(num_candidates, width, seed=0), strict=True)
    for labels, views in pieces:
        table.observe(0, labels, torch.stack(views))
    sizes = {"num_neighbours": NEIGHBOURS, "probes": probes}
    graph_ms, (graph, recall) = timed(
        lambda: approximate_graph(table, rows, similarity_cap=None, generator=np.random.default_rng(0), **sizes), clock
    )
    anchors, positives = table.own(rows)
    selection = plain_classes(anchors, positives, np.random.default_rng(0))
    selected: list[tuple[int, float]] = []
    plain_ms, cases = 0.0, []
    for num in sorted(pairs):  # a shorter list is the beginning of a longer one

        def search(seed: int, num: int = num) -> GreedyResult:
            return best_first_classes(graph, num, np.random.default_rng(seed), extend=None)

        search_ms, (found, *_) = median_of(search, SEARCHES, clock)
        num_more = num - len(selected)
        more_ms, more = timed(lambda num_more=num_more: [*islice(selection, num_more)], clock)
        plain_ms += more_ms
        selected += more
        greedy = result_of(selected)
        cases.append(
            ApproximateCase(
                candidates=num_candidates,
                pairs=num,
                plain_ms=plain_ms,
                search_ms=search_ms,
                fillers=found.fillers,
                graph_ms=graph_ms,
                recall=recall,
                violation_plain=greedy.mean_violation,
                violation_search=true_violation(anchors, positives, found.order),
                same_classes=len(np.intersect1d(found.order, greedy.order)) / num,
                batch_ms_by_batches=shared(graph_ms, search_ms),
                break_even_batches=break_even(graph_ms, search_ms, plain_ms),
            )
        )
    return cases


def true_violation(anchors_CD: Tensor, positives_CD: Tensor, order: NDArray[np.int64]) -> float:
    """Return the mean, over the added classes of a list, of the exact score that each had when it was added."""
    products_NN = anchors_CD[order] @ positives_CD[order].T
    scores_NN = (
        (products_NN - products_NN.diagonal()[:, None])
        .triu(diagonal=1)
        .masked_fill(torch.ones_like(products_NN).tril().bool(), -torch.inf)
    )
    return float(scores_NN.amax(dim=0)[1:].mean())


def same(one: GreedyResult, other: GreedyResult) -> bool:
    """Return whether two lists are equal in order, scores and ties."""
    return (
        np.array_equal(one.order, other.order)
        and np.array_equal(one.violations, other.violations)
        and one.ties == other.ties
    )


def shared(graph_ms: float, search_ms: float) -> dict[int, float]:
    """Return the time a batch takes by the number of batches that share a graph."""
    return {batches: graph_ms / batches + search_ms for batches in BATCHES_PER_ROUND}


def break_even(graph_ms: float, search_ms: float, greedy_ms: float) -> int:
    """Return the batches from which a graph and its searches take less time than greedy selection; 0 if never."""
    return math.ceil(graph_ms / (greedy_ms - search_ms)) if greedy_ms > search_ms else 0


def timed(work: Callable[[], T], clock: Clock) -> tuple[float, T]:
    """Return the milliseconds that the work took, and its result."""
    started_at = clock()
    result = work()
    return 1e3 * (clock() - started_at), result


def median_of(mine: Callable[[int], GreedyResult], runs: int, clock: Clock) -> tuple[float, list[GreedyResult]]:
    """Return the median milliseconds of mining from seeds 0 to runs - 1, and the lists."""
    times, found = zip(*(timed(lambda seed=seed: mine(seed), clock) for seed in range(runs)), strict=True)
    return statistics.median(times), list(found)


def print_exact(cases: list[ExactCase]) -> None:
    """Print a row for each case."""
    head = ["C", "N", "plain", "reference", "search", "times faster", "same lists", "K", "extended", "graph once"]
    head += [f"a batch of {b}" for b in BATCHES_PER_ROUND] + ["break-even", "rule"]
    print("\nexact graph; ms a batch")
    print_table(
        head,
        [
            [
                f"{c.candidates:,}",
                f"{c.pairs:,}",
                f"{c.plain_ms:.0f}",
                f"{c.reference_ms:.0f}",
                f"{c.search_ms:.1f}",
                f"{c.plain_ms / c.search_ms:.1f}",
                "yes" if c.same_lists else "NO",
                f"{c.neighbours:,}",
                str(c.search_extends),
                f"{c.graph_ms:.0f}",
                *(f"{ms:.0f}" for ms in c.batch_ms_by_batches.values()),
                str(c.break_even_batches),
                str(c.rule_takes_graph_from),
            ]
            for c in cases
        ],
    )


def print_approximate(cases: list[ApproximateCase]) -> None:
    """Print a row for each case."""
    head = ["C", "N", "plain", "search", "graph once", *(f"a batch of {b}" for b in BATCHES_PER_ROUND), "break-even"]
    head += ["recall", "violation plain", "of this", "same classes", "fillers"]
    print("\napproximate graph, found in clusters; ms a batch")
    print_table(
        head,
        [
            [
                f"{c.candidates:,}",
                f"{c.pairs:,}",
                f"{c.plain_ms:.0f}",
                f"{c.search_ms:.1f}",
                f"{c.graph_ms:.0f}",
                *(f"{ms:.0f}" for ms in c.batch_ms_by_batches.values()),
                str(c.break_even_batches),
                f"{c.recall:.1%}",
                f"{c.violation_plain:.4f}",
                f"{c.violation_search:.4f}",
                f"{c.same_classes:.0%}",
                str(c.fillers),
            ]
            for c in cases
        ],
    )


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Print columns aligned to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    for row in [head, *rows]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


if __name__ == "__main__":
    main()
