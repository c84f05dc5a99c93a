"""Images per second of the loader beside plain webdataset, a torchvision ImageFolder and decoding alone.

    python benchmarks/loader.py [--shards FOLDER] [--quick] [--json FILE] [--images 16384] [--turns 5]

FOLDER was made by `facetrain pack`; without it a set is drawn. All take turns in one run, and medians are shown.

    decoding alone       cv2.imdecode of the same images, bytes in memory, one process: the bound of a core
    facetrain            PairLoader with mirroring; `crop` moves the crop as well, `colour` changes colours on top of it
    webdataset           the same shards in sequence, shuffled in a buffer of 1,000, decode("rgb8"), no augmentation
    ImageFolder          the same images as files in a folder of each identity, shuffled, PILToTensor, no augmentation

`of the bound` is images/s over workers times the bound: on a machine with more cores than workers that is per core.
Times run from the first batch to the last, but over http from opening to the last batch, so that downloading counts:
facetrain fetches all shards into a new cache, checks them and then draws at random; webdataset reads its stream once.
`dropped` drops the files from the page cache before each turn.
"""

import argparse
import contextlib
import functools
import http.server
import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import webdataset
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import PILToTensor

from facetrain.config import DataConfig
from facetrain.data.loader import PairLoader
from facetrain.data.pack import pack
from facetrain.data.plan import Plan
from facetrain.data.shards import ShardSet, open_shards
from facetrain.data.split import split_identities
from facetrain.data.synthetic import synthesize

PAIRS = 64
BATCH_IMAGES = 2 * PAIRS
AUGMENTED = {
    "facetrain": {},
    "facetrain, crop": {"crop_jitter_px": 4},
    "facetrain, colour": {"crop_jitter_px": 4, "colour_jitter": 0.1},
}
WISH = 0.85


@dataclass(frozen=True)
class Job:
    """What is read, and how much of it."""

    shards: ShardSet
    folder: Path
    """The same images as files."""
    url: str
    scratch: Path
    num_images: int

    @property
    def config(self) -> DataConfig:
        """How images are decoded: as they are in the shards."""
        side = self.shards.manifest.image_px
        return DataConfig(shard_px=side, image_px=side)


@dataclass
class Case:
    """One loader, one place of the images, so many workers."""

    loader: str
    source: str
    """memory, warm, dropped or http."""
    workers: int
    run: Callable[[Job], float]
    """Images per second."""
    images_per_s: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Images per second over the turns."""
        return statistics.median(self.images_per_s)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=Path, help="folder made by facetrain pack; a set is drawn without it")
    parser.add_argument("--images", type=int, default=16_384, help="images of a turn, the whole set at most")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="2,048 images, 3 turns")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    if args.quick:
        args.images, args.turns = 2048, 3
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        shards = ShardSet.open(args.shards or drawn(Path(scratch), args.images))
        url = stack.enter_context(served(shards.folder))
        num_images = min(args.images, shards.manifest.images) // BATCH_IMAGES * BATCH_IMAGES
        job = Job(shards, as_files(shards, Path(scratch) / "files"), url, Path(scratch), num_images)
        cases = all_cases(args.workers)
        for _ in range(args.turns):
            for case in cases:
                if case.source == "dropped":
                    drop_cache(job)
                case.images_per_s.append(case.run(job))
        print(
            f"{shards.manifest.images:,} images of {shards.manifest.image_px} px,"
            f" {shards.manifest.size_bytes / shards.manifest.images / 1024:.1f} KiB each in the shards;"
            f" {num_images:,} a turn, {args.turns} turns, {len(os.sched_getaffinity(0))} cores"
        )
    print_table(cases)
    if args.json:
        rows = [
            {key: value for key, value in asdict(replace(case, run=None)).items() if key != "run"} for case in cases
        ]
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def all_cases(workers: list[int]) -> list[Case]:
    """Return what is measured."""
    cases = [Case("decoding alone", "memory", 1, decode_alone)]
    for num in workers:
        for source in ("warm", "dropped", "http"):
            for name, changes in AUGMENTED.items():
                if source == "warm" or not changes:
                    cases.append(Case(name, source, num, functools.partial(run_facetrain, num, source, changes)))
            cases.append(Case("webdataset", source, num, functools.partial(run_webdataset, num, source)))
            if source != "http":
                cases.append(Case("ImageFolder", source, num, functools.partial(run_image_folder, num)))
    return cases


def decode_alone(job: Job) -> float:
    """Decode images that are in memory, in random order, one after another."""
    images = np.random.default_rng(0).permutation(job.shards.manifest.images)[: job.num_images]
    buffers = [np.frombuffer(data, np.uint8) for data in job.shards.read_all(images)]
    started_at = time.perf_counter()
    for buffer in buffers:
        cv2.imdecode(buffer, cv2.IMREAD_COLOR_RGB)
    return len(buffers) / (time.perf_counter() - started_at)


def run_facetrain(workers: int, source: str, changes: dict[str, Any], job: Job) -> float:
    """Draw pairs as training does."""
    config = replace(job.config, workers=workers, **changes)
    started_at = time.perf_counter()
    shards = job.shards
    with contextlib.ExitStack() as stack:
        if source == "http":
            cache = stack.enter_context(tempfile.TemporaryDirectory(dir=job.scratch))
            config = replace(config, shards=job.url, cache_dir=cache)
            shards = open_shards(config)
        train = split_identities(shards.table, holdout=0, exclude=(), seed=0).train
        plan = Plan(shards.table, train, global_pairs=PAIRS, seed=0)
        steps = job.num_images // BATCH_IMAGES
        loader = PairLoader(plan, shards, config, rank=0, world_size=1, first_step=0, last_step=steps)
        with loader:
            return rate_of((BATCH_IMAGES for _ in loader), job, started_at if source == "http" else None)


def run_webdataset(workers: int, source: str, job: Job) -> float:
    """Read the shards in sequence, as webdataset's documentation does."""
    place = job.url if source == "http" else str(job.shards.folder)
    urls = [f"{place}/{shard.name}" for shard in job.shards.manifest.shards]
    # Workers share shards out between them, and there are few here: each reads all, in an order of its own.
    stream = webdataset.WebDataset(urls, shardshuffle=len(urls), workersplitter=None, empty_check=False)
    stream = stream.shuffle(1000).decode("rgb8").to_tuple("jpg", "__key__").batched(BATCH_IMAGES)
    started_at = time.perf_counter()
    batches = DataLoader(stream, batch_size=None, num_workers=workers, prefetch_factor=4)
    return rate_of((len(images) for images, _ in batches), job, started_at if source == "http" else None)


