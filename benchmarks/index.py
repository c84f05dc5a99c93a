"""What the index of 41 million images of 2 million identities takes: time to open, memory, time to plan a batch.

    python benchmarks/index.py [--quick] [--json FILE] [--images 41000000] [--identities 2000000] [--workers 4]

The index is that of a packed set, in sizes that are drawn; the tars are holes as long as packed ones would be, with the
headers that opening looks at. Memory is what this process, which has read all of the index, and forked workers that
have located images all over it take together, less what this process took before, and less what as many idle workers
take (proportional set size: what is shared counts once).
"""

import argparse
import gc
import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from facetrain.data.index import BLOCK_BYTES, ClassTable, save_array
from facetrain.data.manifest import FORMAT, Manifest, PackSettings, ShardInfo, combined_sha256
from facetrain.data.places import ImagePlaces, group_sizes
from facetrain.data.plan import Plan
from facetrain.data.shards import IMAGES_FILE, INDEX_FILES, ShardSet, image_key
from facetrain.data.split import split_identities

PAIRS = 4096
STEPS = 30
IMAGES_PER_SHARD = 10_000
WISHES = {"open_s": 2.0, "memory_mb": 200.0, "plan_ms": 5.0}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=41_000_000)
    parser.add_argument("--identities", type=int, default=2_000_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="410,000 images of 20,000 identities")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    if args.quick:
        args.images, args.identities = 410_000, 20_000
    with tempfile.TemporaryDirectory() as scratch:
        maker = multiprocessing.get_context("fork").Process(
            target=make_set, args=(Path(scratch), args.images, args.identities)
        )
        maker.start()  # in a process of its own, whose memory is gone when it is done
        maker.join()
        figures = measure(Path(scratch), args.workers)
        on_disk = {name: (Path(scratch) / name).stat().st_size / 1e6 for name in INDEX_FILES}
    print(f"{args.images:,} images of {args.identities:,} identities; {args.workers} workers")
    for name, megabytes in on_disk.items():
        print(f"         {name}: {megabytes:,.1f} MB")
    for name, wish in WISHES.items():
        print(
            f"{'met    ' if figures[name] < wish else 'NOT MET'}  {name}: {figures[name]:,.2f}, wanted below {wish:g}"
        )
    print(f"         locate_ms: {figures['locate_ms']:,.2f} for the {2 * PAIRS:,} images of a batch")
    print(f"         planning_mb: {figures['planning_mb']:,.1f} more in the process that plans")
    if args.json:
        args.json.write_text(json.dumps(figures | {"on_disk_mb": on_disk}, indent=2) + "\n", encoding="utf-8")


def measure(folder: Path, num_workers: int) -> dict[str, float]:
    """Open the set, let workers locate images all over it, and plan batches."""
    before = proportional_mb(os.getpid())
    started_at = time.perf_counter()
    shards = ShardSet.open(folder)
    open_s = time.perf_counter() - started_at
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, shards.places.num_images, 2 * PAIRS) for _ in range(STEPS)]
    memory_mb = proportional_mb(os.getpid()) - before
    # What a forked process costs by itself is no matter of the index.
    memory_mb += memory_of_workers(shards.places, draws, num_workers) - memory_of_workers(
        shards.places, [], num_workers
    )
    train = split_identities(shards.table, holdout=0, exclude=(), seed=0).train
    plan = Plan(shards.table, train, global_pairs=PAIRS, seed=0)
    plan.step(0)
    plan_ms, locate_ms = [], []
    for step in range(1, STEPS + 1):
        at = time.perf_counter()
        images = plan.step(step).image_idx_N2.ravel()
        located_at = time.perf_counter()
        shards.places.locate_all(images)
        plan_ms.append(1000 * (located_at - at))
        locate_ms.append(1000 * (time.perf_counter() - located_at))
    return {
        "open_s": open_s,
        "memory_mb": memory_mb,
        "plan_ms": statistics.median(plan_ms),
        "locate_ms": statistics.median(locate_ms),
        "planning_mb": proportional_mb(os.getpid()) - before - memory_mb,
    }


