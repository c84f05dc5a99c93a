"""InsightFace's RecordIO (`train.rec`, `train.idx`, `property`), the form in which CASIA-WebFace is passed around.

A .rec is a row of records: a magic number, a word of kind and length, the content, and padding to four bytes. Content
that holds the magic number at a multiple of four is cut there into several such pieces, and the number left out. An
image's content is a header (how many labels follow it; one label; two ids), the labels, and the image file. A record
without a file is one of InsightFace's own tables: a range of an identity's keys, or at key 0 the bounds of all.
A .idx has key and offset of each record, a line each.

Source: dmlc-core's recordio.h, MXNet's recordio.py, InsightFace's FaceDataset.
"""

import logging
import mmap
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from facetrain.data.index import FileSlices
from facetrain.data.sources.faces import Face, Found, SkippedImage

ReadAt = Callable[[int, int], bytes]
"""Offset and length in bytes -> that part of a file; a ValueError where the file ends before."""

_MAGIC = struct.pack("<I", 0xCED7230A)
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)
_LENGTH_BITS = 29
_PREFIX = struct.Struct("<4sI")
_HEADER = struct.Struct("<IfQQ")
_LABEL_BYTES = 4
_WHOLE_IN_FLOAT32 = 1 << 24
"""Labels are float32, which has every whole number up to this one."""


class _Piece(NamedTuple):
    """Where a record's content lies, or a part of it, in bytes."""

    offset: int
    size: int


class _Record(NamedTuple):
    """What the index needs of a record."""

    offset: int
    key: int
    labels: tuple[float, ...]
    image_bytes: int

    @property
    def is_table(self) -> bool:
        """Whether it is one of InsightFace's own, which have two bounds and no image."""
        return not self.image_bytes and len(self.labels) == 2


@dataclass(frozen=True)
class RecordFile:
    """Images in a .rec; the place of one is the offset of its record in bytes."""

    records: FileSlices
    """The .rec, alone."""

    def read(self, place: int, size_bytes: int) -> bytes:
        """Return an image.

        Raises:
            ValueError: The record isn't the one that was indexed; the message names it.
        """
        pieces, _ = _pieces(self._read_at, place)
        content = _joined(self._read_at, pieces)
        if len(content) < max(size_bytes, _HEADER.size):
            raise ValueError(f"{self.where(place)}: changed while it was in use")
        return content[len(content) - size_bytes :]

    def where(self, place: int, name: str = "") -> str:
        """Return the file and the record's offset."""
        return f"{self.records.paths[0]}: record at byte {place}"

    def _read_at(self, offset: int, size_bytes: int) -> bytes:
        return self.records.read(0, offset, size_bytes)


def records_of(path: Path) -> Path | None:
    """Return the .rec that a path means: itself, or the train.rec in a folder; None where it means none."""
    if path.is_dir():
        path = path / "train.rec"
        return path if path.is_file() else None
    return path if path.suffix.lower() == ".rec" else None


def open_records(path: Path) -> Found:
    """Find the images of a .rec; with a .idx beside it, those that it lists, else all.

    An identity is called by its label, an image by label and key: `12/00000345`.

    Args:
        path: The .rec; `property` beside it, where there is one, is compared with what was found.

    Raises:
        ValueError: A file is damaged; the message names it, and the byte or line.
    """
    records = list(_walk(path))
    keys = _keys(path, records)
    faces, skipped = [], []
    for record in records:
        key = keys.get(record.offset)
        if key is None:
            continue
        if record.is_table:
            if key == 0:
                _check_count(path, record, keys, records)
            continue
        identity, fault = _identity(record.labels[0])
        if fault:
            skipped.append(SkippedImage(f"{key:08d}", fault))
        else:
            faces.append(Face(identity, f"{identity}/{key:08d}", record.offset, record.image_bytes))
    if not faces:
        raise ValueError(f"{path}: no images in it: expected records of InsightFace's layout")
    _compare_with_property(path, len({face.identity for face in faces}))
    return Found(faces, skipped, RecordFile(FileSlices([path])))


def _walk(path: Path) -> Iterator[_Record]:
    """Yield all records, reading their headers alone."""
    try:
        # Mapped, because a read call per header would take as long as all the rest.
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:

            def read_at(offset: int, size_bytes: int) -> bytes:
                if offset + size_bytes > len(data):
                    raise ValueError(f"truncated: a record at byte {at} goes beyond the end, byte {len(data)}")
                return data[offset : offset + size_bytes]

            at = 0
            while at < len(data):
                pieces, end = _pieces(read_at, at)
                read_at(pieces[-1].offset + pieces[-1].size, 0)
                yield _record(read_at, at, pieces)
                at = end
    except ValueError as error:  # also of mmap, for an empty file
        raise ValueError(f"{path}: {error}") from None


