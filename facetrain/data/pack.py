"""Packing: faces as people keep them -> shards that training reads.

Worker processes make one shard each at a time. A finished shard leaves a record with its checksum in the folder
`.pack`, from which an interrupted packing goes on; what is written doesn't depend on workers or interruptions.
"""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import facetrain
from facetrain.data.index import ClassTable, load_array, save_array
from facetrain.data.manifest import FORMAT, Manifest, PackSettings, combined_sha256, write_text
from facetrain.data.pack_worker import RECORDS, Job, Record, Task, make_shard, relabel_shard, start_worker, tar_path
from facetrain.data.shards import IMAGES_FILE, INDEX_FILES, load_writer, sidecar_of
from facetrain.data.sources import FaceSource, open_faces

REJECTED_FILE = "rejected.jsonl"
"""One line per image or identity of the source that isn't in the shards, with the reason."""

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
    job = Job(faces, out, settings)
    records = _run(job, _plan(faces, settings), workers or len(os.sched_getaffinity(0)))
    return _merge(out, job, records, fingerprint)


def _claim(out: Path, job: dict[str, Any]) -> None:
    """Make the folder ours, or find that it is a packing of the same faces with the same settings."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: expected a folder for the shards, found a file")
    path = out / RECORDS / _JOB_FILE
    if path.is_file():
        found = json.loads(path.read_text())
        differing = [f"{key} {found.get(key)!r} instead of {job[key]!r}" for key in job if found.get(key) != job[key]]
        if differing:
            raise ValueError(f"{out}: holds another packing ({'; '.join(differing)}); give another folder or remove it")
        for part in chain(out.glob("*.tmp"), path.parent.glob("*.tmp")):  # of a run that was killed
            part.unlink(missing_ok=True)
        return
    if out.is_dir() and any(entry.name != RECORDS for entry in out.iterdir()):
        raise ValueError(f"{out}: expected a new or empty folder, or one that an earlier `facetrain pack` made")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(job, indent=1) + "\n")


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
            num_images = sum(task.num_images for task in tasks)
            records = _in_parallel(pool, make_shard, [(task,) for task in tasks], num_images, "pack")
            records.sort(key=lambda record: record.number)
            # Where identities were dropped, the labels after them are too high: only now it is known by how much.
            first = np.cumsum([0, *(len(record.names) for record in records)]).tolist()
            moved = [(r, label) for r, label in zip(records, first, strict=False) if r.first_label != label]
            num_images = sum(sum(record.num_images) for record, _ in moved)
            for record in _in_parallel(pool, relabel_shard, moved, num_images, "relabel"):
                records[record.number] = record
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return records


def _in_parallel(
    pool: ProcessPoolExecutor,
    make: Callable[..., Record],
    tasks: Sequence[tuple[Any, ...]],
    num_images: int,
    doing: str,
) -> list[Record]:
    futures = [pool.submit(make, *task) for task in tasks]
    records = []
    with tqdm(total=num_images, unit="image", desc=doing, disable=None if tasks else True) as progress:
        for future in as_completed(futures):
            record = future.result()
            records.append(record)
            progress.update(sum(record.num_images) + sum("image" in line for line in record.rejected))
    return records


def _merge(out: Path, job: Job, records: Sequence[Record], fingerprint: str) -> Manifest:
    """Write what describes all shards together; the manifest comes last."""
    skipped = [{"image": image.name, "reason": image.reason} for image in job.faces.skipped]
    lines = [*skipped, *chain.from_iterable(record.rejected for record in records)]
    lines.sort(key=lambda line: (line.get("image") or line["identity"], "image" in line))
    write_text(out / REJECTED_FILE, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    records = [record for record in records if record.names]
    if not records:
        raise ValueError(f"{out / REJECTED_FILE}: every image of the source was rejected, it says why")
    tars = [tar_path(out, record.number) for record in records]
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
        index_sha256=combined_sha256(out / name for name in INDEX_FILES),
    )
    manifest.save(out)
    return manifest
