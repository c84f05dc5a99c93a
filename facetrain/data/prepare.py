"""One image on its way into a shard: is it whole, and what are its bytes there."""

import os
import re
import tempfile
from typing import Any

import cv2
import numpy as np

from facetrain.data.align import FindPoints, align_face, similarity
from facetrain.data.image_header import JPEG_START, is_whole, stated_size
from facetrain.data.manifest import PackSettings


def prepare_image(data: bytes, settings: PackSettings, find: FindPoints | None = None, name: str = "") -> bytes:
    """Turn an image file into the JPEG that goes into a shard.

    Args:
        data: A JPEG, PNG, BMP or WebP.
        settings: image_px, quality, copy, min_px and max_pixels.
        find: Finds the points by which a photograph is aligned; null takes images as they are.
        name: What `find` knows the image by.

    Returns:
        `data` itself where it is a JPEG of image_px x image_px already and isn't to be aligned.

    Raises:
        ValueError: The image can't be used; the message is the reason alone.
    """
    image = _decoded(data, settings)
    height, width = image.shape[:2]
    if find is not None:
        return _encoded(_aligned(image, find, name), settings)
    if height == width == settings.image_px and data.startswith(JPEG_START):
        return data
    if settings.copy:
        expected = f"a JPEG of {settings.image_px}x{settings.image_px}"
        kind = "" if data.startswith(JPEG_START) else " and no JPEG"
        raise ValueError(f"doesn't fit: {width}x{height} pixels{kind}, but only {expected} can be copied")
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square, wanted = image[top : top + side, left : left + side], (settings.image_px, settings.image_px)
    # INTER_AREA averages what it shrinks; enlarging, it would only repeat pixels.
    method = cv2.INTER_AREA if side > settings.image_px else cv2.INTER_LINEAR
    return _encoded(cv2.resize(square, wanted, interpolation=method), settings)


def _decoded(data: bytes, settings: PackSettings) -> Any:
    """Return uint8 [H, W, 3], BGR, of an image that is whole and neither too small nor too large."""
    if not data:
        raise ValueError("empty file")
    if not is_whole(data):
        raise ValueError("truncated: the end of the image is missing")
    # What it says of itself is looked at first: a small file can ask for gigabytes of memory.
    width, height = stated_size(data) or (0, 0)
    if width * height > settings.max_pixels:
        raise ValueError(f"too large: {width}x{height} pixels, more than {settings.max_pixels:,} aren't decoded")
    try:
        # What states no size is in a form that isn't offered: it would be decoded without a bound.
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if width * height else None
    except cv2.error:  # beyond OpenCV's limits of size
        image = None
    if image is None:
        raise ValueError("can't be decoded as an image")
    height, width = image.shape[:2]
    if min(height, width) < settings.min_px:
        raise ValueError(f"too small: {width}x{height} pixels, the shorter side needs {settings.min_px}")
    return image


def _aligned(photograph: Any, find: FindPoints, name: str) -> Any:
    """Move the face to the template; uint8 [112, 112, 3] of the photograph's colours."""
    points = find(cv2.cvtColor(photograph, cv2.COLOR_BGR2RGB), name)
    if points is None:
        raise ValueError("not aligned: no five points, or no face, found for it")
    to_template = similarity(points)
    if to_template is None:
        raise ValueError("not aligned: its five points determine no position")
    return align_face(photograph, to_template)


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
