"""Faces as people keep them: a folder per identity, or tars of such folders."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from facetrain.data.index import FileSlices, index_tar

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
"""Files with other suffixes are no images and are passed over."""


@dataclass(frozen=True)
class SkippedImage:
    """An image file that can't be used because of its name or kind, before its content was looked at."""

    name: str
    """Its path in the source."""
    reason: str
    """Why, for a person to read."""


@dataclass(frozen=True, eq=False)
class FaceSource:
    """Images of known identities, read one at a time, from any thread or forked process."""

    names: tuple[str, ...]
    """Path of each image, `IDENTITY/IMAGE`, sorted by identity, then by image."""
    identities: tuple[str, ...]
    """Identity of each image."""
    sizes_bytes: npt.NDArray[np.int64]
    """[images]; length of each image's file."""
    skipped: tuple[SkippedImage, ...]
    """Image files that aren't among `names`."""
    _roots: tuple[Path, ...]
    _root_of: npt.NDArray[np.int32]
    _offsets: npt.NDArray[np.int64]
    _tars: FileSlices

    def read(self, image: int) -> bytes:
        """Return the file of image number `image` (its place in `names`).

        Raises:
            ValueError: The file is shorter than it was when the source was opened; the message names it.
        """
        root, offset, size = int(self._root_of[image]), int(self._offsets[image]), int(self.sizes_bytes[image])
        if offset != _IN_FOLDER:
            return self._tars.read(root, offset, size)
        data = (self._roots[root] / self.names[image]).read_bytes()
        if len(data) != size:
            raise ValueError(f"{self.where(image)}: changed while it was in use: {size} bytes before, {len(data)} now")
        return data

    def where(self, image: int) -> str:
        """Return where an image comes from, for messages."""
        root, name = self._roots[self._root_of[image]], self.names[image]
        return f"{root / name}" if self._offsets[image] == _IN_FOLDER else f"{root}: {name}"

    def fingerprint(self) -> str:
        """Return a sha256 over the names and lengths of all images: the same wherever the set lies, folder or tars."""
        digest = hashlib.sha256()
        for name, size in zip(self.names, self.sizes_bytes.tolist(), strict=True):
            digest.update(f"{name}\0{size}\0".encode())
        return digest.hexdigest()


_IN_FOLDER = -1
"""Offset of an image that is a file of its own."""


class _Entry(NamedTuple):
    """A file found in a folder or tar, before its name is judged."""

    name: str
    offset: int
    size_bytes: int
    is_file: bool


class _Face(NamedTuple):
    """An image with its identity; sorts by identity, then by name."""

    identity: str
    name: str
    root: int
    offset: int
    size_bytes: int


def open_faces(paths: Sequence[Path]) -> FaceSource:
    """Open folders of `IDENTITY/IMAGE`, uncompressed tars of that, or several of them as one set.

    Folders above the identities that all images of a path share (`lfw/Name/Name_0001.jpg`) are left out of the names.
    Hidden files, `__MACOSX` and files without an image's suffix are passed over. One identity may have images in
    several paths, as it has where a set was cut into several tars.

    Args:
        paths: Folders and tars.

    Raises:
        FileNotFoundError: A path doesn't exist.
        ValueError: A path holds no `IDENTITY/IMAGE`, is a truncated tar, names a file outside of itself, or an image
            occurs twice; the message names it.
    """
    if not paths:
        raise ValueError("no faces given: expected a folder of IDENTITY/IMAGE, or tars of it")
    faces: list[_Face] = []
    skipped: list[SkippedImage] = []
    roots: list[Path] = []
    for root, path in enumerate(paths):
        entries = [entry for entry in _entries(path) if _is_image(entry.name)]
        lead = _shared_lead([entry.name for entry in entries])
        faults = [_fault(entry, lead) for entry in entries]
        if all(faults):
            found = f", found {entries[0].name!r}" if entries else ""
            raise ValueError(f"{path}: no images in it: expected IDENTITY/IMAGE ({', '.join(IMAGE_SUFFIXES)}){found}")
        faces += [_face(entry, root) for entry, fault in zip(entries, faults, strict=True) if not fault]
        skipped += [SkippedImage(_printable(e.name), fault) for e, fault in zip(entries, faults, strict=True) if fault]
        roots.append(path / lead if path.is_dir() else path)
    faces.sort()
    _refuse_duplicates(faces, paths)
    return FaceSource(
        names=tuple(face.name for face in faces),
        identities=tuple(face.identity for face in faces),
        sizes_bytes=np.array([face.size_bytes for face in faces], dtype=np.int64),
        skipped=tuple(sorted(skipped, key=lambda image: image.name)),
        _roots=tuple(roots),
        _root_of=np.array([face.root for face in faces], dtype=np.int32),
        _offsets=np.array([face.offset for face in faces], dtype=np.int64),
        _tars=FileSlices(paths),
    )


