"""Packing: faces as people keep them -> shards that training reads.

Worker processes make one shard each at a time. A finished shard leaves a record with its checksum in the folder
`.pack`, from which an interrupted packing goes on; what is written doesn't depend on workers or interruptions.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

import facetrain
from facetrain.data.index import ClassTable, load_array, part_of, save_array
from facetrain.data.manifest import FORMAT, Manifest, PackSettings, ShardInfo, write_text
from facetrain.data.prepare import capture_complaints, prepare_image, take_complaint
from facetrain.data.shards import (
    IMAGES_FILE,
    image_key,
    index_shard,
    load_writer,
    read_shard,
    sha256_of,
    sidecar_of,
    write_shard,
)
from facetrain.data.sources import FaceSource, open_faces

REJECTED_FILE = "rejected.jsonl"
"""One line per image or identity of the source that isn't in the shards, with the reason."""

_RECORDS = ".pack"
_JOB_FILE = "job.json"


def pack(
    source: Sequence[Path],
    out: Path,
    *,
    image_px: int = 112,
    quality: int = 92,
    min_px: int = 16,
    images_per_shard: int = 10_000,
    seed: int = 0,
    workers: int | None = None,
) -> Manifest:
    """Pack faces into shards; run again after an interruption, it goes on, and repairs what was damaged.

    Images that already are JPEGs of image_px x image_px keep their bytes. Others are cut to their centre square,
    resized and encoded anew. Images that can't be used are listed in rejected.jsonl.

    Args:
        source: Folders of `IDENTITY/IMAGE`, or tars of that; see `open_faces`.
        out: Folder of the shards: new, empty, or of an earlier packing of the same faces with the same settings.
        image_px: Side of the packed images, in pixels.
        quality: JPEG quality of images that are encoded anew, 1 to 100.
        min_px: Images whose shorter side has fewer pixels are rejected.
        images_per_shard: A shard is closed before the identity that would exceed it.
        seed: Seed of the identities' order, which has nothing to do with names or sources.
        workers: Processes; null takes one per usable core.

    Raises:
        FileNotFoundError: A source doesn't exist.
        ValueError: A setting is out of bounds, a source can't be read or has no usable image, or `out` holds something
            else; one line that names it.
    """
    settings = PackSettings(
        image_px=image_px, quality=quality, min_px=min_px, images_per_shard=images_per_shard, seed=seed
    )
    if workers is not None and workers < 1:
        raise ValueError(f"pack: workers: expected 1 or more, got {workers}")
    faces = open_faces(source)
    fingerprint = faces.fingerprint()
    _claim(out, {"format": FORMAT, "source": fingerprint, **asdict(settings)})
    job = _Job(faces, out, settings)
    records = _run(job, _plan(faces, settings), workers or len(os.sched_getaffinity(0)))
    return _merge(out, job, records, fingerprint)


@dataclass(frozen=True)
class _Job:
    """What all tasks share."""

    faces: FaceSource
    out: Path
    settings: PackSettings


@dataclass(frozen=True)
class _Task:
    """One shard to make."""

    number: int
    first_label: int
    """Label of its first identity, if no identity of an earlier shard is dropped."""
    identities: tuple[tuple[str, range], ...]
    """Names, and image numbers in the source."""

    @property
    def num_images(self) -> int:
        return sum(len(images) for _, images in self.identities)


@dataclass(frozen=True)
class _Record:
    """One finished shard."""

    number: int
    first_label: int
    size_bytes: int
    """0 where no image was usable; there is no tar then."""
    sha256: str
    names: list[str] = field(default_factory=list)
    num_images: list[int] = field(default_factory=list)
    """Images of each identity."""
    rejected: list[dict[str, str]] = field(default_factory=list)
    """Lines of rejected.jsonl."""

    def info(self, tar: str) -> ShardInfo:
        """Return the manifest's entry."""
        return ShardInfo(
            name=tar,
            size_bytes=self.size_bytes,
            sha256=self.sha256,
            images=sum(self.num_images),
            identities=len(self.names),
        )


