"""Faces in a folder per identity; what a path of such folders says is the same for files and for members of a tar."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from facetrain.data.index import with_name
from facetrain.data.sources.faces import Face, Found, Reader, SkippedImage, printable

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp")
"""Images that are read, by their suffixes."""
_UNREAD_SUFFIXES = frozenset(
    (".tif", ".tiff", ".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".ppm", ".pgm", ".tga", ".dng", ".cr2", ".nef")
)
"""Images that aren't, which is said of each. Files with other suffixes are no images and are passed over."""


class Entry(NamedTuple):
    """A file found in a folder or tar, before its name is judged."""

    name: str
    place: int
    size_bytes: int
    is_file: bool


@dataclass(frozen=True)
class ImageFiles:
    """Images that are files of their own; the place of one is its row in `files`."""

    folder: Path
    """What `files` are relative to."""
    files: tuple[str, ...]
    """Path of each image."""

    def read(self, place: int, size_bytes: int) -> bytes:
        """Return an image.

        Raises:
            ValueError: Its length has changed.
            OSError: It can't be read; the message names it.
        """
        file = self.folder / self.files[place]
        try:
            data = file.read_bytes()
        except OSError as error:
            raise with_name(error, file) from None
        if len(data) != size_bytes:
            changed = f"{size_bytes} bytes before, {len(data)} now"
            raise ValueError(f"{self.where(place)}: changed while it was in use: {changed}")
        return data

    def where(self, place: int, name: str = "") -> str:
        """Return the image's path."""
        return str(self.folder / self.files[place])


def open_folder(folder: Path) -> Found:
    """Find the images of a folder of `IDENTITY/IMAGE`; see `by_folder`.

    Links are followed. Hidden files, `__MACOSX` and files without an image's suffix are passed over; images of kinds
    that aren't read are listed as skipped.
    """
    files = list(images_below(folder))
    entries = [
        Entry(name, row, (folder / name).stat().st_size if is_file else 0, is_file)
        for row, (name, is_file) in enumerate(files)
    ]
    return by_folder(folder, entries, ImageFiles(folder, tuple(name for name, _ in files)))


def by_folder(path: Path, entries: Sequence[Entry], reader: Reader) -> Found:
    """Take the folder of each image as its identity.

    Folders above the identities that most images of a path share (`lfw/Name/Name_0001.jpg`) are left out of the names.

    Raises:
        ValueError: No entry is an `IDENTITY/IMAGE`; the message names the path.
    """
    lead = _shared_lead([entry.name for entry in entries if is_image(entry.name)])
    faults = [_fault(entry, lead) for entry in entries]
    if all(faults):
        found = f", found {printable(entries[0].name)!r}" if entries else ""
        raise ValueError(f"{path}: no images in it: expected IDENTITY/IMAGE ({', '.join(IMAGE_SUFFIXES)}){found}")
    return Found(
        faces=[_face(entry) for entry, fault in zip(entries, faults, strict=True) if not fault],
        skipped=[SkippedImage(printable(e.name), fault) for e, fault in zip(entries, faults, strict=True) if fault],
        reader=reader,
    )


def is_image(name: str) -> bool:
    """Whether a path is that of an image that is read, to judge by its name."""
    return _suffix(name) in IMAGE_SUFFIXES


def unread_kind(name: str) -> str | None:
    """Return why an image of that name isn't read, None where it is or is no image."""
    suffix = _suffix(name)
    return f"unread kind: {suffix}, expected {', '.join(IMAGE_SUFFIXES)}" if suffix in _UNREAD_SUFFIXES else None


def _suffix(name: str) -> str:
    """Return a path's suffix in small letters; '' for what is hidden."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return "" if hidden else path.suffix.lower()


def images_below(folder: Path) -> Iterator[tuple[str, bool]]:
    """Yield the paths of the images below a folder, relative to it, and whether each is a file.

    Those that aren't read are among them. Links are followed, but for those that lead in circles.

    Raises:
        OSError: A folder can't be read.
    """

    def fail(error: OSError) -> None:
        raise error

    for root, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        folders[:] = [name for name in folders if not _is_circle(Path(root), name)]
        for file in files:
            path = Path(root, file)
            name = path.relative_to(folder).as_posix()
            if is_image(name) or unread_kind(name):
                yield name, path.is_file()


def _is_circle(folder: Path, name: str) -> bool:
    """Whether a folder is a link to one of those that lead to it."""
    path = folder / name
    if not path.is_symlink():
        return False
    target = path.resolve()
    return any(above.resolve().is_relative_to(target) for above in (folder, *folder.parents))


def _shared_lead(names: Sequence[str]) -> str:
    """Return the folders above the identity folders that most images share; none where there is no majority."""
    leads = Counter("/".join(name.split("/")[:-2]) for name in names if "/" in name)
    lead, count = leads.most_common(1)[0] if leads else ("", 0)
    return lead if 2 * count > leads.total() else ""


def _fault(entry: Entry, lead: str) -> str | None:
    """Return why an entry can't be used, None where it can."""
    if kind := unread_kind(entry.name):
        return kind
    if not entry.is_file:
        return "bad name: a link, folder or device, not a file"
    if printable(entry.name) != entry.name:
        return "bad name: not UTF-8, or control characters"
    *folders, _ = entry.name.split("/")
    if not folders or "/".join(folders[:-1]) != lead:
        return f"bad name: expected {lead + '/' if lead else ''}IDENTITY/IMAGE"
    return None


def _face(entry: Entry) -> Face:
    *_, identity, image = entry.name.split("/")
    return Face(identity, f"{identity}/{image}", entry.place, entry.size_bytes)
