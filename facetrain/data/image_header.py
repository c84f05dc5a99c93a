"""What the beginning of an image file says, without decoding it."""

from collections.abc import Iterator
from typing import Literal

JPEG_START, PNG_START = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"

MAX_PIXELS = 50_000_000
"""Images that state more aren't decoded, where nothing else is asked for: a small file can ask for gigabytes."""

_START_OF_SCAN = 0xDA
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of the segment with a JPEG's size, one for each way of coding."""
_APP1 = 0xE1
_ORIENTATION = 0x0112
"""Tag of EXIF; 1 is upright, 2 to 8 are the other ways to turn and mirror an image."""
_CORE_HEADER_BYTES = 12
"""Length of the BMP header of OS/2, whose numbers are shorter."""


def stated_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height in pixels that a JPEG, PNG, BMP or WebP states; None for anything else.

    Source: ITU-T T.81, the PNG specification, BITMAPINFOHEADER, RFC 9649 (WebP).
    """
    if data.startswith(JPEG_START):
        return _jpeg_size(data)
    if data.startswith(PNG_START) and len(data) >= 24:
        return _number(data, 16, 4, order="big"), _number(data, 20, 4, order="big")
    if data.startswith(b"BM") and len(data) >= 26:
        if _number(data, 14, 4) == _CORE_HEADER_BYTES:
            return _number(data, 18, 2), _number(data, 20, 2)
        # A negative height only says that the rows begin at the top.
        return _number(data, 18, 4), abs(_number(data, 22, 4, signed=True))
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP" and len(data) >= 30:
        return _webp_size(data)
    return None


def too_large(data: bytes, max_pixels: int = MAX_PIXELS) -> str | None:
    """Return why an image isn't decoded, where it states more than `max_pixels` pixels."""
    width, height = stated_size(data) or (0, 0)
    if width * height <= max_pixels:
        return None
    return f"too large: {width}x{height} pixels, more than {max_pixels:,} aren't decoded"


def is_whole(data: bytes) -> bool:
    """Whether a JPEG or PNG has its end mark; OpenCV 4 decodes a truncated one without complaint, half of it grey."""
    if data.startswith(PNG_START):
        return b"IEND" in data[-4096:]
    if not data.startswith(JPEG_START):
        return True
    # The segments before the scan are passed over: a thumbnail in them has an end mark of its own.
    return any(marker == _START_OF_SCAN and data.find(b"\xff\xd9", at) >= 0 for marker, at in _segments(data))


def exif_orientation(data: bytes) -> int:
    """Return how a JPEG's EXIF data say to turn and mirror it, 2 to 8; 1 where it is upright or they say nothing.

    Some decoders do so, OpenCV among them, and others don't, such as torchvision and nvJPEG. Source: Exif 2.3, 4.6.
    """
    if data.startswith(JPEG_START):
        for marker, at in _segments(data):
            if marker == _APP1 and data[at + 4 : at + 10] == b"Exif\0\0":
                orientation = _tiff_orientation(data[at + 10 : at + 2 + _number(data, at + 2, 2, order="big")])
                if orientation != 1:
                    return orientation
    return 1


def _tiff_orientation(tiff: bytes) -> int:
    order: Literal["little", "big"] = "big" if tiff.startswith(b"MM") else "little"
    fields = _number(tiff, 4, 4, order=order)
    for number in range(_number(tiff, fields, 2, order=order)):
        at = fields + 2 + 12 * number
        if at >= len(tiff):
            break
        if _number(tiff, at, 2, order=order) == _ORIENTATION:
            orientation = _number(tiff, at + 8, 2, order=order)
            return orientation if 1 < orientation <= 8 else 1
    return 1


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield marker and place of a JPEG's segments, up to the start of the first scan."""
    at = len(JPEG_START)
    while data[at : at + 1] == b"\xff" and at + 1 < len(data):
        marker = data[at + 1]
        if marker == 0xFF:  # filler
            at += 1
            continue
        yield marker, at
        if marker == _START_OF_SCAN:
            return
        at += 2 + _number(data, at + 2, 2, order="big")


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    for marker, at in _segments(data):
        if marker in _FRAMES:
            return _number(data, at + 7, 2, order="big"), _number(data, at + 5, 2, order="big")
    return None


def _webp_size(data: bytes) -> tuple[int, int] | None:
    match data[12:16]:
        case b"VP8 ":
            return _number(data, 26, 2) & 0x3FFF, _number(data, 28, 2) & 0x3FFF
        case b"VP8L":
            bits = _number(data, 21, 4)
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        case b"VP8X":
            return 1 + _number(data, 24, 3), 1 + _number(data, 27, 3)
    return None


def _number(
    data: bytes, at: int, size_bytes: int, *, order: Literal["little", "big"] = "little", signed: bool = False
) -> int:
    return int.from_bytes(data[at : at + size_bytes], order, signed=signed)
