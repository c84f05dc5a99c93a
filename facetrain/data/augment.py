"""What training changes in a face, decided by one integer per image."""

from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from facetrain.config import DataConfig


class Augmentation(NamedTuple):
    """The changes that one image receives; the defaults change nothing."""

    mirrored: bool = False
    """Swap left and right."""
    shift_x_px: int = 0
    """Shard pixels by which the crop window moves to the right."""
    shift_y_px: int = 0
    """Shard pixels by which the crop window moves down."""
    brightness: float = 1.0
    """Factor on every value."""
    contrast: float = 1.0
    """Factor on every value's distance from the image's mean."""


def draw_augmentations(seeds: npt.NDArray[np.uint32], config: DataConfig) -> list[Augmentation]:
    """Draw the changes of many images at once; the same seed gives the same changes in any process and company.

    Args:
        seeds: From the plan, [images].
        config: mirror, crop_jitter_px and colour_jitter say which changes there are and how large they get.
    """
    where, light = _mix(seeds, 1), _mix(seeds, 2)
    positions, low_31, low_32 = np.uint64(2 * config.crop_jitter_px + 1), np.uint64(0x7FFFFFFF), np.uint64(0xFFFFFFFF)
    columns = (
        (where >> np.uint64(63)).astype(np.bool_) & config.mirror,
        ((where & low_31) % positions).astype(np.int64) - config.crop_jitter_px,
        ((where >> np.uint64(31) & low_31) % positions).astype(np.int64) - config.crop_jitter_px,
        1 + config.colour_jitter * ((light >> np.uint64(32)).astype(np.float64) / 2**31 - 1),
        1 + config.colour_jitter * ((light & low_32).astype(np.float64) / 2**31 - 1),
    )
    return [Augmentation(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def adjust_colour(image: npt.NDArray[np.uint8], brightness: float, contrast: float, out: npt.NDArray[np.uint8]) -> None:
    """Write round(brightness * (mean + contrast * (value - mean))), clipped to [0, 255], into `out`.

    Args:
        image: uint8 [H, W] or [H, W, C]. The mean is one number over all pixels and channels.
        brightness: Factor, 1 changes nothing.
        contrast: Factor, 1 changes nothing.
        out: Of the same shape; may be the image itself.
    """
    source: Any = image
    mean = cv2.norm(source, cv2.NORM_L1) / image.size  # the sum of all values, in half the time of cv2.mean
    # One pass of OpenCV that rounds and clips; its second image has weight 0.
    cv2.addWeighted(source, brightness * contrast, source, 0, brightness * mean * (1 - contrast), out)


def _mix(seeds: npt.NDArray[np.uint32], draw: int) -> npt.NDArray[np.uint64]:
    """Return 64 random bits of each seed, its `draw`-th, without starting a generator for each image.

    Source: SplitMix64, Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    bits = seeds.astype(np.uint64) + np.uint64(draw * 0x9E3779B97F4A7C15 % 2**64)
    bits = (bits ^ bits >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ bits >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return bits ^ bits >> np.uint64(31)
