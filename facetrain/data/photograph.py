"""A photograph, decoded no larger than its use needs: a JPEG of half the side takes a fifth of the time."""

import cv2
import numpy as np
from numpy.typing import NDArray

from facetrain.data.decode import read_image
from facetrain.data.image_header import JPEG_START, MAX_PIXELS, stated_size, too_large

Image = NDArray[np.uint8]
"""uint8 [H, W, 3], RGB."""

_FLAGS = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
"""OpenCV's name of each reduction; there is none in RGB order."""
REDUCTIONS = tuple(_FLAGS)
"""By what the sides of a photograph can be divided while it is decoded."""


class Photograph:
    """An image file or the pixels of one, and its name."""

    def __init__(self, source: bytes | Image, name: str, max_pixels: int = MAX_PIXELS) -> None:
        """Decode nothing yet.

        Args:
            source: The bytes of a file, or uint8 [H, W, 3], RGB.
            name: How errors and lists of points call it.
            max_pixels: A file that states more isn't decoded.
        """
        self.name = name
        self._source = source
        self._max_pixels = max_pixels
        self._decoded: dict[int, Image] = {1: source} if isinstance(source, np.ndarray) else {}

    def pixels(self, reduction: int = 1) -> Image:
        """Return it with sides divided by one of REDUCTIONS, uint8 [H, W, 3], RGB; each pixel an average.

        Raises:
            ValueError: The bytes are no image, or one of too many pixels; the message has the name.
        """
        if reduction not in self._decoded:
            self._decoded[reduction] = self._reduced(reduction)
        return self._decoded[reduction]

    def reduction_to(self, side_px: int) -> int:
        """Return the largest reduction that leaves the longer side `side_px`; 1 for a file that states no size."""
        source = self._source
        size = source.shape[:2] if isinstance(source, np.ndarray) else stated_size(source) or (0, 0)
        return max((reduction for reduction in REDUCTIONS if max(size) >= reduction * side_px), default=1)

    def _reduced(self, reduction: int) -> Image:
        if reduction > 1 and not (isinstance(self._source, bytes) and self._source.startswith(JPEG_START)):
            # OpenCV reduces other files by taking some of their pixels.
            return scaled(self.pixels(), 1 / reduction, cv2.INTER_AREA)
        assert isinstance(self._source, bytes)  # pixels are there in full from the start
        if reason := too_large(self._source, self._max_pixels):
            raise ValueError(f"{self.name}: {reason}")
        image = read_image(self._source, _FLAGS[reduction], self.name)
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, image)  # type: ignore[no-any-return]


def scaled(image: Image, scale: float, method: int) -> Image:
    """Multiply both sides by `scale`, at most 1, and leave each a pixel at least; `method` is OpenCV's."""
    height, width = image.shape[:2]
    return cv2.resize(image, None, None, max(scale, 1 / width), max(scale, 1 / height), method)  # type: ignore[return-value]