def run_image_folder(workers: int, job: Job) -> float:
    """Read single files at random."""
    images = ImageFolder(str(job.folder), transform=PILToTensor())
    chosen = Subset(images, np.random.default_rng(0).permutation(len(images))[: job.num_images].tolist())
    batches = DataLoader(chosen, batch_size=BATCH_IMAGES, num_workers=workers, prefetch_factor=4)
    return rate_of((len(labels) for _, labels in batches), job, None)


def rate_of(batches: Iterator[int], job: Job, started_at: float | None) -> float:
    """Return images per second of the job's images, from the first batch on or from `started_at`."""
    seen = 0
    if started_at is None:
        first = next(batches)
        seen, started_at = -first, time.perf_counter()
        batches = itertools.chain([first], batches)
    num_read = 0
    for num in batches:
        num_read += num
        if num_read >= job.num_images:
            break
    return (seen + num_read) / (time.perf_counter() - started_at)


def drawn(folder: Path, num_images: int) -> Path:
    """Draw and pack a set."""
    synthesize(folder / "faces", num_identities=max(64, num_images // 16), images_per_identity=16, heldout_identities=0)
    pack([folder / "faces" / "train"], folder / "shards")
    return folder / "shards"


def as_files(shards: ShardSet, folder: Path) -> Path:
    """Write every image of the shards as a file."""
    for label in range(shards.table.num_identities):
        (folder / f"{label:07d}").mkdir(parents=True)
        for image in range(*shards.table.first_image[label : label + 2].tolist()):
            (folder / f"{label:07d}" / f"{image}.jpg").write_bytes(shards.read(image))
    return folder


def drop_cache(job: Job) -> None:
    """Drop the files from the page cache."""
    for path in (*job.shards.folder.glob("*.tar"), *job.folder.rglob("*.jpg")):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on loopback from another process."""
    context = multiprocessing.get_context("fork")
    parent, child = context.Pipe()
    server = context.Process(target=serve, args=(str(folder), child), daemon=True)
    server.start()
    yield f"http://127.0.0.1:{parent.recv()}"
    server.terminate()
    server.join()


def serve(folder: str, pipe: Any) -> None:
    """Serve until the process is ended."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *args: object) -> None:
            """A client that has enough hangs up, which is no error."""

    server = Server(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    pipe.send(server.server_address[1])
    server.serve_forever()


def print_table(cases: list[Case]) -> None:
    """Print medians, their spread and their share of the bound."""
    bound = cases[0].median
    print(f"{'loader':20}{'images':>9}{'workers':>9}{'images/s':>11}{'lowest':>10}{'highest':>10}{'of the bound':>14}")
    for case in cases:
        print(
            f"{case.loader:20}{case.source:>9}{case.workers:>9}{case.median:11,.0f}{min(case.images_per_s):10,.0f}"
            f"{max(case.images_per_s):10,.0f}{case.median / bound / case.workers:14.2f}"
        )
    for case in cases:
        if case.loader.startswith("facetrain") and (case.source, case.workers) == ("warm", 1):
            share = case.median / bound
            print(
                f"{'met    ' if share >= WISH else 'NOT MET'}  {case.loader}: {share:.2f} of the bound, wanted {WISH}"
            )


if __name__ == "__main__":
    main()
