"""Shards: WebDataset tars of faces, their manifest, and reads of single images by number.

Sole importer of webdataset, whose writer makes the tars. A folder of shards holds

    shard-000000.tar          members 0000000_0000.jpg: identity (row of the class table), image of that identity
    shard-000000.idx.npy      where each image lies in that tar
    class_*.npy, images.npy   class table and the indexes of all shards, merged, mapped into memory by every reader
    manifest.json             counts, sizes and checksums
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from facetrain.data.index import BLOCK_BYTES, ClassTable, FileSlices, index_tar, load_array, row_of
from facetrain.data.manifest import Manifest

IMAGES_FILE = "images.npy"
"""uint32 [images, 2]: the sidecar indexes of all shards, one after another."""

_KEY = re.compile(r"(\d{7,})_(\d{4,})\.jpg")


@dataclass(frozen=True, eq=False)
class ShardSet:
    """A folder of shards, open for reads of single images; safe over threads and forks, and can be pickled."""

    folder: Path
    """The folder."""
    manifest: Manifest
    """Counts, sizes and checksums."""
    table: ClassTable
    """The identities and which images are theirs."""
    _places: npt.NDArray[np.uint32]
    _tars: FileSlices

    @classmethod
    def open(cls, folder: Path) -> "ShardSet":
        """Open a folder that `facetrain pack` made; checks files and sizes, reads no image.

        Raises:
            ValueError: The folder or a shard is missing, a shard is truncated, or an index doesn't match its tar; the
                message names the file.
        """
        manifest = Manifest.load(folder)
        shards = cls(
            folder=folder,
            manifest=manifest,
            table=ClassTable.load(folder),
            _places=load_array(folder / IMAGES_FILE),
            _tars=FileSlices([folder / shard.name for shard in manifest.shards]),
        )
        shards._check()
        return shards

    def read(self, image: int) -> bytes:
        """Return the JPEG of image number `image`, 0 to table.num_images - 1.

        Raises:
            IndexError: There is no such image.
            ValueError: The shard ends before the image does; the message names the shard.
        """
        if not 0 <= image < len(self._places):
            raise IndexError(f"image {image} of {self.folder}, which holds {len(self._places)}")
        first_block, size_bytes = self._places[image].tolist()
        return self._tars.read(row_of(self._first_image, image), first_block * BLOCK_BYTES, size_bytes)

    def where(self, image: int) -> str:
        """Return shard and member of an image, for messages."""
        return f"{self._tars.paths[row_of(self._first_image, image)]}: {self._member(image)}"

    def verify(self) -> None:
        """Read every byte and compare checksums, keys and indexes; minutes for a large set.

        Raises:
            ValueError: A shard differs from what was packed; the message names it.
        """
        for info, first, path in zip(self.manifest.shards, self._first_image, self._tars.paths, strict=False):
            if sha256_of(path) != info.sha256:
                raise ValueError(
                    f"{path}: its sha256 isn't that of the manifest; `facetrain pack`, run again, repairs it"
                )
            labels, places = index_shard(path)
            expected = [self.table.identity_of(image) for image in range(first, first + info.images)]
            if labels != expected or not np.array_equal(places, self._places[first : first + info.images]):
                raise ValueError(f"{self.folder / IMAGES_FILE}: doesn't match {path}; run `facetrain pack` again")

    def __reduce__(self) -> tuple[Any, ...]:
        # A mapped array would be pickled as a copy of its content.
        return ShardSet.open, (self.folder,)

    @cached_property
    def _first_image(self) -> list[int]:
        return np.cumsum([0, *(shard.images for shard in self.manifest.shards)]).tolist()  # type: ignore[no-any-return]

    def _member(self, image: int) -> str:
        label = self.table.identity_of(image)
        return image_key(label, image - int(self.table.first_image[label])) + ".jpg"

    def _check(self) -> None:
        images, table = self.manifest.images, self.table
        if self._places.shape != (images, 2) or (table.num_images, table.num_identities) != (
            images,
            self.manifest.identities,
        ):
            raise ValueError(f"{self.folder}: index and manifest differ in their counts; run `facetrain pack` again")
        for shard, (info, path) in enumerate(zip(self.manifest.shards, self._tars.paths, strict=True)):
            found = path.stat().st_size if path.is_file() else None
            if found is None:
                raise ValueError(f"{path}: shard is missing; `facetrain pack`, run again, repairs it")
            if found != info.size_bytes:
                kind = "truncated shard" if found < info.size_bytes else "not the shard that was packed"
                raise ValueError(f"{path}: {kind}: expected {info.size_bytes} bytes, found {found}")
            for image in {self._first_image[shard], self._first_image[shard + 1] - 1}:
                self._check_header(shard, image)

    def _check_header(self, shard: int, image: int) -> None:
        """Compare an index entry with the tar's own header, which lies before the image."""
        first_block, size_bytes = self._places[image].tolist()
        path, member = self._tars.paths[shard], self._member(image).encode()
        header = self._tars.read(shard, (first_block - 1) * BLOCK_BYTES, BLOCK_BYTES) if first_block else b""
        if header[:100].rstrip(b"\0") != member or header[124:135] != b"%011o" % size_bytes:
            raise ValueError(f"{path}: doesn't match its index at {member.decode()}; run `facetrain pack` again")


def image_key(identity: int, image: int) -> str:
    """Return the WebDataset key of an identity's image number `image`."""
    return f"{identity:07d}_{image:04d}"


def load_writer() -> Any:
    """Import webdataset and return its tar writer.

    It imports torch, which takes seconds: reading shards doesn't need it, and a packer calls this before it forks.
    """
    import webdataset

    return webdataset.TarWriter


def write_shard(path: Path, samples: Iterable[tuple[str, bytes]]) -> None:
    """Write (key, JPEG) samples as a tar whose bytes depend on nothing else.

    No `.cls` member: it costs 1 KB a sample, and the key has the identity. With the writer's default time every member
    would get a PAX header, and no two packings would be equal.
    """
    owner = {"user": "facetrain", "group": "facetrain", "mode": 0o444}
    with open(path, "wb") as file, load_writer()(file, encoder=False, mtime=0, **owner) as tar:
        for key, jpeg in samples:
            tar.write({"__key__": key, "jpg": jpeg})


def read_shard(path: Path) -> Iterator[bytes]:
    """Yield the images of one shard, in its order, whatever their keys."""
    tar = FileSlices([path])
    for member in index_tar(path):
        yield tar.read(0, member.offset, member.size_bytes)


def index_shard(path: Path) -> tuple[list[int], npt.NDArray[np.uint32]]:
    """Index any tar with our keys by walking its headers.

    Returns:
        The identity of each image, and uint32 [images, 2]: first block of its data (in units of BLOCK_BYTES, so that
        tars may have 2 TiB), and its length in bytes.

    Raises:
        ValueError: The tar is truncated or holds something else; the message names it.
    """
    labels, places = [], []
    for member in index_tar(path):
        key = _KEY.fullmatch(member.name)
        if key is None or not member.is_file:
            raise ValueError(f"{path}: expected members like {image_key(0, 0)}.jpg, found '{member.name}'")
        labels.append(int(key[1]))
        places.append((member.offset // BLOCK_BYTES, member.size_bytes))
    return labels, np.array(places, dtype=np.uint32).reshape(-1, 2)


def sidecar_of(shard: Path) -> Path:
    """Return the path of a shard's own index."""
    return shard.with_suffix(".idx.npy")


def sha256_of(path: Path) -> str:
    """Return the checksum of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
