"""Images of anybody, to embed: folders, tars, lists of files, single files, and every source of labelled faces."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from facetrain.data.index import FileSlices, index_tar
from facetrain.data.sources.faces import FaceSource, printable
from facetrain.data.sources.folders import IMAGE_SUFFIXES, images_below, is_image, unread_kind
from facetrain.data.sources.opening import open_faces
from facetrain.data.sources.recordio import records_of

_LABELLED = (".parquet", ".csv")


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images by name, read one at a time. Whether one can be read shows when it is read."""

    names: tuple[str, ...]
    """Path below its folder or in its tar, as a list has it, or `IDENTITY/IMAGE` of a source of labelled faces."""
    sizes_bytes: npt.NDArray[np.int64]
    """[images]; length of each image's file, -1 where there is none."""
    _reads: tuple[Callable[[], bytes], ...]

    def read(self, image: int) -> bytes:
        """Return the file of image number `image` (its place in `names`).

        Raises:
            ValueError: It can't be read; the message names it.
        """
        try:
            return self._reads[image]()
        except OSError as error:
            raise ValueError(f"{self.names[image]}: {error.strerror or error}") from None

    def fingerprint(self) -> str:
        """Return a sha256 over name and length of all images."""
        digest = hashlib.sha256()
        for name, size in zip(self.names, self.sizes_bytes.tolist(), strict=True):
            digest.update(f"{name}\0{size}\0".encode())
        return digest.hexdigest()


_Row = tuple[str, int, Callable[[], bytes]]
"""Name, length in bytes, and what reads an image."""


def open_images(paths: Sequence[Path], listed: Sequence[str] = ()) -> ImageSet:
    """Find the images of folders at any depth, uncompressed tars, lists, single files and labelled sources.

    A list is a `.txt` with a path a line, relative to the list's folder. Labelled sources are what `open_faces` takes
    besides: RecordIO, `.parquet` and `.csv`. The order is that of the paths, sorted by name within folders and tars.

    Args:
        paths: Folders and files.
        listed: Further paths of images, relative to the working directory.

    Raises:
        FileNotFoundError: A path doesn't exist.
        OSError: A folder can't be read.
        ValueError: A path holds no image or is damaged, or two images have one name; the message names it.
    """
    rows = [row for path in paths for row in _open(path)]
    rows += [_file_row(name, Path(name)) for name in listed]
    if not rows:
        raise ValueError("no images given: expected folders, tars, lists or image files")
    names = tuple(printable(name) for name, _, _ in rows)
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"{twice}: occurs twice; expected every image once, and names that tell images apart")
    sizes = np.array([size for _, size, _ in rows], dtype=np.int64)
    return ImageSet(names, sizes, tuple(read for _, _, read in rows))


def _open(path: Path) -> list[_Row]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such folder, tar, list or image")
    if records_of(path) is not None or path.suffix.lower() in _LABELLED:
        return _rows_of_faces(open_faces([path]))
    if path.is_dir():
        rows = [_unread_row(name) or _file_row(name, path / name) for name, _ in sorted(images_below(path))]
    elif path.suffix.lower() == ".txt":
        rows = [_file_row(line, path.parent / line) for line in _lines(path)]
    elif path.suffix.lower() in IMAGE_SUFFIXES or unread_kind(path.name):
        rows = [_unread_row(str(path)) or _file_row(str(path), path)]
    else:
        tar = FileSlices([path])
        files = sorted(member for member in index_tar(path) if member.is_file)
        rows = [
            _unread_row(m.name) or (m.name, m.size_bytes, partial(tar.read, 0, m.offset, m.size_bytes))
            for m in files
            if is_image(m.name) or unread_kind(m.name)
        ]
    if not any(size >= 0 or not unread_kind(name) for name, size, _ in rows):
        found = f", found {printable(rows[0][0])!r}" if rows else ""
        raise ValueError(f"{path}: no images in it ({', '.join(IMAGE_SUFFIXES)}){found}")
    return rows


def _unread_row(name: str) -> _Row | None:
    """Return the row of an image of a kind that isn't read, whose reading says so; None where it is read."""
    kind = unread_kind(name)
    if kind is None:
        return None

    def refuse() -> bytes:
        raise ValueError(f"{printable(name)}: {kind}")

    return name, -1, refuse


def _file_row(name: str, file: Path) -> _Row:
    return name, file.stat().st_size if file.is_file() else -1, file.read_bytes


def _rows_of_faces(faces: FaceSource) -> list[_Row]:
    return [
        (name, size, partial(faces.read, image))
        for image, (name, size) in enumerate(zip(faces.names, faces.sizes_bytes.tolist(), strict=True))
    ]


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a text file: {error}") from None
