"""A set of faces, however it is kept: names, identities, and the bytes of each image by its number."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

LABEL_KEYS = ("identity", "label", "class", "cls")
"""What a table or a JSON can call an image's identity; the first of them that is there is taken."""


class Reader(Protocol):
    """Reads single images of one path, from any thread or forked process."""

    def read(self, place: int, size_bytes: int) -> bytes:
        """Return the image at a place of this reader's own counting, `size_bytes` bytes long."""
        ...

    def where(self, place: int, name: str) -> str:
        """Return where that image, called `name`, comes from, for messages."""
        ...


class Face(NamedTuple):
    """An image that was found, with its identity; sorts by identity, then by name."""

    identity: str
    name: str
    """`IDENTITY/IMAGE`, unlike that of any other image of the path."""
    place: int
    """What the path's reader takes."""
    size_bytes: int


@dataclass(frozen=True)
class SkippedImage:
    """An image that can't be used because of its name, kind or label, before its content was looked at."""

    name: str
    """Its path in the source."""
    reason: str
    """Why, for a person to read."""


@dataclass(frozen=True)
class Found:
    """What one path holds."""

    faces: list[Face]
    """The images, in any order."""
    skipped: list[SkippedImage]
    """Images that aren't among them."""
    reader: Reader
    """Reads the images."""


@dataclass(frozen=True, eq=False)
class FaceSource:
    """Images of known identities, read one at a time, from any thread or forked process."""

    names: tuple[str, ...]
    """Name of each image, `IDENTITY/IMAGE` as the source has it, sorted by identity, then by name."""
    identities: tuple[str, ...]
    """Identity of each image."""
    sizes_bytes: npt.NDArray[np.int64]
    """[images]; length of each image's file."""
    skipped: tuple[SkippedImage, ...]
    """Images that aren't among `names`."""
    _readers: tuple[Reader, ...]
    _reader_of: npt.NDArray[np.int32]
    _places: npt.NDArray[np.int64]

    def read(self, image: int) -> bytes:
        """Return the file of image number `image` (its place in `names`).

        Raises:
            ValueError: The image isn't what it was when the source was opened; the message names it.
        """
        return self._reader(image).read(int(self._places[image]), int(self.sizes_bytes[image]))

    def describe_skipped(self) -> str:
        """Return how many images of the source can't be used and why not the first; '' where there are none."""
        if not self.skipped:
            return ""
        first = self.skipped[0]
        return f"images left out: {len(self.skipped)}, the first: {first.name}: {first.reason}"

    def where(self, image: int) -> str:
        """Return where an image comes from, for messages."""
        return self._reader(image).where(int(self._places[image]), self.names[image])

    def fingerprint(self) -> str:
        """Return a sha256 over identity, name and length of all images: the same wherever and however the set lies."""
        digest = hashlib.sha256()
        for identity, name, size in zip(self.identities, self.names, self.sizes_bytes.tolist(), strict=True):
            digest.update(f"{identity}\0{name}\0{size}\0".encode())
        return digest.hexdigest()

    def take(self, images: Sequence[int], identities: Sequence[str]) -> "FaceSource":
        """Return some of the images, under other identities, sorted as `names` says.

        Args:
            images: Numbers of the images.
            identities: [len(images)]; the identity of each.
        """
        rows = sorted(zip(identities, (self.names[image] for image in images), images, strict=True))
        numbers = [image for _, _, image in rows]
        return dataclasses.replace(
            self,
            names=tuple(name for _, name, _ in rows),
            identities=tuple(identity for identity, _, _ in rows),
            sizes_bytes=self.sizes_bytes[numbers],
            _reader_of=self._reader_of[numbers],
            _places=self._places[numbers],
        )

    def _reader(self, image: int) -> Reader:
        return self._readers[int(self._reader_of[image])]


def flat_names(faces: Sequence[tuple[str, str]]) -> list[str]:
    """Return the name `LABEL/PATH` of each label and path, the path's slashes written as _.

    Where two paths of a label would have one name, theirs are written as %2F instead.
    """
    names = [f"{label}/{path.replace('/', '_')}" for label, path in faces]
    count = Counter(name for name, _ in set(zip(names, faces, strict=True)))
    return [
        name if count[name] == 1 else f"{label}/{path.replace('/', '%2F')}"
        for name, (label, path) in zip(names, faces, strict=True)
    ]


def label_fault(label: str) -> str | None:
    """Return why a label can't name an identity, None where it can."""
    if not label:
        return "bad label: it is empty"
    if printable(label) != label or "/" in label:
        return f"bad label: expected a name without / and control characters, got {printable(label)!r}"
    return None


def printable(name: str) -> str:
    """Return a name with bytes that aren't UTF-8 and control characters written as escapes."""
    escaped = name.encode(errors="backslashreplace").decode()
    return "".join(f"\\x{ord(letter):02x}" if letter < " " else letter for letter in escaped)
