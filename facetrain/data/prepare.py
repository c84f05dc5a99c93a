"""One image on its way into a shard: is it whole, and what are its bytes there."""

import os
import re
import tempfile

import cv2
import numpy as np

from facetrain.data.manifest import PackSettings


def prepare_image(data: bytes, settings: PackSettings) -> bytes:
    """Turn an image file into the JPEG that goes into a shard.

    Args:
        data: A JPEG, PNG, BMP or WebP.
        settings: image_px, quality and min_px.

    Returns:
        `data` itself where it is a JPEG of image_px x image_px already.

    Raises:
        ValueError: The image can't be used; the message is the reason alone.
    """
    if not data:
        raise ValueError("empty file")
    if not _is_whole(data):
        raise ValueError("truncated: the end of the image is missing")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:  # beyond OpenCV's limits of size
        image = None
    if image is None:
        raise ValueError("can't be decoded as an image")
    height, width = image.shape[:2]
    side, wanted = min(height, width), settings.image_px
    if side < settings.min_px:
        raise ValueError(f"too small: {width}x{height} pixels, the shorter side needs {settings.min_px}")
    if height == width == wanted and data.startswith(_JPEG_START):
        return data
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side]
    # INTER_AREA averages what it shrinks; enlarging, it would only repeat pixels.
    square = cv2.resize(square, (wanted, wanted), interpolation=cv2.INTER_AREA if side > wanted else cv2.INTER_LINEAR)
    encoded: bytes = cv2.imencode(".jpg", square, [cv2.IMWRITE_JPEG_QUALITY, settings.quality])[1].tobytes()
    return encoded


_JPEG_START, _PNG_START = b"\xff\xd8", b"\x89PNG"


def _is_whole(data: bytes) -> bool:
    """Whether a JPEG or PNG has its end mark; OpenCV 4 decodes a truncated one without complaint, half of it grey."""
    if data.startswith(_PNG_START):
        return b"IEND" in data[-4096:]
    if not data.startswith(_JPEG_START):
        return True
    at = 2
    # The segments before the scan are passed over by their length: a thumbnail in them has an end mark of its own.
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":
        is_filler = data[at + 1 : at + 2] == b"\xff"
        at += 1 if is_filler else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data.find(b"\xff\xd9", at) >= 0


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