def _pieces(read_at: ReadAt, at: int) -> tuple[list[_Piece], int]:
    """Return where the content of the record at byte `at` lies, and where the next record starts."""
    pieces: list[_Piece] = []
    while True:
        magic, word = _PREFIX.unpack(read_at(at, _PREFIX.size))
        kind, size = word >> _LENGTH_BITS, word & ((1 << _LENGTH_BITS) - 1)
        if magic != _MAGIC or kind not in ((_MIDDLE, _LAST) if pieces else (_WHOLE, _FIRST)):
            expected = "the next piece of a record" if pieces else "a record"
            raise ValueError(f"damaged: expected {expected} at byte {at}, found {magic.hex()} and kind {kind}")
        pieces.append(_Piece(at + _PREFIX.size, size))
        at += _PREFIX.size + -(-size // 4) * 4
        if kind in (_WHOLE, _LAST):
            return pieces, at


def _joined(read_at: ReadAt, pieces: Sequence[_Piece]) -> bytes:
    return _MAGIC.join(read_at(*piece) for piece in pieces)


def _record(read_at: ReadAt, at: int, pieces: Sequence[_Piece]) -> _Record:
    size = sum(piece.size for piece in pieces) + len(_MAGIC) * (len(pieces) - 1)
    # Of a record in one piece, which nearly all are, only the beginning is read.
    content = b"" if len(pieces) == 1 else _joined(read_at, pieces)
    begin, num_labels, label, key = _HEADER.size, 0, 0.0, 0
    if size >= begin:
        num_labels, label, key, _ = _HEADER.unpack(content[:begin] or read_at(pieces[0].offset, begin))
        begin += _LABEL_BYTES * num_labels
    if size < begin:
        raise ValueError(f"damaged: the record at byte {at} has {size} bytes, expected {begin} for header and labels")
    labels = (label,)
    if num_labels:
        array = (content or read_at(pieces[0].offset, begin))[_HEADER.size : begin]
        labels = struct.unpack(f"<{num_labels}f", array)
    return _Record(at, key, labels, size - begin)


def _keys(path: Path, records: Sequence[_Record]) -> dict[int, int]:
    """Return the key of each record that counts, by its offset: from the .idx, else the one in its header."""
    idx = path.with_suffix(".idx")
    if not idx.is_file():
        return {record.offset: record.key for record in records}
    starts = {record.offset for record in records}
    keys: dict[int, int] = {}
    seen: set[int] = set()
    for number, line in enumerate(idx.read_text(errors="replace").splitlines(), start=1):
        words = line.split()
        if len(words) != 2 or not all(word.isdecimal() for word in words):
            raise ValueError(f"{idx}:{number}: expected a key and an offset, got {line!r}")
        key, offset = map(int, words)
        if offset not in starts:
            raise ValueError(f"{idx}:{number}: no record of {path.name} starts at byte {offset}")
        if key in seen or offset in keys:
            raise ValueError(f"{idx}:{number}: key {key} or byte {offset} stands twice")
        keys[offset] = key
        seen.add(key)
    return keys


def _identity(label: float) -> tuple[str, str | None]:
    if not label.is_integer() or not 0 <= label <= _WHOLE_IN_FLOAT32:
        return "", f"bad label: expected a whole number of 0 to {_WHOLE_IN_FLOAT32:,}, got {label:g}"
    return str(int(label)), None


def _check_count(path: Path, table: _Record, keys: dict[int, int], records: Sequence[_Record]) -> None:
    """Compare the bounds at key 0, first the key after the last image, with the records."""
    expected, found = table.labels[0] - 1, sum(not r.is_table and r.offset in keys for r in records)
    if expected < _WHOLE_IN_FLOAT32 and expected != found:
        raise ValueError(f"{path}: the record at byte {table.offset} says {expected:g} images, found {found}")


def _compare_with_property(path: Path, num_identities: int) -> None:
    """Warn where `property` (identities, height, width) says otherwise: people write that file by hand."""
    file = path.with_name("property")
    stated = file.read_text(errors="replace").split(",")[0].strip() if file.is_file() else str(num_identities)
    if stated != str(num_identities):
        logging.getLogger(__name__).warning("%s: says %s identities, the records hold %d", file, stated, num_identities)
