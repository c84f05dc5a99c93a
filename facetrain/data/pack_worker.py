"""A worker process of packing: makes one shard at a time, and leaves a record of each that it finished."""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2

from facetrain.data.align import FindPoints, YunetDetector
from facetrain.data.index import save_array
from facetrain.data.manifest import PackSettings, ShardInfo
from facetrain.data.prepare import capture_complaints, prepare_image, take_complaint
from facetrain.data.shards import image_key, index_shard, read_shard, sha256_of, sidecar_of, write_shard
from facetrain.data.sources import FaceSource
from facetrain.whole_file import part_of, put_in_place, write_text

RECORDS = ".pack"
"""Folder, beside the shards, of what an interrupted packing needs to go on."""


@dataclass(frozen=True)
class Job:
    """What all tasks share."""

    faces: FaceSource
    """The source."""
    out: Path
    """Folder of the shards."""
    settings: PackSettings
    """How they are packed."""
    landmarks: FindPoints | None = None
    """Finds the points that a list has, to align by."""
    detector: Path | None = None
    """YuNet's file, to align by."""


@dataclass(frozen=True)
class Task:
    """One shard to make."""

    number: int
    """Place among the shards."""
    first_label: int
    """Label of its first identity, if no identity of an earlier shard is dropped."""
    identities: tuple[tuple[str, range], ...]
    """Names, and image numbers in the source."""

    @property
    def num_images(self) -> int:
        """Images of the source in it."""
        return sum(len(images) for _, images in self.identities)


@dataclass(frozen=True)
class Record:
    """One finished shard."""

    number: int
    """Place among the shards."""
    first_label: int
    """Label of its first identity."""
    size_bytes: int
    """Size of the tar; 0 where no image was usable, there is no tar then."""
    sha256: str
    """Checksum of the tar."""
    names: list[str] = field(default_factory=list)
    """Its identities."""
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


_job: Job
"""The job of this worker process."""
_find: FindPoints | None
"""What it aligns photographs by."""


def start_worker(job: Job) -> None:
    """Prepare a worker process."""
    global _job, _find
    _job = job
    cv2.setNumThreads(0)
    # A network is opened by each worker: it doesn't outlive a fork.
    _find = YunetDetector(job.detector) if job.detector else job.landmarks
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker without a traceback of its own
    parent = multiprocessing.parent_process()
    assert parent is not None
    # A worker whose parent was killed would wait for tasks forever.
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    capture_complaints()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def make_shard(task: Task) -> Record:
    """Make one shard, or keep what an earlier run finished."""
    tar = tar_path(_job.out, task.number)
    record = _finished(task.number, tar)
    if record is not None:
        return record
    record = Record(task.number, task.first_label, 0, "")
    return _write(tar, record, _samples(task, record))


def relabel_shard(record: Record, first_label: int) -> Record:
    """Write a shard again with other labels."""
    tar = tar_path(_job.out, record.number)
    keys = (image_key(first_label + i, k) for i, count in enumerate(record.num_images) for k in range(count))
    record = replace(record, first_label=first_label)
    return _write(tar, record, zip(keys, read_shard(tar), strict=True) if record.names else iter(()))


def _write(tar: Path, record: Record, samples: Iterator[tuple[str, bytes]]) -> Record:
    """Write tar, sidecar index and record, each at once or not at all; the record comes last."""
    part = part_of(tar)
    try:
        write_shard(part, samples)
    except BaseException:
        part.unlink(missing_ok=True)  # of a full disk, it would take the last room
        raise
    if record.names:
        record = replace(record, size_bytes=part.stat().st_size, sha256=sha256_of(part))
        _, places = index_shard(part)
        put_in_place(part, tar)
        save_array(sidecar_of(tar), places)
    else:
        part.unlink()
    write_text(_record_path(tar), json.dumps(asdict(record)))
    return record


def _finished(number: int, tar: Path) -> Record | None:
    """Return the record of a shard that an earlier run finished and that is still whole."""
    try:
        record = Record(**json.loads(_record_path(tar).read_text()))
        if record.names and sha256_of(tar) != record.sha256:
            return None
        if record.names:
            save_array(sidecar_of(tar), index_shard(tar)[1])
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return record


def tar_path(out: Path, number: int) -> Path:
    """Return the path of shard number `number`."""
    return out / f"shard-{number:06d}.tar"


def _record_path(tar: Path) -> Path:
    return tar.parent / RECORDS / f"{tar.stem}.json"


def _samples(task: Task, record: Record) -> Iterator[tuple[str, bytes]]:
    """Yield the usable images with their keys; fills the record on the way."""
    fewest = _job.settings.min_images
    for name, images in task.identities:
        jpegs = _usable(images, record) if len(images) >= fewest else []
        if len(jpegs) < fewest:
            record.rejected.append({"identity": name, "reason": _too_few(len(jpegs), len(images))})
            continue
        for k, jpeg in enumerate(jpegs):
            yield image_key(task.first_label + len(record.names), k), jpeg
        record.names.append(name)
        record.num_images.append(len(jpegs))


def _usable(images: range, record: Record) -> list[bytes]:
    """Return the JPEGs of one identity, and list in the record the images that it does without."""
    most = _job.settings.max_images
    jpegs = list[bytes]()
    for image in images:
        jpeg, reason = (b"", f"left out: beyond max_images, {most}") if len(jpegs) == most else _prepared(image)
        if reason:
            record.rejected.append({"image": _job.faces.names[image], "reason": reason})
        else:
            jpegs.append(jpeg)
    return jpegs


def _too_few(num_usable: int, num_images: int) -> str:
    fewest = _job.settings.min_images
    if num_images < fewest:
        return f"dropped: {num_images} images, fewer than min_images, {fewest}"
    if num_usable == 0:
        return f"dropped: all {num_images} images were rejected"
    return f"dropped: {num_usable} of {num_images} images are usable, fewer than min_images, {fewest}"


def _prepared(image: int) -> tuple[bytes, str]:
    """Return an image's JPEG, or no bytes and the reason why it is rejected."""
    try:
        data = _job.faces.read(image)
    except PermissionError:
        return b"", "can't be read: permission denied"
    try:
        jpeg, reason = prepare_image(data, _job.settings, _find, _job.faces.names[image]), ""
    except ValueError as error:
        jpeg, reason = b"", str(error)
    complaint = take_complaint()
    if complaint and not reason:
        return b"", f"damaged: {complaint}"
    return jpeg, reason
