"""Packing: faces as people keep them -> shards that training reads.

Worker processes make one shard each at a time. A finished shard leaves a record with its checksum in the folder
`.pack`, from which an interrupted packing goes on; what is written doesn't depend on workers or interruptions.
"""

import errno
import hashlib
import json
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import facetrain
from facetrain.data.align import check_detector, points_from_file
from facetrain.data.identity_lists import apply_lists, warn_of_lookalikes
from facetrain.data.image_header import MAX_PIXELS
from facetrain.data.index import ClassTable, load_array, save_array
from facetrain.data.manifest import FORMAT, Manifest, PackSettings, combined_sha256
from facetrain.data.pack_worker import RECORDS, Job, Record, Task, make_shard, relabel_shard, start_worker, tar_path
from facetrain.data.places import group_sizes
from facetrain.data.shards import IMAGES_FILE, INDEX_FILES, load_writer, sha256_of, sidecar_of
from facetrain.data.sources import FaceSource, open_faces
from facetrain.lock import hold_folder
from facetrain.whole_file import write_text

REJECTED_FILE = "rejected.jsonl"
"""One line per image or identity of the source that isn't in the shards, with the reason."""

_JOB_FILE = "job.json"


def pack(
    source: Sequence[Path],
    out: Path,
    *,
    image_px: int = 112,
    quality: int = 92,
    copy: bool = False,
    landmarks: Path | None = None,
    detector: Path | None = None,
    exclude: Path | None = None,
    merge: Path | None = None,
    min_images: int = 1,
    max_images: int | None = None,
    min_px: int = 16,
    max_pixels: int = MAX_PIXELS,
    images_per_shard: int = 10_000,
    seed: int = 0,
    workers: int | None = None,
) -> Manifest:
    """Pack faces into shards; run again after an interruption, it goes on, and repairs what was damaged.

    Upright JPEGs of image_px x image_px keep their bytes. Others are turned as their EXIF data say, cut to their centre
    square, resized and encoded anew. Images that can't be used are listed in rejected.jsonl.

    Args:
        source: Folders, tars and other files of faces; see `open_faces`.
        out: Folder of the shards: new, empty, or of an earlier packing of the same faces with the same settings.
        image_px: Side of the packed images, in pixels.
        quality: JPEG quality of images that are encoded anew, 1 to 100.
        copy: Encode nothing anew: images that aren't JPEGs of image_px x image_px are rejected.
        landmarks: List of five points per image, to align all images by; see `points_from_file`. Those that it
            doesn't have are rejected.
        detector: YuNet's file, to align all images by what it finds. Those without a face are rejected.
        exclude: List of identities to leave out; see `apply_lists`.
        merge: List of names that are one identity; see `apply_lists`.
        min_images: Identities with fewer usable images are left out.
        max_images: Usable images of an identity, by name, beyond this many are left out.
        min_px: Images whose shorter side has fewer pixels are rejected.
        max_pixels: Images that state more pixels are rejected without being decoded.
        images_per_shard: A shard is closed before the identity that would exceed it.
        seed: Seed of the identities' order, which has nothing to do with names or sources.
        workers: Processes; null takes one per usable core.

    Raises:
        FileNotFoundError: A file doesn't exist.
        OSError: The disk is full.
        ValueError: A setting is out of bounds, a source or list can't be read or has no usable image, `out` holds
            something else, or a worker was killed; one line that names it.
    """
    settings = PackSettings(
        image_px=image_px,
        quality=quality,
        copy=copy,
        alignment=_alignment(landmarks, detector),
        min_px=min_px,
        max_pixels=max_pixels,
        min_images=min_images,
        max_images=max_images,
        images_per_shard=images_per_shard,
        seed=seed,
    )
    if workers is not None and workers < 1:
        raise ValueError(f"pack: workers: expected 1 or more, got {workers}")
    points = points_from_file(landmarks) if landmarks else None
    with _full_disk_named(out):
        # Parquet's images are spooled to where there has to be room for the shards anyway.
        spool_dir = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
        faces, left_out = apply_lists(open_faces(source, spool_dir=spool_dir), exclude=exclude, merge=merge)
        warn_of_lookalikes(faces)
        fingerprint = faces.fingerprint()
        job = Job(faces, out, settings, points, detector)
        _check_folder(out)
        with hold_folder(out / RECORDS, name=str(out)):
            _claim(out, {"format": FORMAT, "source": fingerprint, **asdict(settings)})
            records = _run(job, _plan(faces, settings), workers or len(os.sched_getaffinity(0)))
            return _merge(job, records, fingerprint, left_out)


@contextmanager
def _full_disk_named(out: Path) -> Iterator[None]:
    """Say which disk it is that is full: the system's message doesn't."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        full = "its disk is full" if error.errno == errno.ENOSPC else "the disk quota is used up"
        raise OSError(f"{out}: {full}; `facetrain pack`, run again with more room, goes on") from None


def _alignment(landmarks: Path | None, detector: Path | None) -> str:
    """Return what the manifest says of alignment, after a look at the files."""
    if landmarks and detector:
        raise ValueError(f"pack: expected landmarks or a detector, got {landmarks} and {detector}")
    if detector:
        check_detector(detector)
    file = landmarks or detector
    return f"{'landmarks' if landmarks else 'detector'} {sha256_of(file)}" if file else ""


def _check_folder(out: Path) -> None:
    """Refuse a folder that something else is in, and otherwise make it."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: expected a folder for the shards, found a file")
    packed_here = (out / RECORDS / _JOB_FILE).is_file()
    if not packed_here and out.is_dir() and any(entry.name != RECORDS for entry in out.iterdir()):
        raise ValueError(f"{out}: expected a new or empty folder, or one that an earlier `facetrain pack` made")
    (out / RECORDS).mkdir(parents=True, exist_ok=True)


