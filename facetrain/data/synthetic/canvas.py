"""Where a face is drawn and how it becomes a photograph: pose, background, light and camera.

Coordinates are head units (see traits): x to the image's right, y down, z towards the viewer; curves are float64
[P, 2]. Colours and images are RGB.
"""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from facetrain.data.synthetic.traits import Capture, Colour, Traits, jitter

Points = NDArray[np.float64]
Image = NDArray[np.uint8]

OVERSAMPLING = 2
"""Drawings are made at this many times the final size."""
WHITE: Colour = (246, 244, 240)
DARK: Colour = (30, 22, 24)
U = np.linspace(-1.0, 1.0, 21)
"""The parameter of curves that run from left to right."""

_ANGLES = np.linspace(0.0, 2 * np.pi, 32, endpoint=False)
CIRCLE: Points = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)

_FIXED_BITS = 4  # cv2 draws at fixed-point coordinates: 1/16 of a pixel


class Canvas:
    """An image at OVERSAMPLING times its final size, and the pose by which head units are projected onto it.

    Features lie on an ellipsoid that turns with the pose; the silhouette keeps its shape and only leans.
    """

    def __init__(self, traits: Traits, capture: Capture, image: Image) -> None:
        side_px = image.shape[0]
        self.image = image
        self.head_width = traits.head_width
        self.scale_px = 0.292 * side_px * capture.zoom
        self.centre_px = side_px / 2 + np.array([capture.shift_x, capture.shift_y + 0.06]) * self.scale_px
        cos_roll, sin_roll = np.cos(capture.roll_rad), np.sin(capture.roll_rad)
        self.roll = np.array([[cos_roll, sin_roll], [-sin_roll, cos_roll]])
        self.sin_yaw, self.cos_yaw = float(np.sin(capture.yaw_rad)), float(np.cos(capture.yaw_rad))
        self.sin_pitch, self.cos_pitch = float(np.sin(capture.pitch_rad)), float(np.cos(capture.pitch_rad))

    def turn(self, points: Points, lift: float | Points = 0.0) -> Points:
        """Turn points on the face, `lift` (one, or one per point) before its surface; [P, 2] -> [P, 2]."""
        x, y = points[:, 0], points[:, 1]
        z = 0.8 * np.sqrt(np.clip(1 - (x / (1.1 * self.head_width)) ** 2 - (y / 1.45) ** 2, 0.0, None)) + lift
        turned_z = z * self.cos_yaw - x * self.sin_yaw
        turned_y = y * self.cos_pitch - 0.8 * turned_z * self.sin_pitch
        return np.stack([x * self.cos_yaw + z * self.sin_yaw, turned_y], axis=1)

    def lean(self, points: Points) -> Points:
        """Move points of the silhouette: the chin goes with the turn, the skull a little against it."""
        y = points[:, 1]
        x = points[:, 0] + self.sin_yaw * 0.32 * np.clip(y, -0.25, 1.0)
        return np.stack([x, y - self.sin_pitch * (0.22 + 0.15 * y)], axis=1)

    def fill(self, points: Points, colour: Colour) -> None:
        """Fill a closed curve of turned or leaning points."""
        cv2.fillPoly(self.image, [self._pixels(points)], colour, cv2.LINE_AA, _FIXED_BITS)

    def stroke(self, points: Points, colour: Colour, width: float, *, closed: bool = False) -> None:
        """Draw a curve of turned or leaning points, `width` wide."""
        width_px = max(1, round(width * self.scale_px))
        cv2.polylines(self.image, [self._pixels(points)], closed, colour, width_px, cv2.LINE_AA, _FIXED_BITS)

    def dot(self, point: Points, radius: float, colour: Colour) -> None:
        """Fill a circle about one turned or leaning point, [1, 2]."""
        self.fill(point + radius * CIRCLE, colour)

    def _pixels(self, points: Points) -> NDArray[np.int32]:
        at_px: Points = points @ self.roll * self.scale_px + self.centre_px
        return np.round(at_px * (1 << _FIXED_BITS)).astype(np.int32)


def curve(x: Any, y: Any) -> Points:
    """Return the points (x, y) as [P, 2]; either may be one number."""
    return np.stack(np.broadcast_arrays(np.asarray(x, np.float64), np.asarray(y, np.float64)), axis=1)


