"""What a crowd of distractors in the gallery costs: time and memory of each way to search it, and what it finds.

    python benchmarks/distractors.py [--quick] [--json FILE] [--distractors 1000000] [--probes 3530] [--width 512]

Embeddings are drawn with the structure of faces (people lie in groups) and kept as float16 in an .npy file. Each case
runs in a process of its own, whose highest resident memory is reported, together with what it had before it began to
search, that is, Python, torch and the probes. `faiss flat` is FAISS's exact search over the same blocks. `agree` is the
share of the probes whose best score is that of the exact search: 1 for another exact search, recall@1 for ivf, whose
time includes its own measurement of recall.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from facetrain.evaluation.distractors import RANKS_KEPT, Crowd, open_crowd, search_crowd
from facetrain.evaluation.inputs import unit_vectors
from facetrain.search import has_faiss
from facetrain.world import World

Search = Callable[[NDArray[np.float32], Crowd], NDArray[np.float32]]
"""Probes and a crowd -> the best scores of each probe, [probes, kept]."""

GROUPS = 1000
SPREAD = 1.5
"""Length of a person's offset from its group, where that of the group is 1."""


@dataclass(frozen=True)
class Case:
    """One way to search."""

    name: str
    seconds: float
    scores_per_s: float
    peak_mib: float
    """Highest resident memory of the process."""
    before_mib: float
    """Its resident memory before the search."""
    agree: float
    """Share of the probes whose best score is that of the exact search, within 1e-5."""


def main() -> None:
    """Draw the crowd, run every case and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--distractors", type=int, default=1_000_000)
    parser.add_argument("--probes", type=int, default=3530)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--quick", action="store_true", help="100,000 distractors, 1,000 probes")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.distractors, args.probes = 100_000, 1000
    cases: dict[str, Search] = {"exact": run_exact}
    if has_faiss():
        cases |= {"ivf": run_ivf, "faiss flat": run_faiss_flat}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "crowd.npy"
        write_crowd(file, args.distractors, args.width)
        print(
            f"{args.distractors:,} distractors x {args.width} ({file.stat().st_size / 2**20:,.0f} MiB of float16),"
            f" {args.probes:,} probes, {RANKS_KEPT} best of each kept, {torch.get_num_threads()} threads"
        )
        print(f"{'search':12}{'s':>9}{'scores/s':>12}{'peak MiB':>10}{'before':>9}{'agree':>9}")
        outcomes, exact = [], np.empty(0)
        for name in cases:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                done = process.submit(measure, cases[name], file, args.probes, args.width)
                best, seconds, before, peak = done.result()
            exact = best if name == "exact" else exact
            agree = float(np.mean(np.abs(best[:, 0] - exact[:, 0]) < 1e-5))
            case = Case(name, seconds, args.probes * args.distractors / seconds, peak, before, agree)
            outcomes.append(case)
            print(
                f"{case.name:12}{case.seconds:9.1f}{case.scores_per_s:12.2e}{case.peak_mib:10,.0f}"
                f"{case.before_mib:9,.0f}{case.agree:9.4f}"
            )
    if args.json:
        args.json.write_text(json.dumps([asdict(case) for case in outcomes], indent=2) + "\n", encoding="utf-8")


def write_crowd(file: Path, num: int, width: int) -> None:
    """Write drawn embeddings, a block at a time."""
    crowd = np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=(num, width))
    rng = np.random.default_rng(0)
    for start in range(0, num, 50_000):
        crowd[start : start + 50_000] = draw(rng, min(50_000, num - start), width)
    crowd.flush()


def draw(rng: np.random.Generator, num: int, width: int) -> NDArray[np.float32]:
    """Return embeddings around the groups' centres, [num, width]."""
    centres = np.random.default_rng(1).standard_normal((GROUPS, width), dtype=np.float32)
    offsets = rng.standard_normal((num, width), dtype=np.float32)
    return centres[rng.integers(GROUPS, size=num)] + np.float32(SPREAD) * offsets


def measure(search: Search, file: Path, num_probes: int, width: int) -> tuple[NDArray[np.float32], float, float, float]:
    """Run one case in this process: what it found, seconds, and resident memory before and at its highest."""
    names = [str(row) for row in range(num_probes)]
    probes = unit_vectors(names, draw(np.random.default_rng(2), num_probes, width))
    crowd = open_crowd([file])
    before = peak_mib()
    start = time.perf_counter()
    best = search(probes, crowd)
    return best, time.perf_counter() - start, before, peak_mib()


def run_exact(probes: NDArray[np.float32], crowd: Crowd) -> NDArray[np.float32]:
    """Search as `facetrain lfw --distractors` does."""
    return search_crowd(probes, crowd, World()).best


def run_ivf(probes: NDArray[np.float32], crowd: Crowd) -> NDArray[np.float32]:
    """Search as `--search ivf` does, its measurement of recall included."""
    return search_crowd(probes, crowd, World(), search="ivf").best


def run_faiss_flat(probes: NDArray[np.float32], crowd: Crowd) -> NDArray[np.float32]:
    """Search with FAISS's exact index, block by block."""
    import faiss

    best = np.full((len(probes), RANKS_KEPT), -np.inf, dtype=np.float32)
    for block in crowd.blocks:
        index = faiss.IndexFlatIP(probes.shape[1])
        index.add(crowd.read(block).numpy())
        scores, _ = index.search(probes, RANKS_KEPT)
        best = -np.sort(-np.concatenate([best, scores], axis=1), axis=1)[:, :RANKS_KEPT]
    return best


def peak_mib() -> float:
    """Return this process's highest resident memory so far (getrusage would count that of its parent too)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
