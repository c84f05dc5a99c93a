"""The manifest of a folder of shards: what it holds and how it was packed."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from facetrain.data.image_header import MAX_PIXELS
from facetrain.whole_file import write_text

FORMAT = 1
"""Version of the folder's layout; readers refuse others."""
MANIFEST_FILE = "manifest.json"
ALIGNED_PX = 112
"""Side of an aligned face, in pixels."""
_COUNTS = ("identities", "images", "single_image_identities", "rejected_images", "dropped_identities")


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One shard, as the manifest describes it."""

    name: str
    """File name of the tar."""
    size_bytes: int
    """Size of the tar."""
    sha256: str
    """Checksum of the tar."""
    images: int
    """Images in it."""
    identities: int
    """Identities in it; none has images in another shard."""


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """What, besides the faces, decides the bytes of a packing."""

    image_px: int = 112
    """Side of the square images, in pixels."""
    quality: int = 92
    """JPEG quality of the images that are encoded anew, 1 to 100."""
    copy: bool = False
    """Nothing is encoded anew: what isn't an upright JPEG of image_px x image_px already is rejected."""
    alignment: str = ""
    """How photographs were aligned: `landmarks` or `detector`, and the file's sha256; empty where they weren't."""
    min_px: int = 16
    """Images whose shorter side has fewer pixels are rejected."""
    max_pixels: int = MAX_PIXELS
    """Images that state more pixels are rejected without being decoded."""
    min_images: int = 1
    """Identities with fewer usable images are left out."""
    max_images: int | None = None
    """Usable images of an identity, by name, beyond this many are left out; null takes all."""
    images_per_shard: int = 10_000
    """A shard is closed before the identity that would exceed it; shards are what packing does in parallel."""
    seed: int = 0
    """Seed of the identities' order."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        for name in ("image_px", "quality", "min_px", "max_pixels", "min_images", "images_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"pack: {name}: expected 1 or more, got {getattr(self, name)}")
        if self.quality > 100:
            raise ValueError(f"pack: quality: expected 1 to 100, got {self.quality}")
        if self.max_images is not None and self.max_images < self.min_images:
            raise ValueError(
                f"pack: max_images: expected min_images ({self.min_images}) or more, got {self.max_images}"
            )
        if self.alignment and (self.copy or self.image_px != ALIGNED_PX):
            given = "copy" if self.copy else f"image_px {self.image_px}"
            raise ValueError(f"pack: alignment makes new images of {ALIGNED_PX}x{ALIGNED_PX}, got {given}")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder of shards holds. Two packings of the same faces with the same settings are equal."""

    format: int
    """Version of the layout."""
    packer: str
    """Program and version that wrote it."""
    settings: PackSettings
    """How it was packed."""
    source_sha256: str
    """Fingerprint of the packed faces: their names and lengths."""
    identities: int
    """Number of identities."""
    images: int
    """Number of images."""
    single_image_identities: int
    """Identities with one image; they can't give a pair of different images."""
    rejected_images: int
    """Images of the source that rejected.jsonl lists."""
    dropped_identities: int
    """Identities of the source that rejected.jsonl lists: excluded, or with too few usable images."""
    shards: tuple[ShardInfo, ...]
    """The shards, in the order of their images."""
    index_sha256: str = ""
    """Checksum of class table and image index, one file after another; '' where an earlier version packed."""

    @property
    def image_px(self) -> int:
        """Side of the square images, in pixels."""
        return self.settings.image_px

    @property
    def size_bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.size_bytes for shard in self.shards)

    @property
    def content_sha256(self) -> str:
        """One checksum of all shards, whatever their folder is called."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    @property
    def sha256(self) -> str:
        """Checksum of all that it says about the faces, whichever version packed them."""
        content = asdict(self) | {"packer": ""}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write manifest.json, at once or not at all."""
        write_text(folder / MANIFEST_FILE, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read manifest.json.

        Raises:
            ValueError: The folder holds no shards, or those of another version; the message names it.
        """
        path = folder / MANIFEST_FILE
        if not path.is_file():
            lacks = "it has no manifest.json" if folder.is_dir() else "no such folder"
            raise ValueError(f"{folder}: no shards ({lacks}); `facetrain pack SOURCE {folder}` makes them")
        return cls.parse(path.read_bytes(), str(path))

    @classmethod
    def parse(cls, data: bytes, name: str) -> "Manifest":
        """Read the bytes of a manifest.json.

        Raises:
            ValueError: It is none, or one of another version; the message calls it `name`.
        """
        try:
            content = json.loads(data)
            found = content["format"]
            if found == FORMAT:
                shards = tuple(_shard(shard) for shard in content.pop("shards"))
                _check_counts(content, _COUNTS, "the manifest")
                return cls(settings=PackSettings(**content.pop("settings")), shards=shards, **content)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{name}: expected a manifest of facetrain shards, can't be read: {error}") from None
        raise ValueError(f"{name}: expected shard format {FORMAT}, got {found}; pack the source again")


def _shard(content: dict[str, Any]) -> ShardInfo:
    """Read a shard's entry. Its name and checksum become paths, and a manifest may come from anywhere."""
    shard = ShardInfo(**content)
    if not isinstance(shard.name, str) or Path(shard.name).name != shard.name:
        raise ValueError(f"expected a shard's name to be that of a file, got {shard.name!r}")
    if not isinstance(shard.sha256, str) or not re.fullmatch("[0-9a-f]{64}", shard.sha256):
        raise ValueError(f"expected the sha256 of {shard.name} to be 64 hexadecimal digits, got {shard.sha256!r}")
    _check_counts(content, ("size_bytes", "images", "identities"), shard.name)
    return shard


def _check_counts(content: dict[str, Any], names: Iterable[str], owner: str) -> None:
    for name in names:
        value = content[name]
        if type(value) is not int or value < 0:
            raise ValueError(f"expected {name} of {owner} to be a number from 0 on, got {value!r}")


def combined_sha256(paths: Iterable[Path]) -> str:
    """Return the checksum of the contents of several files, one after another."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