def loop(x: Points, upper: Any, lower: Any) -> Points:
    """Return the closed curve between two functions of x, [2P, 2]."""
    return np.concatenate([curve(x, upper), curve(x, lower)[::-1]])


def silhouette(traits: Traits, angles: Points) -> Points:
    """Return points of the head's outline; angle 0 is at the image's right, pi / 2 at the chin."""
    cos, sin = np.cos(angles), np.sin(angles)
    below = np.clip(sin, 0, None)
    power = np.where(sin > 0, 1 + (traits.jaw_squareness - 0.9) * below, 0.92)
    narrowing = 1 - (1 - traits.jaw_width) * below**1.6 * 0.75
    x = traits.head_width * np.sign(cos) * np.abs(cos) ** power * narrowing
    return curve(x, np.where(sin > 0, traits.jaw_height, traits.skull_height) * sin)


def background(side_px: int, rng: np.random.Generator) -> Image:
    """Return a blurred room, uint8 [side_px, side_px, 3]: a gradient and a few shapes, drawn small and enlarged."""
    small_px = max(16, side_px // 5)
    ends = [jitter((v, v, v), 100, rng) for v in rng.uniform(25, 235, 2)]
    ramp = np.linspace(0, 1, small_px)[:, None, None]
    image = (np.array(ends[0]) * (1 - ramp) + np.array(ends[1]) * ramp + np.zeros((1, small_px, 1))).astype(np.uint8)
    if rng.random() < 0.5:
        image = np.ascontiguousarray(image.transpose(1, 0, 2))
    for _ in range(int(rng.integers(1, 7))):
        colour = jitter(ends[int(rng.integers(2))], 100, rng)
        corner, size = rng.uniform(-0.2, 1.0, 2) * small_px, rng.uniform(0.1, 0.7, 2) * small_px
        if rng.random() < 0.5:
            cv2.rectangle(image, corner.astype(int).tolist(), (corner + size).astype(int).tolist(), colour, -1)
        else:
            cv2.circle(image, corner.astype(int).tolist(), int(size[0] / 2) + 1, colour, -1, cv2.LINE_AA)
    enlarged = cv2.resize(cv2.blur(image, (3, 3)), (side_px, side_px), interpolation=cv2.INTER_LINEAR)
    return enlarged.astype(np.uint8, copy=False)


def photograph(canvas: Canvas, capture: Capture, image_px: int, rng: np.random.Generator) -> Image:
    """Reduce the drawing, light it as an ellipsoid, then exposure, white balance, saturation, blur and noise.

    Returns:
        uint8 [image_px, image_px, 3], RGB.
    """
    pixels = cv2.resize(canvas.image, (image_px, image_px), interpolation=cv2.INTER_AREA).astype(np.float32)
    at_px = (np.arange(image_px) + 0.5) * OVERSAMPLING
    x = ((at_px - canvas.centre_px[0]) / canvas.scale_px).astype(np.float32)[None, :]
    y = ((at_px - canvas.centre_px[1]) / canvas.scale_px).astype(np.float32)[:, None]
    radius = np.sqrt(x * x + (y / 1.3) ** 2)
    outside = np.maximum(radius, 1.0)
    facing = np.sqrt(np.maximum(1 - radius**2, 0))
    shade = 1 + capture.light_strength * (
        x / outside * capture.light_x + y / outside * capture.light_y + 0.25 * (facing - 0.4)
    )
    gains = np.array([1 + capture.warmth, 1 + capture.tint, 1 - capture.warmth], np.float32) * capture.exposure
    grey = pixels.mean(axis=2, keepdims=True)
    pixels = (grey + capture.saturation * (pixels - grey)) * (shade[..., None] * gains)
    pixels = 255 * np.clip(pixels / 255, 0, 1) ** capture.gamma
    sigma_px = capture.blur_px * image_px / 112
    if sigma_px > 0.3:
        pixels = cv2.GaussianBlur(pixels, (0, 0), sigma_px)
    noisy: NDArray[np.float32] = pixels + capture.noise * rng.standard_normal(pixels.shape, dtype=np.float32)
    return np.clip(noisy, 0, 255).astype(np.uint8)
