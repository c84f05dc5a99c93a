"""Searching a gallery of people: queries/s and how often the best person is the right one, for each kind.

Embeddings are drawn around their people, as far as images of one person are apart on LFW with a strong network (mean
cosine 0.6). Recall is against the exact search. `--quick` takes seconds; `--json FILE` writes the table.

    OMP_NUM_THREADS=2 python benchmarks/gallery.py --images 100000 --width 512
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from facetrain.gallery import Gallery, Kind
from facetrain.search import has_faiss

TOP = 5


def main() -> None:
    """Print a row for each kind of gallery."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--per-person", type=int, default=4, help="images of a person")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=100, help="queries searched for together")
    parser.add_argument("--quick", action="store_true", help="5,000 images")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.images, args.queries = 5000, 200
    rng = np.random.default_rng(0)
    centres = _unit(rng.normal(size=(max(args.images // args.per_person, 1), args.width)))
    person = np.arange(args.images) // args.per_person % len(centres)
    items = _around(centres[person], rng)
    queries = _around(centres[rng.integers(0, len(centres), args.queries)], rng)
    names, people = [f"{i}" for i in range(args.images)], [f"{p:07d}" for p in person]

    rows, exact = [], None
    print(f"{args.images:,} images of {len(centres):,} people, width {args.width}, top {TOP}, batches of {args.batch}")
    print(f"{'kind':6}{'built in s':>12}{'queries/s':>12}{'same best person':>18}")
    kinds: tuple[Kind, ...] = ("flat", "hnsw", "ivf") if has_faiss() else ("flat",)
    for kind in kinds:
        began_at = time.perf_counter()
        gallery = Gallery(kind=kind).with_images(names, people, items, [b""] * len(names))
        built_s = time.perf_counter() - began_at
        gallery.search(queries[: args.batch], TOP)
        began_at = time.perf_counter()
        found = [gallery.search(queries[at : at + args.batch], TOP)[1] for at in range(0, len(queries), args.batch)]
        per_s = len(queries) / (time.perf_counter() - began_at)
        best = np.concatenate(found)[:, 0]
        exact = best if exact is None else exact
        rows.append({"kind": kind, "built_s": built_s, "queries_per_s": per_s, "recall": float(np.mean(best == exact))})
        print(f"{kind:6}{built_s:12.1f}{per_s:12,.0f}{rows[-1]['recall']:18.1%}")
    if args.json:
        args.json.write_text(json.dumps({**vars(args), "json": str(args.json), "rows": rows}, indent=1) + "\n")


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float32]:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def _around(centres: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Return unit vectors whose mean cosine is 0.6 where they share a centre."""
    noise = _unit(rng.normal(size=centres.shape))
    return _unit(np.sqrt(0.6) * centres.astype(np.float64) + np.sqrt(0.4) * noise)


if __name__ == "__main__":
    main()
