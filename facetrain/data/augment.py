"""What training changes in a face, decided by one integer per image."""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from facetrain.config import DataConfig


@dataclass(frozen=True, kw_only=True)
class Augmentation:
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


def draw_augmentation(seed: int, config: DataConfig) -> Augmentation:
    """Draw the changes of one image; the same seed gives the same changes in any process.

    Args:
        seed: From the plan, in [0, 2**32).
        config: mirror, crop_jitter_px and colour_jitter say which changes there are and how large they get.
    """
    where, light = _mix(seed, 1), _mix(seed, 2)
    positions = 2 * config.crop_jitter_px + 1
    return Augmentation(
        mirrored=config.mirror and bool(where >> 63),
        shift_x_px=(where & 0x7FFFFFFF) % positions - config.crop_jitter_px,
        shift_y_px=(where >> 31 & 0x7FFFFFFF) % positions - config.crop_jitter_px,
        brightness=1 + config.colour_jitter * ((light >> 32) / 2**31 - 1),
        contrast=1 + config.colour_jitter * ((light & 0xFFFFFFFF) / 2**31 - 1),
    )


def adjust_colour(image: npt.NDArray[np.uint8], brightness: float, contrast: float) -> npt.NDArray[np.uint8]:
    """Return round(brightness * (mean + contrast * (value - mean))), clipped to [0, 255].

    Args:
        image: uint8 [H, W] or [H, W, C]. The mean is one number over all pixels and channels.
        brightness: Factor, 1 changes nothing.
        contrast: Factor, 1 changes nothing.
    """
    channels = 1 if image.ndim == 2 else image.shape[2]
    mean = sum(cv2.mean(image)[:channels]) / channels
    # One pass of OpenCV that rounds and clips; its second image has weight 0.
    adjusted: Any = cv2.addWeighted(image, brightness * contrast, image, 0, brightness * mean * (1 - contrast))
    return adjusted  # type: ignore[no-any-return]


def _mix(seed: int, draw: int) -> int:
    """Return 64 random bits, the `draw`-th of this seed: 1 us, where starting a numpy generator takes 10.

    Source: SplitMix64, Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    bits = (seed + draw * 0x9E3779B97F4A7C15) & _MASK_64
    bits = ((bits ^ bits >> 30) * 0xBF58476D1CE4E5B9) & _MASK_64
    bits = ((bits ^ bits >> 27) * 0x94D049BB133111EB) & _MASK_64
    return bits ^ bits >> 31


_MASK_64 = (1 << 64) - 1
