"""Folders of small drawn images: a folder per identity, as people keep faces."""

import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

from facetrain.config import DataConfig
from facetrain.data.augment import draw_augmentations
from facetrain.data.decode import decode_augmented


def drawn_image(seed: int, height: int = 112, width: int = 112) -> npt.NDArray[np.uint8]:
    """A smooth random picture: compresses like a face, and no two are alike."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC), dtype=np.uint8)


def encoded(image: npt.NDArray[np.uint8], suffix: str = ".jpg") -> bytes:
    return bytes(cv2.imencode(suffix, image)[1].tobytes())


def turned_by_exif(jpeg: bytes, orientation: int, order: Literal["little", "big"] = "little") -> bytes:
    """A JPEG whose EXIF data say to turn it."""

    def number(value: int, size_bytes: int) -> bytes:
        return value.to_bytes(size_bytes, order)

    make = number(0x010F, 2) + number(2, 2) + number(1, 4) + bytes(4)
    field = number(0x0112, 2) + number(3, 2) + number(1, 4) + number(orientation, 2) + bytes(2)
    tiff = (b"II" if order == "little" else b"MM") + number(42, 2) + number(8, 4) + number(2, 2) + make + field
    exif = b"Exif\0\0" + tiff + bytes(4)
    return jpeg[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + jpeg[2:]


def augmented(data: bytes, config: DataConfig, seed: int, name: str = "a") -> npt.NDArray[np.uint8]:
    """One face as training is given it."""
    out = np.empty((config.image_px, config.image_px, config.channels), dtype=np.uint8)
    (change,) = draw_augmentations(np.array([seed], dtype=np.uint32), config)
    decode_augmented(data, config, change, name, out)
    return out


FaceFolder = Callable[[Mapping[str, int]], Path]


def write_faces(folder: Path, counts: Mapping[str, int]) -> Path:
    """A folder of identities with so many images each, 112x112 JPEG."""
    seed = 0
    for identity, count in counts.items():
        (folder / identity).mkdir(parents=True)
        for k in range(count):
            (folder / identity / f"{k:03d}.jpg").write_bytes(encoded(drawn_image(seed)))
            seed += 1
    return folder


def tar_of(folder: Path, path: Path, *, format: int = tarfile.PAX_FORMAT, arcname: str = "") -> Path:
    """A tar of a folder's content, as `tar -cf PATH -C FOLDER .` makes it."""
    with tarfile.open(path, "w", format=format) as tar:
        tar.add(folder, arcname=arcname or ".")
    return path
