"""Faces in an uncompressed tar: a folder per identity, or WebDataset samples with their class in .cls or .json."""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from facetrain.data.index import FileSlices, index_tar
from facetrain.data.sources.faces import LABEL_KEYS, Face, Found, SkippedImage, flat_names, label_fault, printable
from facetrain.data.sources.folders import Entry, by_folder, is_image, unread_kind

_SAMPLE = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
"""Key and extension of a sample's member: the name is cut at its first dot, as webdataset does."""
_MAX_CLASS_BYTES = 1 << 20


@dataclass(frozen=True)
class TarMembers:
    """Images in a tar; the place of one is its offset in bytes."""

    tars: FileSlices
    """All tars of the source, which share a bounded number of open files."""
    number: int
    """Which of them it is."""

    def read(self, place: int, size_bytes: int) -> bytes:
        """Return an image."""
        return self.tars.read(self.number, place, size_bytes)

    def where(self, place: int, name: str) -> str:
        """Return the tar and the image's name."""
        return f"{self.tars.paths[self.number]}: {name}"


def open_tar(path: Path, tars: FileSlices, number: int) -> Found:
    """Find the images of a tar: of WebDataset samples where any has a class, else of `IDENTITY/IMAGE`.

    Args:
        path: The tar.
        tars: What reads it,
        number: by this number.

    Raises:
        ValueError: It isn't an uncompressed tar, is truncated, names a file outside of itself, or holds no image.
    """
    entries, reader = _entries(path), TarMembers(tars, number)
    classes = _classes(entries, reader)
    if classes:
        return _by_sample(path, entries, classes, reader)
    images = [entry for entry in entries if is_image(entry.name) or unread_kind(entry.name)]
    return by_folder(path, images, reader)


def _entries(path: Path) -> list[Entry]:
    entries = []
    for member in index_tar(path):
        name = PurePosixPath(member.name)  # without a leading ./
        if name.is_absolute() or ".." in name.parts:
            raise ValueError(f"{path}: refused: member '{printable(member.name)}' points outside of the tar")
        entries.append(Entry(str(name), member.offset, member.size_bytes, member.is_file))
    return entries


def _classes(entries: Sequence[Entry], reader: TarMembers) -> dict[str, str]:
    """Return the class of each sample that has one, by its key; .cls comes before .json."""
    classes: dict[str, str] = {}
    for entry in entries:
        sample = _SAMPLE.fullmatch(entry.name)
        if sample and sample[2].lower() in ("cls", "json") and entry.is_file and entry.size_bytes <= _MAX_CLASS_BYTES:
            data = reader.read(entry.place, entry.size_bytes)
            is_cls = sample[2].lower() == "cls"
            label = data.decode(errors="surrogateescape").strip() if is_cls else _label_of_json(data)
            if label is not None and (is_cls or sample[1] not in classes):
                classes[sample[1]] = label
    return classes


def _label_of_json(data: bytes) -> str | None:
    try:
        content = json.loads(data)
    except ValueError:
        return None
    if isinstance(content, dict):
        content = next((content[key] for key in LABEL_KEYS if key in content), None)
    is_label = isinstance(content, str | int) and not isinstance(content, bool)
    return str(content) if is_label else None


def _by_sample(path: Path, entries: Sequence[Entry], classes: Mapping[str, str], reader: TarMembers) -> Found:
    images, unread = defaultdict[str, list[Entry]](list), list[tuple[str, SkippedImage]]()
    for entry in entries:
        sample = _SAMPLE.fullmatch(entry.name)
        if sample and is_image(entry.name):
            images[sample[1]].append(entry)
        elif sample and (kind := unread_kind(entry.name)):
            unread.append((sample[1], SkippedImage(printable(entry.name), kind)))
    # Beside an image that is read, such as a mask beside its photograph, another kind is no loss.
    faces, skipped = [], [image for key, image in unread if key not in images]
    for key, (entry, *others) in images.items():
        fault = _fault(entry, others, classes.get(key))
        if fault:
            skipped += [SkippedImage(printable(each.name), fault) for each in (entry, *others)]
        else:
            faces.append(Face(classes[key], entry.name, entry.place, entry.size_bytes))
    if not faces:
        raise ValueError(f"{path}: no images in it: expected WebDataset samples of an image and a .cls or .json")
    # An identity's images are told apart by their keys, whose folders have nothing to say here.
    names = flat_names([(face.identity, face.name) for face in faces])
    return Found([face._replace(name=name) for face, name in zip(faces, names, strict=True)], skipped, reader)


def _fault(entry: Entry, others: Sequence[Entry], label: str | None) -> str | None:
    if not entry.is_file:
        return "bad name: a link, folder or device, not a file"
    if others:
        return f"bad sample: {1 + len(others)} images of one key"
    if printable(entry.name) != entry.name:
        return "bad name: not UTF-8, or control characters"
    if label is None:
        return "bad sample: it has no class, neither .cls nor .json"
    return label_fault(label)
