"""Sizes that images state, beside those that a decoder finds."""

from typing import Literal

import cv2
import numpy as np
import pytest
from drawn_faces import drawn_image, encoded, turned_by_exif

from facetrain.data.image_header import exif_orientation, stated_size


@pytest.mark.parametrize(("width", "height"), [(1, 1), (17, 300), (641, 2)])
def test_every_form_states_its_size(width: int, height: int) -> None:
    image = drawn_image(1, height, width)
    with_alpha = np.dstack([image, image[..., 0]])
    forms = {
        "JPEG": encoded(image),
        "progressive JPEG": bytes(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1]),
        "grey JPEG": encoded(image[..., 0]),
        "PNG": encoded(image, ".png"),
        "BMP": encoded(image, ".bmp"),
        "WebP": bytes(cv2.imencode(".webp", image, [cv2.IMWRITE_WEBP_QUALITY, 80])[1]),
        "lossless WebP": bytes(cv2.imencode(".webp", image, [cv2.IMWRITE_WEBP_QUALITY, 101])[1]),
        "extended WebP": bytes(cv2.imencode(".webp", with_alpha, [cv2.IMWRITE_WEBP_QUALITY, 80])[1]),
    }
    assert [forms[f"{kind}WebP"][12:16] for kind in ("", "lossless ", "extended ")] == [b"VP8 ", b"VP8L", b"VP8X"]
    assert {form: stated_size(data) for form, data in forms.items()} == dict.fromkeys(forms, (width, height))


def test_a_bitmap_from_the_top_and_one_of_os2_state_their_size() -> None:
    data = bytearray(encoded(drawn_image(1, 30, 20), ".bmp"))
    data[22:26] = (-30).to_bytes(4, "little", signed=True)
    assert stated_size(bytes(data)) == (20, 30)
    core = (12).to_bytes(4, "little") + (20).to_bytes(2, "little") + (30).to_bytes(2, "little")
    assert stated_size(b"BM" + bytes(12) + core + bytes(4)) == (20, 30)


def test_what_is_cut_short_or_something_else_states_none() -> None:
    for suffix in (".jpg", ".png", ".bmp", ".webp"):
        data = encoded(drawn_image(1), suffix)
        for size in range(20):
            assert stated_size(data[:size]) is None
    for data in (b"", b"text", b"GIF89a" + bytes(100), b"\xff\xd8" + b"\xff" * 100, b"\xff\xd8\xff\xe0\x00\x00" * 50):
        assert stated_size(data) is None


@pytest.mark.parametrize("order", ["little", "big"])
def test_the_orientation_of_exif_is_read(order: Literal["little", "big"]) -> None:
    face = encoded(drawn_image(1))
    for orientation in range(1, 9):
        data = turned_by_exif(face, orientation, order)
        assert exif_orientation(data) == orientation
    for data in (
        face,
        turned_by_exif(face, 0, order),
        turned_by_exif(face, 9, order),
        b"",
        b"\xff\xd8\xff\xe1\0\x08Exif",
    ):
        assert exif_orientation(data) == 1
    for end in range(30):
        assert exif_orientation(turned_by_exif(face, 6, order)[:end]) == 1
