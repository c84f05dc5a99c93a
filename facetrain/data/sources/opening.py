"""Opening faces: what kind of source a path is, and several paths as one set."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from facetrain.data.index import FileSlices
from facetrain.data.sources.csv_list import open_csv
from facetrain.data.sources.faces import Face, FaceSource, Found
from facetrain.data.sources.folders import open_folder
from facetrain.data.sources.parquet import open_parquet
from facetrain.data.sources.recordio import open_records, records_of
from facetrain.data.sources.tars import open_tar


class _Row(NamedTuple):
    """A face and the number of its path; sorts as a face does."""

    face: Face
    path: int


def open_faces(paths: Sequence[Path], *, spool_dir: Path | None = None) -> FaceSource:
    """Open faces of one or several paths as one set; the kind of each is seen from the path.

    A folder, or an uncompressed tar, of `IDENTITY/IMAGE`; a WebDataset tar with the class in `.cls` or `.json`;
    InsightFace's RecordIO (`.rec`, or a folder that holds train.rec); `.parquet` with image bytes and a label column;
    `.csv` of path and label. One identity may have images in several paths, as it has where a set was cut into parts.

    Args:
        paths: Folders and files.
        spool_dir: Where Parquet's images lie, out of sight, while the set is open; null takes the system's folder for
            temporary files.

    Raises:
        FileNotFoundError: A path doesn't exist.
        ValueError: A path holds no image with an identity, is damaged, names a file outside of itself, or an image
            occurs twice; the message names it.
    """
    if not paths:
        raise ValueError("no faces given: expected a folder of IDENTITY/IMAGE, tars, .rec, .parquet or .csv")
    _refuse_two_records(paths)
    tars = FileSlices(paths)
    found = [_open(path, tars, number, spool_dir) for number, path in enumerate(paths)]
    _refuse_records_that_share(found, paths)
    rows = sorted(_Row(face, number) for number, part in enumerate(found) for face in part.faces)
    _refuse_duplicates(rows, paths)
    return FaceSource(
        names=tuple(row.face.name for row in rows),
        identities=tuple(row.face.identity for row in rows),
        sizes_bytes=np.array([row.face.size_bytes for row in rows], dtype=np.int64),
        skipped=tuple(sorted((image for part in found for image in part.skipped), key=lambda image: image.name)),
        _readers=tuple(part.reader for part in found),
        _reader_of=np.array([row.path for row in rows], dtype=np.int32),
        _places=np.array([row.face.place for row in rows], dtype=np.int64),
    )


def _open(path: Path, tars: FileSlices, number: int, spool_dir: Path | None) -> Found:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such folder, tar, .rec, .parquet or .csv")
    records = records_of(path)
    if records is not None:
        return open_records(records)
    if path.is_dir():
        return open_folder(path)
    match path.suffix.lower():
        case ".parquet":
            return open_parquet(path, spool_dir)
        case ".csv":
            return open_csv(path)
        case _:
            return open_tar(path, tars, number)


def _refuse_two_records(paths: Sequence[Path]) -> None:
    records = [str(path) for path in paths if records_of(path) is not None]
    if len(records) > 1:
        # Two people would silently become one.
        raise ValueError(f"{' and '.join(records)}: labels of both count from 0; expected one RecordIO set")


def _refuse_records_that_share(found: Sequence[Found], paths: Sequence[Path]) -> None:
    """Refuse a RecordIO set beside a path with an identity of the same name: its labels mean somebody there alone."""
    for records, path in zip(found, paths, strict=True):
        if records_of(path) is None or len(paths) == 1:
            continue
        labels = {face.identity for face in records.faces}
        for other, other_path in zip(found, paths, strict=True):
            shared = next((face.identity for face in other.faces if face.identity in labels), None)
            if other is not records and shared is not None:
                raise ValueError(
                    f"{path} and {other_path}: both have an identity {shared}, a RecordIO set counts its own from 0;"
                    " expected names that aren't numbers beside it"
                )


def _refuse_duplicates(rows: Sequence[_Row], paths: Sequence[Path]) -> None:
    counts = Counter(row.face.name for row in rows)
    if len(counts) == len(rows):
        return
    name = next(name for name, count in counts.items() if count > 1)
    places = [str(paths[row.path]) for row in rows if row.face.name == name]
    raise ValueError(f"{name}: occurs {len(places)} times, in {' and '.join(dict.fromkeys(places))}")
