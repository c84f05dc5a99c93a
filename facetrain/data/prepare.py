"""One image on its way into a shard: is it whole, and what are its bytes there."""

import os
import re
import tempfile
from typing import Any

import cv2

from facetrain.data.align import FindPoints, align_face, similarity, why_not_aligned
from facetrain.data.decode import read_image
from facetrain.data.image_header import JPEG_START, exif_orientation, is_whole, stated_size, too_large
from facetrain.data.manifest import PackSettings
from facetrain.data.photograph import Photograph

_NO_IMAGE = "can't be decoded as an image"


def prepare_image(data: bytes, settings: PackSettings, find: FindPoints | None = None, name: str = "") -> bytes:
    """Turn an image file into the JPEG that goes into a shard.

    Args:
        data: A JPEG, PNG, BMP or WebP.
        settings: image_px, quality, copy, min_px and max_pixels.
        find: Finds the points by which a photograph is aligned; null takes images as they are.
        name: What `find` knows the image by.

    Returns:
        `data` itself where it is a JPEG of image_px x image_px already, isn't to be aligned, and is upright whether or
        not its EXIF data are heeded.

    Raises:
        ValueError: The image can't be used; the message is the reason alone.
    """
    _check(data, settings)
    if find is not None:
        return _encoded(_aligned(Photograph(data, name, settings.max_pixels), find), settings)
    image = _decoded(data)
    height, width = image.shape[:2]
    fits = height == width == settings.image_px and data.startswith(JPEG_START)
    orientation = exif_orientation(data) if fits else 1
    if fits and orientation == 1:
        return data
    if settings.copy:
        if fits:
            raise ValueError(f"turned: EXIF orientation {orientation}, but only an upright JPEG can be copied")
        expected = f"a JPEG of {settings.image_px}x{settings.image_px}"
        kind = "" if data.startswith(JPEG_START) else " and no JPEG"
        raise ValueError(f"doesn't fit: {width}x{height} pixels{kind}, but only {expected} can be copied")
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square, wanted = image[top : top + side, left : left + side], (settings.image_px, settings.image_px)
    # INTER_AREA averages what it shrinks; enlarging, it would only repeat pixels.
    method = cv2.INTER_AREA if side > settings.image_px else cv2.INTER_LINEAR
    return _encoded(cv2.resize(square, wanted, interpolation=method), settings)


def _check(data: bytes, settings: PackSettings) -> None:
    """Refuse what is cut off, too small or too large by what it says of itself; nothing is decoded for that."""
    if not data:
        raise ValueError("empty file")
    if not is_whole(data):
        raise ValueError("truncated: the end of the image is missing")
    if reason := too_large(data, settings.max_pixels):
        raise ValueError(reason)
    width, height = stated_size(data) or (0, 0)
    if width * height == 0:  # one that states no size would be decoded without a bound
        raise ValueError(_NO_IMAGE)
    if min(height, width) < settings.min_px:
        raise ValueError(f"too small: {width}x{height} pixels, the shorter side needs {settings.min_px}")


def _decoded(data: bytes) -> Any:
    """Return uint8 [H, W, 3], BGR."""
    try:
        return read_image(data, cv2.IMREAD_COLOR, "")
    except ValueError:
        raise ValueError(_NO_IMAGE) from None


def _aligned(photograph: Photograph, find: FindPoints) -> Any:
    """Move the face to the template; uint8 [112, 112, 3], BGR."""
    try:
        points = find(photograph)
        to_template = similarity(points) if points is not None else None
        face = align_face(photograph, to_template) if to_template is not None else None
    except ValueError:
        raise ValueError(_NO_IMAGE) from None
    except cv2.error as error:
        raise ValueError(why_not_aligned(error)) from None
    if points is None:
        raise ValueError("not aligned: no five points, or no face, found for it")
    if face is None:
        raise ValueError("not aligned: its five points determine no position")
    return cv2.cvtColor(face, cv2.COLOR_RGB2BGR)


def _encoded(image: Any, settings: PackSettings) -> bytes:
    encoded: bytes = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, settings.quality])[1].tobytes()
    return encoded


def capture_complaints() -> None:
    """Send this process's stderr to a file that `take_complaint` reads; for worker processes alone.

    libjpeg decodes what is left of a damaged image, and says so on stderr only, past Python.
    """
    with tempfile.TemporaryFile() as messages:
        os.dup2(messages.fileno(), 2)


def take_complaint() -> str | None:
    """Return the first message of damage that a decoder wrote since the last call, None where there is none."""
    size = os.fstat(2).st_size
    if size == 0:
        return None
    lines = os.pread(2, size, 0).decode(errors="replace").splitlines()
    os.ftruncate(2, 0)
    os.lseek(2, 0, os.SEEK_SET)
    return next((line.strip() for line in lines if re.search("corrupt|premature", line, re.IGNORECASE)), None)