def _claim(out: Path, job: dict[str, Any]) -> None:
    """Make the folder ours, or find that it is a packing of the same faces with the same settings."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: expected a folder for the shards, found a file")
    path = out / _RECORDS / _JOB_FILE
    if path.is_file():
        found = json.loads(path.read_text())
        differing = [f"{key} {found.get(key)!r} instead of {job[key]!r}" for key in job if found.get(key) != job[key]]
        if differing:
            raise ValueError(f"{out}: holds another packing ({'; '.join(differing)}); give another folder or remove it")
        for part in chain(out.glob("*.tmp"), path.parent.glob("*.tmp")):  # of a run that was killed
            part.unlink(missing_ok=True)
        return
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out}: expected a new or empty folder, or one that an earlier `facetrain pack` made")
    path.parent.mkdir(parents=True)
    write_text(path, json.dumps(job, indent=1) + "\n")


def _plan(faces: FaceSource, settings: PackSettings) -> list[_Task]:
    """Cut the identities, in an order that only the seed decides, into shards."""
    people, begin = [], 0
    for name, group in groupby(faces.identities):
        people.append((name, range(begin, begin + sum(1 for _ in group))))
        begin = people[-1][1].stop
    # By hash: unlike a generator's stream it is the same with any library version, and when people are added.
    people.sort(key=lambda person: hashlib.sha256(f"{settings.seed}\0{person[0]}".encode()).digest())
    tasks: list[_Task] = []
    begin, num_images = 0, 0
    for end, (_, images) in enumerate(people):
        if end > begin and num_images + len(images) > settings.images_per_shard:
            tasks.append(_Task(len(tasks), begin, tuple(people[begin:end])))
            begin, num_images = end, 0
        num_images += len(images)
    return [*tasks, _Task(len(tasks), begin, tuple(people[begin:]))]


def _run(job: _Job, tasks: Sequence[_Task], workers: int) -> list[_Record]:
    """Make all shards; returns their records in order, with labels that have no gaps."""
    load_writer()
    # Forked workers share the imports and the lists of names, instead of spending seconds on copies.
    with ProcessPoolExecutor(
        min(workers, len(tasks)), multiprocessing.get_context("fork"), _start_worker, (job,)
    ) as pool:
        try:
            records = _in_parallel(pool, _make_shard, [(task,) for task in tasks], sum(t.num_images for t in tasks))
            records.sort(key=lambda record: record.number)
            # Where identities were dropped, the labels after them are too high: only now it is known by how much.
            first = np.cumsum([0, *(len(record.names) for record in records)]).tolist()
            moved = [(r, label) for r, label in zip(records, first, strict=False) if r.first_label != label]
            for record in _in_parallel(pool, _relabel_shard, moved, sum(sum(r.num_images) for r, _ in moved)):
                records[record.number] = record
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return records


def _in_parallel(
    pool: ProcessPoolExecutor, make: Callable[..., _Record], tasks: Sequence[tuple[Any, ...]], num_images: int
) -> list[_Record]:
    futures = [pool.submit(make, *task) for task in tasks]
    records = []
    with tqdm(total=num_images, unit="image", desc="pack", disable=None if tasks else True) as progress:
        for future in as_completed(futures):
            record = future.result()
            records.append(record)
            progress.update(sum(record.num_images) + sum("image" in line for line in record.rejected))
    return records


_job: _Job
"""The job of this worker process."""


def _start_worker(job: _Job) -> None:
    global _job
    _job = job
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker without a traceback of its own
    parent = multiprocessing.parent_process()
    assert parent is not None
    # A worker whose parent was killed would wait for tasks forever.
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    capture_complaints()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _make_shard(task: _Task) -> _Record:
    tar = _tar_of(_job.out, task.number)
    record = _finished(task.number, tar)
    if record is not None:
        return record
    record = _Record(task.number, task.first_label, 0, "")
    return _write(tar, record, _samples(task, record))


def _relabel_shard(record: _Record, first_label: int) -> _Record:
    """Write a shard again with other labels."""
    tar = _tar_of(_job.out, record.number)
    keys = (image_key(first_label + i, k) for i, count in enumerate(record.num_images) for k in range(count))
    record = replace(record, first_label=first_label)
    return _write(tar, record, zip(keys, read_shard(tar), strict=True) if record.names else iter(()))


def _write(tar: Path, record: _Record, samples: Iterator[tuple[str, bytes]]) -> _Record:
    """Write tar, sidecar index and record, each at once or not at all; the record comes last."""
    part = part_of(tar)
    write_shard(part, samples)
    if record.names:
        record = replace(record, size_bytes=part.stat().st_size, sha256=sha256_of(part))
        _, places = index_shard(part)
        part.replace(tar)
        save_array(sidecar_of(tar), places)
    else:
        part.unlink()
    write_text(_record_of(tar), json.dumps(asdict(record)))
    return record


def _finished(number: int, tar: Path) -> _Record | None:
    """Return the record of a shard that an earlier run finished and that is still whole."""
    try:
        record = _Record(**json.loads(_record_of(tar).read_text()))
        if record.names and sha256_of(tar) != record.sha256:
            return None
        if record.names:
            save_array(sidecar_of(tar), index_shard(tar)[1])
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return record


def _tar_of(out: Path, number: int) -> Path:
    return out / f"shard-{number:06d}.tar"


def _record_of(tar: Path) -> Path:
    return tar.parent / _RECORDS / f"{tar.stem}.json"


def _samples(task: _Task, record: _Record) -> Iterator[tuple[str, bytes]]:
    """Yield the usable images with their keys; fills the record on the way."""
    for name, images in task.identities:
        num_usable = 0
        for image in images:
            try:
                jpeg = prepare_image(_read(image), _job.settings)
                complaint = take_complaint()
                if complaint:
                    raise ValueError(f"damaged: {complaint}")
            except ValueError as reason:
                record.rejected.append({"image": _job.faces.names[image], "reason": str(reason)})
                take_complaint()  # of this image, not of the next
                continue
            yield image_key(task.first_label + len(record.names), num_usable), jpeg
            num_usable += 1
        if num_usable:
            record.names.append(name)
            record.num_images.append(num_usable)
        else:
            record.rejected.append({"identity": name, "reason": f"dropped: all {len(images)} images were rejected"})


def _read(image: int) -> bytes:
    try:
        return _job.faces.read(image)
    except PermissionError:
        raise ValueError("can't be read: permission denied") from None


def _merge(out: Path, job: _Job, records: Sequence[_Record], fingerprint: str) -> Manifest:
    """Write what describes all shards together; the manifest comes last."""
    skipped = [asdict(image) for image in job.faces.skipped]
    lines = [*skipped, *chain.from_iterable(record.rejected for record in records)]
    lines.sort(key=lambda line: (line.get("image") or line["identity"], "image" in line))
    write_text(out / REJECTED_FILE, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    records = [record for record in records if record.names]
    if not records:
        raise ValueError(f"{out / REJECTED_FILE}: every image of the source was rejected, it says why")
    tars = [_tar_of(out, record.number) for record in records]
    counts = list(chain.from_iterable(record.num_images for record in records))
    names = tuple(chain.from_iterable(record.names for record in records))
    ClassTable(names=names, first_image=np.cumsum([0, *counts], dtype=np.int64)).save(out)
    save_array(out / IMAGES_FILE, np.concatenate([load_array(sidecar_of(tar)) for tar in tars]))
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
    )
    manifest.save(out)
    return manifest
