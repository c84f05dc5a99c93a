"""Where the bytes of each image lie: tar headers, per-shard sidecar indexes, and the table of identities.

All of it is plain `.npy`, so that the processes of a node share one copy by mapping it into memory.
"""

import mmap
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from facetrain.data.names import NameList
from facetrain.whole_file import writing

BLOCK_BYTES = 512
"""A tar is a row of such blocks; headers and data start at their multiples."""

_NAMES_FILE = "class_names.npy"
_FIRST_IMAGE_FILE = "class_first_image.npy"
TABLE_FILES = (_NAMES_FILE, _FIRST_IMAGE_FILE)
"""The files of a class table."""
_MAX_OPEN_FILES = 512
_MAX_EXTRA_BYTES = 1 << 20
"""Longest name or PAX header of a member; it is read into memory whole."""
_PAX_LENGTH_DIGITS = len(str(_MAX_EXTRA_BYTES))


@dataclass(frozen=True, eq=False)
class ClassTable:
    """The identities of a set and which images are theirs; an identity's row is its label.

    Images are numbered over all shards, identity after identity (compressed sparse rows).
    """

    names: Sequence[str]
    """Name of each identity."""
    first_image: npt.NDArray[np.int64]
    """[I + 1]; the images of identity i are first_image[i] to first_image[i + 1] - 1, at least one."""

    def __post_init__(self) -> None:
        """Check that every identity has an image."""
        if len(self.first_image) != len(self.names) + 1:
            raise ValueError(
                f"class table: expected {len(self.names) + 1} image bounds for its names, got {len(self.first_image)}"
            )
        if self.first_image[0] != 0 or not bool((self.first_image[1:] > self.first_image[:-1]).all()):
            raise ValueError("class table: expected image bounds that rise from 0, at least one image per identity")

    @property
    def num_identities(self) -> int:
        """I, the number of identities."""
        return len(self.names)

    @property
    def num_images(self) -> int:
        """The number of images of all identities."""
        return int(self.first_image[-1])

    def identity_of(self, image: int) -> int:
        """Return the label of an image number."""
        return int(np.searchsorted(self.first_image, image, side="right")) - 1

    def save(self, folder: Path) -> None:
        """Write the table into a folder, names as one run of UTF-8 bytes."""
        save_array(folder / _NAMES_FILE, NameList.of(self.names).text)
        save_array(folder / _FIRST_IMAGE_FILE, np.asarray(self.first_image, dtype=np.int64))

    @classmethod
    def load(cls, folder: Path) -> "ClassTable":
        """Map what `save` wrote into memory.

        Raises:
            ValueError: A file is missing or isn't such a table.
        """
        text, first_image = load_array(folder / _NAMES_FILE), load_array(folder / _FIRST_IMAGE_FILE)
        try:
            names = NameList(text)
            names.check()  # they are decoded when they are asked for: damage is to show now
            return cls(names=names, first_image=first_image)
        except ValueError as error:
            raise ValueError(f"{folder / _NAMES_FILE} or {_FIRST_IMAGE_FILE} beside it is damaged: {error}") from None


class TarMember(NamedTuple):
    """One entry of a tar."""

    name: str
    """Path in the tar, as written there; bytes that aren't UTF-8 are surrogate escapes."""
    offset: int
    """Where its data starts in the tar, in bytes."""
    size_bytes: int
    """Length of its data."""
    is_file: bool
    """False for folders, links and devices, which have no data of their own."""


def index_tar(path: Path) -> Iterator[TarMember]:
    """Walk the headers of any uncompressed tar: ustar, PAX or GNU, long names included.

    Tars that were joined end to end are read to the last.

    Yields:
        The members in the order of the file; folders, links and devices too.

    Raises:
        ValueError: The file isn't an uncompressed tar, or it is truncated; the message names it.
    """
    try:
        # Mapped, because a read call per header would take as long as all the rest.
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar:
            yield from _walk(tar)
    except ValueError as error:  # also of mmap, for an empty file
        raise ValueError(f"{path}: {error}") from None


