"""Shards: WebDataset tars of faces, their manifest, and reads of single images by number.

Sole importer of webdataset, whose writer makes the tars. A folder of shards, here or elsewhere, holds

    shard-000000.tar          members 0000000_0000.jpg: identity (row of the class table), image of that identity
    shard-000000.idx.npy      where each image lies in that tar
    class_*.npy, images.npy   class table and the indexes of all shards, merged, mapped into memory by every reader
    manifest.json             counts, sizes and checksums
"""

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from facetrain.config import DataConfig
from facetrain.data.cache import ShardCache
from facetrain.data.cached import CachedSlices
from facetrain.data.index import BLOCK_BYTES, TABLE_FILES, ClassTable, FileSlices, index_tar, with_name
from facetrain.data.manifest import Manifest, combined_sha256
from facetrain.data.places import ImagePlaces
from facetrain.data.remote import RemoteFolder

log = logging.getLogger(__name__)

IMAGES_FILE = "images.npy"
"""The places of all shards' images; see `ImagePlaces`."""
INDEX_FILES = (*TABLE_FILES, IMAGES_FILE)
"""The files beside the manifest that a reader needs; the manifest has their checksum."""

_KEY = re.compile(r"(\d{7,})_(\d{4,})\.jpg")


@dataclass(frozen=True, eq=False)
class ShardSet:
    """A folder of shards, open for reads of single images; safe over threads and forks, and can be pickled."""

    folder: Path
    """The folder with manifest and index, and with the shards where they are no remote ones."""
    cache: ShardCache | None
    """What fetches the shards from elsewhere; None where they are in the folder."""
    manifest: Manifest
    """Counts, sizes and checksums."""
    table: ClassTable
    """The identities and which images are theirs."""
    places: ImagePlaces
    """Where each image lies."""
    held: tuple[int, ...]
    """Numbers of the shards that can be read: all, unless the set was opened as a part of one."""
    _may_lack: bool
    _tars: FileSlices

    @classmethod
    def open(cls, folder: Path, cache: ShardCache | None = None, *, may_lack: bool = False) -> "ShardSet":
        """Open a folder that `facetrain pack` made; checks files and sizes, reads no image.

        Args:
            folder: Holds manifest and index.
            cache: Where the shards are; those that are missing are fetched, all of them at once if they fit. None:
                in the folder.
            may_lack: The folder may lack shards, which are never read then; `held` says which it has.

        Raises:
            ValueError: The folder or a shard is missing, a shard is truncated, or an index doesn't match its tar; the
                message names the file.
        """
        manifest = Manifest.load(folder)
        is_whole = cache is None or cache.keeps(manifest)
        if cache is None:
            tars = FileSlices([folder / shard.name for shard in manifest.shards])
        else:
            tars = CachedSlices(cache, manifest.shards, keep_open=is_whole)
        places = ImagePlaces.load(folder / IMAGES_FILE, [shard.images for shard in manifest.shards])
        held = tuple(i for i, path in enumerate(tars.paths) if not may_lack or path.is_file())
        shards = cls(folder, cache, manifest, ClassTable.load(folder), places, held, may_lack, tars)
        shards._check_counts()
        if cache is None:
            shards._check_sizes()
        elif is_whole:
            cache.fetch(manifest.shards, progress=os.environ.get("LOCAL_RANK", "0") == "0")
        if is_whole:
            shards._check_headers()
        return shards

    @property
    def place(self) -> str:
        """Where the shards come from, for messages."""
        return str(self.folder) if self.cache is None else self.cache.remote.shown("")

    def read(self, image: int) -> bytes:
        """Return the JPEG of image number `image`, 0 to table.num_images - 1.

        Raises:
            IndexError: There is no such image.
            ValueError: The shard ends before the image does; the message names the shard.
        """
        if not 0 <= image < self.places.num_images:
            raise IndexError(f"image {image} of {self.place}, which holds {self.places.num_images}")
        return self._tars.read(*self.places.locate(image))

    def read_all(self, images: npt.NDArray[np.int64]) -> list[bytes]:
        """Return the JPEGs of many images that there are; raises as `read`."""
        return [self._tars.read(*place) for place in self.places.locate_all(images)]

    def where(self, image: int) -> str:
        """Return shard and member of an image, for messages."""
        name = self.manifest.shards[self.places.shard_of(image)].name
        shard = self.folder / name if self.cache is None else self.cache.remote.shown(name)
        return f"{shard}: {self._member(image)}"

    def verify(self) -> None:
        """Read every byte and compare checksums, keys and indexes; minutes for a large set.

        Raises:
            ValueError: A shard, class table or index differs from what was packed; the message names it.
        """
        for shard, (info, path) in enumerate(zip(self.manifest.shards, self._tars.paths, strict=True)):
            if self.cache is not None:
                self.cache.fetch([info], progress=False)
            if sha256_of(path) != info.sha256:
                raise ValueError(
                    f"{path}: its sha256 isn't that of the manifest; `facetrain pack`, run again, repairs it"
                )
            labels, places = index_shard(path)
            images = self.places.images_of(shard)
            found = [(self.table.identity_of(image), *self.places.locate(image)[1:]) for image in images]
            offsets, sizes = (places * np.array([BLOCK_BYTES, 1])).T.tolist()
            if found != list(zip(labels, offsets, sizes, strict=True)):
                raise ValueError(f"{self.folder / IMAGES_FILE}: doesn't match {path}; run `facetrain pack` again")
        expected = self.manifest.index_sha256
        # '' where an earlier version packed. A name in another's place shows nowhere else.
        if expected and combined_sha256(self.folder / name for name in INDEX_FILES) != expected:
            raise ValueError(
                f"{self.folder}: its class table or image index hasn't the sha256 of the manifest; `facetrain pack`,"
                " run again, repairs it"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        # A mapped array would be pickled as a copy of its content.
        return partial(ShardSet.open, may_lack=self._may_lack), (self.folder, self.cache)

    def _member(self, image: int) -> str:
        label = self.table.identity_of(image)
        return image_key(label, image - int(self.table.first_image[label])) + ".jpg"

    def _check_counts(self) -> None:
        images, table = self.manifest.images, self.table
        if (table.num_images, table.num_identities) != (images, self.manifest.identities):
            raise ValueError(f"{self.folder}: index and manifest differ in their counts; run `facetrain pack` again")

    def _check_sizes(self) -> None:
        for shard in self.held:
            info, path = self.manifest.shards[shard], self._tars.paths[shard]
            found = path.stat().st_size if path.is_file() else None
            if found is None:
                raise ValueError(f"{path}: shard is missing; `facetrain pack`, run again, repairs it")
            if found != info.size_bytes:
                kind = "truncated shard" if found < info.size_bytes else "not the shard that was packed"
                raise ValueError(f"{path}: {kind}: expected {info.size_bytes} bytes, found {found}")

    def _check_headers(self) -> None:
        for shard in self.held:
            images = self.places.images_of(shard)
            for image in {images[0], images[-1]}:
                self._check_header(image)

    def _check_header(self, image: int) -> None:
        """Compare an index entry with the tar's own header, which lies before the image."""
        shard, offset_bytes, size_bytes = self.places.locate(image)
        path, member = self._tars.paths[shard], self._member(image).encode()
        header = self._tars.read(shard, offset_bytes - BLOCK_BYTES, BLOCK_BYTES)
        if header[:100].rstrip(b"\0") != member or header[124:135] != b"%011o" % size_bytes:
            raise ValueError(f"{path}: doesn't match its index at {member.decode()}; run `facetrain pack` again")


def open_shards(config: DataConfig) -> ShardSet:
    """Open `data.shards`, a folder here or elsewhere.

    Raises:
        ValueError: It can't be had, or isn't a folder of shards; the message names the file or URL.
    """
    if not config.is_remote:
        return ShardSet.open(Path(config.shards), may_lack=config.partitioned)
    assert config.cache_dir is not None  # the config checks it
    remote = RemoteFolder(url=config.shards, timeout_s=config.fetch_timeout_s, attempts=config.fetch_attempts)
    windowed = config.window_shards is not None
    cache = ShardCache(Path(config.cache_dir), config.cache_bytes, remote, windowed)
    shards = ShardSet.open(cache.fetch_tables(INDEX_FILES), cache)
    if not windowed and not cache.keeps(shards.manifest):
        log.warning(
            f"data.cache_bytes: {cache.max_bytes} bytes hold a part of the {shards.manifest.size_bytes} bytes of"
            f" {shards.place}: batches are drawn from all shards, so most images wait for a shard to be fetched"
        )
    return shards


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
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise with_name(error, path) from None
