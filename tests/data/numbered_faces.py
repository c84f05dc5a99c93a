"""Shards whose images tell their number by their colour, and damage to single images of shards."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from facetrain.data.manifest import Manifest
from facetrain.data.pack import pack
from facetrain.data.shards import ShardSet, sha256_of

SIDE_PX = 16


def numbered_shards(folder: Path, counts: Sequence[int]) -> ShardSet:
    """Identities with so many images, in several shards; `number_of` tells the images of the faces apart."""
    number = 0
    for person, count in enumerate(counts):
        (folder / f"faces/person{person:03d}").mkdir(parents=True)
        for k in range(count):
            colour = [32 * (number >> shift & 7) + 16 for shift in (0, 3, 6)]
            pixels = np.full((SIDE_PX, SIDE_PX, 3), colour, dtype=np.uint8)
            cv2.imwrite(str(folder / f"faces/person{person:03d}/{k}.png"), pixels[:, :, ::-1])
            number += 1
    assert number <= 512
    pack([folder / "faces"], folder / "shards", image_px=SIDE_PX, min_px=8, images_per_shard=20, workers=1)
    return ShardSet.open(folder / "shards")


def number_of(faces: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """uint8 [..., H, W, 3] -> the number under which each face was written."""
    digits = faces.reshape(*faces.shape[:-3], -1, 3).mean(axis=-2) // 32
    return (digits @ [1, 8, 64]).astype(np.int64)


def damage(shards: ShardSet, images: Sequence[int]) -> ShardSet:
    """Overwrite images in the tars, and put the tars' new checksums into the manifest."""
    for image in images:
        tar = Path(shards.where(image).partition(": ")[0])
        face = shards.read(image)
        tar.write_bytes(tar.read_bytes().replace(face, bytes(len(face)), 1))
    infos = tuple(replace(info, sha256=sha256_of(shards.folder / info.name)) for info in shards.manifest.shards)
    replace(shards.manifest, shards=infos).save(shards.folder)
    assert Manifest.load(shards.folder).shards == infos
    return ShardSet.open(shards.folder)
