"""Mine batches from a table of millions of classes, and say what it takes: `python benchmarks/mining_table.py`.

Two million drawn classes of 512 numbers in bfloat16 by default, on one process and the CPU: 4.1 GB of table. `--quick`
takes 20,000 of 64 numbers instead. `--json FILE` writes the figures.

The classes form groups of about a hundred look-alikes, as people do in a trained network; unlike those of real faces,
all groups are as tight, so that the recall says what this search does and nothing about a face set. How much worse the
approximate graph mines is measured on a subset of the classes, where exact greedy selection can still be run.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
import torch

from facetrain.config import MiningConfig
from facetrain.mining.approximate import approximate_graph
from facetrain.mining.best_first import best_first_classes
from facetrain.mining.embedding_table import EmbeddingTable
from facetrain.mining.greedy import greedy_classes
from facetrain.mining.table import mine_table_round
from facetrain.world import World

_GROUP = 100
"""Look-alikes of a group, on average."""
_STEP = 1 << 16
"""Classes that are observed at a time, as by a training step of so many pairs."""


def main() -> None:
    """Fill the table, mine a round, compare a subset with exact selection, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=2_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=4096, help="N, classes of a batch")
    parser.add_argument("--batches", type=int, default=8, help="batches of the round")
    parser.add_argument("--neighbours", type=int, default=32)
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--subset", type=int, default=20_000, help="classes of the comparison with exact selection")
    parser.add_argument("--quick", action="store_true", help="20,000 classes of width 64, batches of 256")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    if args.quick:
        args.classes, args.width, args.pairs, args.subset = 20_000, 64, 256, 5_000

    table, groups, seconds_per_step = filled_table(args.classes, args.width)
    figures = {"classes": args.classes, "width": args.width, "pairs": args.pairs, "observe_s": seconds_per_step}
    config = MiningConfig(
        mode="table",
        batches_per_round=args.batches,
        table_neighbours=args.neighbours,
        table_probes=args.probes,
        table_exact_limit=1,
    )
    started_at, cpu_started_at = time.perf_counter(), time.process_time()
    mined = mine_table_round(0, 1 << 20, config, num_pairs=args.pairs, table=table, seed=0)
    assert mined is not None, "all classes have been observed"
    figures |= {key.removeprefix("mining/"): value for key, value in mined.stats.items()}
    figures |= {
        "round_s": time.perf_counter() - started_at,
        "round_cpu_s": time.process_time() - cpu_started_at,  # of all threads; less sensitive to what else runs
        "peak_gib": peak_gib(),
    }
    rows = np.flatnonzero(groups < args.subset // _GROUP)
    figures |= compare_with_exact(table, rows, min(args.pairs, args.subset // 4), config)
    for key, value in figures.items():
        print(f"{key:24} {value:12.4g}")
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


def filled_table(num_classes: int, width: int) -> tuple[EmbeddingTable, np.ndarray, float]:
    """Return a table in which every class is fresh, each class's group, and the seconds to observe a step's worth."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(num_classes // _GROUP, width, generator=generator)
    groups = torch.randint(len(centres), (num_classes,), generator=generator)
    labels = torch.arange(num_classes)
    table, seconds = EmbeddingTable(labels.numpy(), dtype=torch.bfloat16, world=World()), []
    for some in labels.split(_STEP):
        person = centres[groups[some]] + torch.randn(len(some), width, generator=generator)
        views = person + 0.7 * torch.randn(2, len(some), width, generator=generator)
        views *= 5 / views.norm(dim=2, keepdim=True)  # about as long as the penalty of the N-pair loss leaves them
        observed_at = time.perf_counter()
        table.observe(1 << 20, some, views)
        seconds.append(time.perf_counter() - observed_at)
    return table, groups.numpy(), float(np.median(seconds))


def compare_with_exact(
    table: EmbeddingTable, rows: np.ndarray, num_pairs: int, config: MiningConfig
) -> dict[str, float]:
    """Mine one batch of some classes, whole groups, exactly and by an approximate graph of them alone."""
    graph, recall = approximate_graph(
        table,
        rows,
        num_neighbours=config.table_neighbours,
        probes=config.table_probes,
        similarity_cap=None,
        generator=np.random.default_rng(0),
    )
    approximate = best_first_classes(graph, num_pairs, np.random.default_rng(0), extend=None)
    exact = greedy_classes(*table.own(rows), num_pairs, np.random.default_rng(0))
    return {
        "subset_classes": len(rows),
        "subset_pairs": num_pairs,
        "subset_recall": recall,
        "subset_fillers": approximate.fillers,
        "subset_violation": approximate.mean_violation,
        "exact_violation": exact.mean_violation,
    }


def peak_gib() -> float:
    """Return the most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