def _claim(out: Path, job: dict[str, Any]) -> None:
    """Make the folder ours, or find that it is a packing of the same faces with the same settings."""
    path = out / RECORDS / _JOB_FILE
    if path.is_file():
        found = json.loads(path.read_text())
        differing = [_difference(key, found.get(key), job[key]) for key in job if found.get(key) != job[key]]
        if differing:
            raise ValueError(f"{out}: holds another packing ({'; '.join(differing)}); give another folder or remove it")
        for part in chain(out.glob("*.tmp"), path.parent.glob("*.tmp")):  # of a run that was killed
            part.unlink(missing_ok=True)
        return
    write_text(path, json.dumps(job, indent=1) + "\n")


def _difference(key: str, found: object, expected: object) -> str:
    """Say how a packing differs; of checksums the first digits are enough."""
    shown = re.sub(r"\b([0-9a-f]{8})[0-9a-f]{56}\b", r"\1", f"{key} {found!r} instead of {expected!r}")
    return f"{shown}: other images or names, or another --exclude or --merge" if key == "source" else shown


def _plan(faces: FaceSource, settings: PackSettings) -> list[Task]:
    """Cut the identities, in an order that only the seed decides, into shards."""
    people, begin = [], 0
    for name, group in groupby(faces.identities):
        people.append((name, range(begin, begin + sum(1 for _ in group))))
        begin = people[-1][1].stop
    # By hash: unlike a generator's stream it is the same with any library version, and when people are added.
    people.sort(key=lambda person: hashlib.sha256(f"{settings.seed}\0{person[0]}".encode()).digest())
    tasks: list[Task] = []
    begin, num_images = 0, 0
    for end, (_, images) in enumerate(people):
        if end > begin and num_images + len(images) > settings.images_per_shard:
            tasks.append(Task(len(tasks), begin, tuple(people[begin:end])))
            begin, num_images = end, 0
        num_images += len(images)
    return [*tasks, Task(len(tasks), begin, tuple(people[begin:]))]


def _run(job: Job, tasks: Sequence[Task], workers: int) -> list[Record]:
    """Make all shards; returns their records in order, with labels that have no gaps."""
    load_writer()
    # Forked workers share the imports and the lists of names, instead of spending seconds on copies.
    with ProcessPoolExecutor(
        min(workers, len(tasks)), multiprocessing.get_context("fork"), start_worker, (job,)
    ) as pool:
        try:
            records = _in_parallel(pool, make_shard, [((task,), task.num_images) for task in tasks], "pack")
            records.sort(key=lambda record: record.number)
            # Where identities were dropped, the labels after them are too high: only now it is known by how much.
            first = np.cumsum([0, *(len(record.names) for record in records)]).tolist()
            moved = [(r, label) for r, label in zip(records, first, strict=False) if r.first_label != label]
            relabellings = [((record, label), sum(record.num_images)) for record, label in moved]
            for record in _in_parallel(pool, relabel_shard, relabellings, "relabel"):
                records[record.number] = record
        except BrokenProcessPool:
            raise ValueError(
                f"{job.out}: a worker was killed, perhaps for want of memory: try fewer --workers; called again,"
                " packing goes on"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return records


def _in_parallel(
    pool: ProcessPoolExecutor, make: Callable[..., Record], tasks: Sequence[tuple[tuple[Any, ...], int]], doing: str
) -> list[Record]:
    """Call `make` with the arguments of each task; the number beside them is that of its images."""
    num_images = {pool.submit(make, *arguments): count for arguments, count in tasks}
    records = []
    with tqdm(
        total=sum(num_images.values()), unit="image", desc=doing, disable=None if num_images else True
    ) as progress:
        for future in as_completed(num_images):
            records.append(future.result())
            progress.update(num_images[future])
    return records


def _merge(job: Job, records: Sequence[Record], fingerprint: str, left_out: Sequence[dict[str, str]]) -> Manifest:
    """Write what describes all shards together; the manifest comes last."""
    out = job.out
    skipped = [{"image": image.name, "reason": image.reason} for image in job.faces.skipped]
    lines = [*left_out, *skipped, *chain.from_iterable(record.rejected for record in records)]
    lines.sort(key=lambda line: (line.get("image") or line["identity"], "image" in line))
    write_text(out / REJECTED_FILE, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    records = [record for record in records if record.names]
    if not records:
        raise ValueError(f"{out / REJECTED_FILE}: every image of the source was rejected, it says why")
    tars = [tar_path(out, record.number) for record in records]
    counts = list(chain.from_iterable(record.num_images for record in records))
    names = tuple(chain.from_iterable(record.names for record in records))
    ClassTable(names=names, first_image=np.cumsum([0, *counts], dtype=np.int64)).save(out)
    # Copied, since each mapped file stays open: there may be more shards than files that a process may open.
    lengths = [load_array(sidecar_of(tar))[:, 1].copy() for tar in tars]
    save_array(out / IMAGES_FILE, group_sizes(np.concatenate(lengths)))
    manifest = Manifest(
        format=FORMAT,
        packer=f"facetrain {facetrain.__version__}",
        settings=job.settings,
        source_sha256=fingerprint,
        identities=len(names),
        images=sum(counts),
        single_image_identities=counts.count(1),
        rejected_images=sum("image" in line for line in lines),
        dropped_identities=sum("identity" in line for line in lines),
        shards=tuple(record.info(tar.name) for record, tar in zip(records, tars, strict=True)),
        index_sha256=combined_sha256(out / name for name in INDEX_FILES),
    )
    manifest.save(out)
    return manifest