def _entries(path: Path) -> Iterator[_Entry]:
    if path.is_dir():
        yield from _files_below(path)
    elif not path.exists():
        raise FileNotFoundError(f"{path}: no such folder or tar")
    else:
        for member in index_tar(path):
            name = PurePosixPath(member.name)  # without a leading ./
            if name.is_absolute() or ".." in name.parts:
                raise ValueError(f"{path}: refused: member '{member.name}' points outside of the tar")
            yield _Entry(str(name), member.offset, member.size_bytes, member.is_file)


def _files_below(folder: Path) -> Iterator[_Entry]:
    def fail(error: OSError) -> None:
        raise error

    for root, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        folders[:] = [name for name in folders if not _is_circle(Path(root), name)]
        for file in files:
            path = Path(root, file)
            name = path.relative_to(folder).as_posix()
            if _is_image(name):
                is_file = path.is_file()
                yield _Entry(name, _IN_FOLDER, path.stat().st_size if is_file else 0, is_file)


def _is_circle(folder: Path, name: str) -> bool:
    """Whether a folder is a link to one of those that lead to it."""
    path = folder / name
    return path.is_symlink() and folder.resolve().is_relative_to(path.resolve())


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return not hidden and path.suffix.lower() in IMAGE_SUFFIXES


def _shared_lead(names: Sequence[str]) -> str:
    """Return the folders above the identity folders that most images share; none where there is no majority."""
    leads = Counter("/".join(name.split("/")[:-2]) for name in names if "/" in name)
    lead, count = leads.most_common(1)[0] if leads else ("", 0)
    return lead if 2 * count > leads.total() else ""


def _fault(entry: _Entry, lead: str) -> str | None:
    """Return why an entry can't be used, None where it can."""
    if not entry.is_file:
        return "bad name: a link, folder or device, not a file"
    if _printable(entry.name) != entry.name:
        return "bad name: not UTF-8, or control characters"
    *folders, _ = entry.name.split("/")
    if not folders or "/".join(folders[:-1]) != lead:
        return f"bad name: expected {lead + '/' if lead else ''}IDENTITY/IMAGE"
    return None


def _face(entry: _Entry, root: int) -> _Face:
    *_, identity, image = entry.name.split("/")
    return _Face(identity, f"{identity}/{image}", root, entry.offset, entry.size_bytes)


def _printable(name: str) -> str:
    """Return a name with bytes that aren't UTF-8 and control characters written as escapes."""
    escaped = name.encode(errors="backslashreplace").decode()
    return "".join(f"\\x{ord(letter):02x}" if letter < " " else letter for letter in escaped)


def _refuse_duplicates(faces: Sequence[_Face], paths: Sequence[Path]) -> None:
    counts = Counter(face.name for face in faces)
    if len(counts) == len(faces):
        return
    name = next(name for name, count in counts.items() if count > 1)
    places = [str(paths[face.root]) for face in faces if face.name == name]
    raise ValueError(f"{name}: occurs {len(places)} times, in {' and '.join(dict.fromkeys(places))}")
