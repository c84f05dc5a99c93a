"""Faces as a list: a CSV of path and label."""

import csv
import errno
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from facetrain.data.sources.faces import LABEL_KEYS, Face, Found, SkippedImage, flat_names, label_fault, printable
from facetrain.data.sources.folders import ImageFiles

PATH_KEYS = ("path", "file", "filename", "image")
"""What a header can call the column of paths."""
_SHOWN = 200
"""Letters of a path that a message shows."""


def open_csv(path: Path) -> Found:
    """Find the images that a CSV lists.

    A header names the columns, such as path and label, in any order and among others; without a header there are
    two, path and label. Paths are absolute or relative to the CSV's folder. An image is called `LABEL/PATH`, the
    path's slashes written as underscores; see `flat_names`.

    Raises:
        ValueError: The CSV can't be read, or no image of it exists; the message names it, and the line.
    """
    faces, skipped, files = list[Face](), list[SkippedImage](), list[str]()
    for file, label in _rows(path):
        size = _size_bytes(path.parent / file)
        fault = label_fault(label) or (None if size is not None else "no such file")
        if fault or size is None or printable(file) != file:
            skipped.append(SkippedImage(printable(file), fault or "bad name: control characters"))
            continue
        faces.append(Face(label, file, len(files), size))
        files.append(file)
    if not faces:
        found = f", found '{skipped[0].name[:_SHOWN]}': {skipped[0].reason}" if skipped else ""
        raise ValueError(f"{path}: no images in it: expected lines of path,label{found}")
    names = flat_names([(face.identity, face.name) for face in faces])
    faces = [face._replace(name=name) for face, name in zip(faces, names, strict=True)]
    return Found(faces, skipped, ImageFiles(path.parent, tuple(files)))


def _size_bytes(file: Path) -> int | None:
    """Return the length of a file; None where there is none, and where its name can't be one."""
    try:
        return file.stat().st_size if file.is_file() else None
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # a column of pixels, for one
            raise
        return None


def _rows(path: Path) -> Iterator[tuple[str, str]]:
    """Yield path and label of each line."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, strict=True)
            columns = None
            for words in filter(None, lines):
                if columns is None:
                    columns = _columns(words)
                    if columns is not None:
                        continue
                    columns = (0, 1) if len(words) == 2 else (len(words), 0)
                if len(words) <= max(columns):
                    raise ValueError(f"{path}:{lines.line_num}: expected path,label, got {','.join(words)!r}")
                yield str(PurePosixPath(words[columns[0]].strip())), words[columns[1]].strip()
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: expected a CSV in UTF-8: {error}") from None


def _columns(words: Sequence[str]) -> tuple[int, int] | None:
    """Return where a header has path and label; None where the words are no header."""
    names = [word.strip().lower() for word in words]
    path = next((names.index(key) for key in PATH_KEYS if key in names), None)
    label = next((names.index(key) for key in LABEL_KEYS if key in names), None)
    return None if path is None or label is None else (path, label)
