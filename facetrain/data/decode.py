"""From the bytes of a shard image to the pixels that the network sees, with and without augmentation."""

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from facetrain.config import DataConfig
from facetrain.data.augment import Augmentation, adjust_colour
from facetrain.data.image_header import too_large


def decode_face(data: bytes, config: DataConfig, name: str) -> npt.NDArray[np.uint8]:
    """Decode one face as evaluation sees it: the centre crop, unchanged.

    Args:
        data: A JPEG or anything else that OpenCV reads. What isn't shard_px x shard_px is
            cut to its centre square and resized to that.
        config: shard_px, crop_px, image_px and colour.
        name: How an error calls the image.

    Returns:
        uint8 [image_px, image_px, C]; RGB order where C = 3.

    Raises:
        ValueError: The bytes are no image, or one that states more than MAX_PIXELS pixels.
    """
    _check_pixels(data, name)
    return _presented(_decode(data, config, name), config)


def decode_augmented(
    data: bytes, config: DataConfig, change: Augmentation, name: str, out: npt.NDArray[np.uint8]
) -> None:
    """Decode one face as training sees it: moved, mirrored and recoloured.

    Args:
        data: See `decode_face`.
        config: As for `decode_face`.
        change: What `draw_augmentations` drew for it; the default gives what `decode_face` does.
        name: How an error calls the image.
        out: uint8 [image_px, image_px, C], where the face is written to: an image of a batch, without a copy between.

    Raises:
        ValueError: The bytes are no image; `out` is untouched then.
    """
    _present(_decode(data, config, name), config, change, out)


def read_image(data: bytes, flag: int, name: str) -> Any:
    """Decode an image file as it is; `flag` is OpenCV's.

    Raises:
        ValueError: The bytes are no image.
    """
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    except cv2.error:  # an empty buffer, or an image beyond OpenCV's size limits; other bytes give None
        image = None
    if image is None:
        raise ValueError(f"{name}: expected an image, got {len(data)} bytes that can't be decoded")
    return image


def present_face(face: npt.NDArray[np.uint8], config: DataConfig) -> npt.NDArray[np.uint8]:
    """Turn a face that is already in memory, as alignment leaves it, into what the network sees.

    Args:
        face: uint8 [H, W, 3], RGB.
        config: As for `decode_face`.

    Returns:
        As `decode_face`.
    """
    image = face if config.colour == "rgb" else cv2.cvtColor(face, cv2.COLOR_RGB2GRAY)
    return _presented(_resized(image, config.shard_px), config)


def thumbnail(data: bytes, side_px: int, name: str) -> bytes:
    """Return an image as a small square JPEG for a person to look at: its centre, in colour, without metadata.

    Args:
        data: Anything that OpenCV reads.
        side_px: Side of the square.
        name: How an error calls the image.

    Raises:
        ValueError: As `decode_face`.
    """
    _check_pixels(data, name)
    square = _resized(read_image(data, cv2.IMREAD_COLOR, name), side_px)
    return bytes(cv2.imencode(".jpg", square)[1].tobytes())


_UNCHANGED = Augmentation()


def _check_pixels(data: bytes, name: str) -> None:
    """Refuse an image by the size that it states; those of shards need no look, packing had one."""
    if reason := too_large(data):
        raise ValueError(f"{name}: {reason}")


def _decode(data: bytes, config: DataConfig, name: str) -> Any:
    """Return uint8 [shard_px, shard_px, 3], or [shard_px, shard_px] for grey, which JPEG decodes at once."""
    flag = cv2.IMREAD_COLOR_RGB if config.colour == "rgb" else cv2.IMREAD_GRAYSCALE
    return _resized(read_image(data, flag, name), config.shard_px)


def _presented(image: Any, config: DataConfig) -> npt.NDArray[np.uint8]:
    out = np.empty((config.image_px, config.image_px, config.channels), dtype=np.uint8)
    _present(image, config, _UNCHANGED, out)
    return out


def _present(image: Any, config: DataConfig, change: Augmentation, out: Any) -> None:
    """Take the crop window, bring it to image_px, and write it to `out` with the rest of the change."""
    if image.ndim == 2:
        out = out[:, :, 0]
    side = config.crop_px or config.shard_px
    corner = (config.shard_px - side) // 2
    image = _window(image, corner + change.shift_x_px, corner + change.shift_y_px, side)
    image = _resized(image, config.image_px)
    recolours = change.brightness != 1 or change.contrast != 1
    # Each step writes to `out` itself, so that no image is copied just to get there.
    if change.mirrored:
        cv2.flip(image, 1, out)
        image = out
    if recolours:
        adjust_colour(image, change.brightness, change.contrast, out)
    elif not change.mirrored:
        out[:] = image


def _window(image: Any, left: int, top: int, side: int) -> Any:
    """Return a square window of an image; what lies beyond the border is its reflection."""
    over = (max(-top, 0), max(top + side - image.shape[0], 0), max(-left, 0), max(left + side - image.shape[1], 0))
    if any(over):
        image = cv2.copyMakeBorder(image, *over, cv2.BORDER_REFLECT_101)
    top, left = top + over[0], left + over[2]
    return image[top : top + side, left : left + side]


def _resized(image: Any, side: int) -> Any:
    """Resize to a square; what isn't square is cut to its centre square first, as packing does."""
    height, width = image.shape[:2]
    if height == width == side:
        return image
    short = min(height, width)
    square = image[(height - short) // 2 :, (width - short) // 2 :][:short, :short]
    # INTER_AREA averages what it shrinks; enlarging, it would only repeat pixels.
    return cv2.resize(square, (side, side), interpolation=cv2.INTER_AREA if short > side else cv2.INTER_LINEAR)