def _walk(tar: mmap.mmap) -> Iterator[TarMember]:
    at, ended, overrides, file_bytes = 0, False, dict[str, str](), len(tar)
    while at < file_bytes:
        header = tar[at : at + BLOCK_BYTES]
        if len(header) < BLOCK_BYTES:
            raise ValueError(f"truncated tar: {len(header)} bytes left of the header at byte {at}")
        data_at = at + BLOCK_BYTES
        if not header.strip(b"\0"):
            at, ended = data_at, True
            continue
        _check_header(header, at)
        kind = header[156:157]
        # A PAX size replaces that of the header, which holds 8 GiB at most.
        size = int(overrides["size"]) if "size" in overrides else _number(header[124:136], at)
        # Links, devices and folders have no data, whatever size they state.
        size = 0 if kind in b"123456" else size
        if size < 0:
            raise ValueError(f"damaged tar header at byte {at}: a size of {size} bytes")
        if data_at + size > file_bytes:
            name = overrides.get("path") or _name(header)
            raise ValueError(f"truncated tar: '{name}' ends at byte {data_at + size}, the file at {file_bytes}")
        if kind in b"Lx" and size > _MAX_EXTRA_BYTES:
            raise ValueError(
                f"damaged tar header at byte {at}: {size:,} bytes of header, the most are {_MAX_EXTRA_BYTES:,}"
            )
        if kind == b"L":  # GNU: the data is the next member's name
            overrides["path"] = _text(tar[data_at : data_at + size].rstrip(b"\0"))
        elif kind == b"x":  # PAX: the data are fields of the next member
            overrides |= _pax_fields(tar[data_at : data_at + size], at)
        elif kind not in (b"K", b"g"):  # neither a long link name nor a comment on the whole tar
            name = overrides.get("path") or _name(header)
            # In the oldest tars a folder is a file whose name ends in a slash.
            yield TarMember(name, data_at, size, kind in b"0\x007" and not name.endswith("/"))
            overrides = {}
        at, ended = data_at + -(-size // BLOCK_BYTES) * BLOCK_BYTES, False
    if not ended:
        raise ValueError("truncated tar: it lacks the empty block that ends a tar")


def _check_header(header: bytes, at: int) -> None:
    if header[257:262] == b"ustar":
        return
    # Tars older than POSIX have no magic; their checksum counts its own field as spaces.
    total = sum(header[:148]) + sum(header[156:]) + 8 * ord(" ")
    if _number(header[148:156], at) != total:
        raise ValueError(f"expected an uncompressed tar, found no tar header at byte {at}")


def _number(field: bytes, at: int) -> int:
    if field[0] == 0x80:  # GNU: big-endian binary instead of octal digits; 0xFF would be a negative number
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.rstrip(b"\0 ") or b"0", 8)
    except ValueError:
        raise ValueError(f"expected an uncompressed tar, found no tar header at byte {at}") from None


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    # POSIX splits long paths in two; GNU keeps other things in that place.
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _pax_fields(data: bytes, at: int) -> dict[str, str]:
    """Read records of the form `LENGTH KEY=VALUE` and a line feed, LENGTH counting the whole record."""
    fields = {}
    begin, last = 0, len(data.rstrip(b"\0"))
    while begin < last:
        digits, _, _ = data[begin : begin + _PAX_LENGTH_DIGITS + 1].partition(b" ")
        if not digits.isdigit() or not len(digits) + 1 < int(digits) <= len(data) - begin:
            raise ValueError(f"damaged PAX record at byte {at}")
        end = begin + int(digits)
        key, _, value = data[begin + len(digits) + 1 : end - 1].partition(b"=")
        fields[_text(key)] = _text(value)
        begin = end
    return fields


class FileSlices:
    """Reads pieces of files by position, from any thread and on both sides of a fork.

    `os.pread` has no shared position that two readers could move under each other. Files are opened at the first
    read; after unpickling they are opened anew.
    """

    def __init__(self, paths: Sequence[Path], *, keep_open: bool = True) -> None:
        """Take the files; none is opened yet. `keep_open` keeps them open from read to read."""
        self.paths = tuple(paths)
        self._keep_open = keep_open
        self._fds: dict[int, int] = {}

    def read(self, file: int, offset: int, size_bytes: int) -> bytes:
        """Return `size_bytes` bytes of file number `file` from byte `offset`.

        Raises:
            ValueError: The file ends before; the message names it.
            OSError: It can't be opened or read; the message names it.
        """
        fd = self._fds.get(file)
        if fd is None:
            fd = self._open(file)
            if not self._keep_open or len(self._fds) >= _MAX_OPEN_FILES:
                # Past the limit a file is opened for one read: closing another's could hit a thread that reads it.
                try:
                    return self._read(fd, file, offset, size_bytes)
                finally:
                    os.close(fd)
            # No lock, which a fork could copy while it is held: the thread that comes second closes its own.
            kept = self._fds.setdefault(file, fd)
            if kept != fd:
                os.close(fd)
                fd = kept
        return self._read(fd, file, offset, size_bytes)

    def _open(self, file: int) -> int:
        return os.open(self.paths[file], os.O_RDONLY | os.O_CLOEXEC)

    def _read(self, fd: int, file: int, offset: int, size_bytes: int) -> bytes:
        try:
            data = os.pread(fd, size_bytes, offset)
            while len(data) < size_bytes:  # one call returns 2 GiB at most
                more = os.pread(fd, size_bytes - len(data), offset + len(data))
                if not more:
                    raise ValueError(
                        f"{self.paths[file]}: truncated: expected {size_bytes} bytes at byte {offset},"
                        f" found {len(data)}"
                    )
                data += more
        except OSError as error:
            raise with_name(error, self.paths[file]) from None
        except (OverflowError, MemoryError):
            raise ValueError(
                f"{self.paths[file]}: its index places {size_bytes} bytes at byte {offset}, which no file holds;"
                " `facetrain pack`, run again, repairs it"
            ) from None
        return data

    def __reduce__(self) -> tuple[Any, ...]:
        return FileSlices, (self.paths,)

    def __del__(self) -> None:
        for fd in self._fds.values():
            os.close(fd)


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write an array as `.npy`, at once or not at all."""
    with writing(path) as part, open(part, "wb") as file:
        np.save(file, array, allow_pickle=False)


def load_array(path: Path) -> npt.NDArray[Any]:
    """Map an array that `save_array` wrote into memory, read-only.

    Raises:
        ValueError: The file is missing, truncated, or no `.npy`; the message names it.
    """
    try:
        # A plain view of the mapped memory: memmap's own indexing takes several times as long.
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except FileNotFoundError:
        raise ValueError(f"{path}: index file is missing; `facetrain pack`, run again, writes it anew") from None
    except OSError:
        raise
    except Exception as error:  # a damaged header raises nearly anything: ValueError, EOFError, TokenError, ...
        raise ValueError(f"{path}: damaged index file ({error}); `facetrain pack`, run again, repairs it") from None


def with_name(error: OSError, path: Path) -> OSError:
    """Return the error of a read with the file's name: those of an open file, as of a bad disk, have none."""
    return OSError(error.errno, error.strerror, str(path))


def row_of(first: Sequence[int], item: int) -> int:
    """Return which row holds an item, where row r holds the items first[r] to first[r + 1] - 1."""
    return bisect_right(first, item) - 1