def memory_of_workers(places: ImagePlaces, steps: list[NDArray[np.int64]], num_workers: int) -> float:
    """Return by how much workers that locate batches raise the proportional memory of all processes."""
    context = multiprocessing.get_context("fork")
    own = proportional_mb(os.getpid())
    pipes, workers = [], []
    for number in range(num_workers):
        parent, child = context.Pipe()
        workers.append(context.Process(target=locate_batches, args=(child, places, steps[number::num_workers])))
        workers[-1].start()
        pipes.append(parent)
    for pipe in pipes:
        pipe.recv()
    total = proportional_mb(os.getpid()) + sum(proportional_mb(worker.pid or 0) for worker in workers)
    for pipe, worker in zip(pipes, workers, strict=True):
        pipe.send(None)
        worker.join()
    return total - own


def locate_batches(pipe: Connection, places: ImagePlaces, steps: list[NDArray[np.int64]]) -> None:
    """Look batches up, say so, and wait to be measured."""
    gc.freeze()  # as the loader's workers do, against copies of what was imported
    for images in steps:
        places.locate_all(images)
    pipe.send(None)
    pipe.recv()


def proportional_mb(pid: int) -> float:
    """Return a process's memory, what it shares with others divided by their number."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("Pss:")]
    return int(line.split()[1]) * 1024 / 1e6


def make_set(folder: Path, num_images: int, num_identities: int) -> None:
    """Write manifest, class table, index and hollow tars."""
    rng = np.random.default_rng(0)
    # Two images each at least, the others where chance puts them.
    extra = np.bincount(rng.integers(0, num_identities, num_images - 2 * num_identities), minlength=num_identities)
    first_image = np.concatenate([[0], np.cumsum(extra + 2)])
    ClassTable(names=[f"m.{i:07x}" for i in range(num_identities)], first_image=first_image).save(folder)
    sizes = rng.integers(3000, 12_000, num_images, dtype=np.uint16)
    save_array(folder / IMAGES_FILE, group_sizes(sizes))
    # A shard ends with the identity that reaches its images.
    last = np.searchsorted(first_image, np.arange(IMAGES_PER_SHARD, num_images + IMAGES_PER_SHARD, IMAGES_PER_SHARD))
    bounds = np.unique(np.concatenate([[0], np.minimum(last, num_identities)])).tolist()
    images = [int(first_image[end] - first_image[begin]) for begin, end in itertools.pairwise(bounds)]
    places = ImagePlaces(group_sizes(sizes), images)
    shards = []
    for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
        name = f"shard-{number:06d}.tar"
        size_bytes = hollow_tar(folder / name, places, places.images_of(number), begin, first_image, end - 1)
        info = ShardInfo(
            name=name, size_bytes=size_bytes, sha256=f"{number:064x}", images=images[number], identities=end - begin
        )
        shards.append(info)
    Manifest(
        format=FORMAT,
        packer="benchmarks/index.py",
        settings=PackSettings(),
        source_sha256="",
        identities=num_identities,
        images=num_images,
        single_image_identities=0,
        rejected_images=0,
        dropped_identities=0,
        shards=tuple(shards),
        index_sha256=combined_sha256(folder / name for name in INDEX_FILES),
    ).save(folder)


def hollow_tar(
    path: Path, places: ImagePlaces, images: range, first: int, first_image: NDArray[np.int64], last: int
) -> int:
    """Write a tar that holds the headers of its first and last image alone; returns its length."""
    end = places.locate(images[-1])
    size_bytes = end.offset_bytes + -(-end.size_bytes // BLOCK_BYTES) * BLOCK_BYTES + 2 * BLOCK_BYTES
    with open(path, "wb") as file:
        file.truncate(size_bytes)
        for label, image in ((first, images[0]), (last, images[-1])):
            place = places.locate(image)
            header = bytearray(BLOCK_BYTES)
            name = f"{image_key(label, image - int(first_image[label]))}.jpg".encode()
            header[: len(name)] = name
            header[124:135] = b"%011o" % place.size_bytes
            file.seek(place.offset_bytes - BLOCK_BYTES)
            file.write(header)
    return size_bytes


if __name__ == "__main__":
    main()
