# ruff: noqa: RUF009 - the functions called in the classes make fields
"""Who a synthetic face is and how it was photographed: the numbers that a drawing is made of.

Traits are the identity and stay the same in all images of a person; Capture is everything else and changes from image
to image. Both are drawn from explicit seeds, so a face is a pure function of (seed, identity, image).

Lengths are in head units: 1 is half the width of an average head. The origin is the middle of the head, x points to the
image's right, y down, z towards the viewer. Colours are RGB in [0, 255].
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import numpy as np

Colour = tuple[float, float, float]
DrawnT = TypeVar("DrawnT")

SKINS: tuple[Colour, ...] = (
    (244, 212, 186), (236, 194, 162), (220, 170, 130), (190, 136, 96), (148, 98, 66), (98, 62, 44),
)  # fmt: skip
HAIRS: tuple[Colour, ...] = (
    (28, 24, 26), (28, 24, 26), (52, 36, 28), (52, 36, 28), (92, 58, 34), (92, 58, 34), (140, 92, 50),
    (206, 164, 96), (168, 74, 34), (150, 148, 150), (226, 222, 214), (128, 60, 92), (64, 88, 112),
)  # fmt: skip
IRISES: tuple[Colour, ...] = (
    (60, 38, 26), (104, 66, 34), (124, 112, 54), (72, 118, 76), (70, 118, 166), (118, 134, 146),
)  # fmt: skip
LIPS: tuple[Colour, ...] = ((196, 104, 98), (170, 72, 76), (206, 60, 72), (150, 70, 62), (214, 138, 124))
FRAMES: tuple[Colour, ...] = ((24, 24, 28), (92, 52, 28), (178, 142, 70), (150, 30, 40), (40, 70, 130), (190, 192, 196))


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """Return the colour `share` of the way from a to b, share in [0, 1]."""
    return (a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share, a[2] + (b[2] - a[2]) * share)


def jitter(colour: Colour, spread: float, rng: np.random.Generator) -> Colour:
    """Return the colour, lighter or darker and a little off in hue, each channel moved by up to `spread`."""
    moved = np.clip(np.asarray(colour) + rng.uniform(-0.7, 0.7) * spread + rng.uniform(-0.3, 0.3, 3) * spread, 0, 255)
    return (float(moved[0]), float(moved[1]), float(moved[2]))


def _between(low: float, high: float) -> Any:
    """A field drawn uniformly from [low, high)."""
    return field(metadata={"draw": lambda rng: float(rng.uniform(low, high))})


def _around_zero(spread: float) -> Any:
    """A field in [-spread, spread], with values near 0 the most frequent (triangular)."""
    return field(metadata={"draw": lambda rng: float(rng.triangular(-spread, 0.0, spread))})


def _one_of(weights: Mapping[str, float]) -> Any:
    """A field that takes one of the names, with frequencies in proportion to their weights."""
    names, total = list(weights), sum(weights.values())
    shares = [weight / total for weight in weights.values()]
    return field(metadata={"draw": lambda rng: names[int(rng.choice(len(names), p=shares))]})


def _colour_near(palette: tuple[Colour, ...], spread: float) -> Any:
    """A field with a colour near one of the palette's."""
    return field(metadata={"draw": lambda rng: jitter(palette[int(rng.integers(len(palette)))], spread, rng)})


def _any_colour() -> Any:
    """A field with any colour that is neither black nor white."""
    return field(metadata={"draw": lambda rng: tuple(float(channel) for channel in rng.uniform(20, 235, 3))})


@dataclass(frozen=True, kw_only=True)
class Traits:
    """The identity: geometry, colours and lasting features. Lengths in head units, tilts as slopes."""

    head_width: float = _between(0.84, 1.06)
    skull_height: float = _between(1.08, 1.34)
    jaw_height: float = _between(0.98, 1.28)
    jaw_width: float = _between(0.62, 1.0)
    jaw_squareness: float = _between(0.55, 1.15)
    ear_size: float = _between(0.7, 1.35)
    ear_out: float = _between(0.0, 0.14)
    neck_width: float = _between(0.42, 0.64)

    eye_x: float = _between(0.35, 0.50)
    eye_y: float = _between(-0.16, 0.06)
    eye_width: float = _between(0.17, 0.25)
    eye_height: float = _between(0.095, 0.17)
    eye_corner: float = _between(1.5, 3.0)
    """Power of the upper lid's curve: higher is squarer."""
    eye_tilt: float = _around_zero(0.34)
    iris_size: float = _between(0.085, 0.12)
    lash_width: float = _between(0.02, 0.055)
    lid_crease: float = _between(0.0, 1.0)
    """Strength of the line above the lid; none below 0.3."""

    brow_gap: float = _between(0.17, 0.32)
    brow_width: float = _between(0.20, 0.30)
    brow_thickness: float = _between(0.025, 0.10)
    brow_arch: float = _between(-0.02, 0.14)
    brow_tilt: float = _around_zero(0.4)

    nose_y: float = _between(0.28, 0.52)
    nose_width: float = _between(0.11, 0.25)
    nose_bridge: float = _between(0.04, 0.09)
    nose_lift: float = _between(0.12, 0.34)

    mouth_y: float = _between(0.22, 0.36)
    """Below the nose."""
    mouth_width: float = _between(0.24, 0.42)
    upper_lip: float = _between(0.02, 0.085)
    lower_lip: float = _between(0.035, 0.12)
    lip_bow: float = _between(0.0, 0.6)
    """Depth of the upper lip's dent, as a share of its thickness."""

    skin: Colour = _colour_near(SKINS, 14)
    hair: Colour = _colour_near(HAIRS, 18)
    iris: Colour = _colour_near(IRISES, 18)
    lips: Colour = _colour_near(LIPS, 18)
    lip_colour: float = _between(0.25, 0.9)
    """How far the lips' colour is from the skin's, as a share."""

    hair_style: str = _one_of(
        {"bald": 0.9, "buzz": 1.2, "short": 2, "parted": 2, "fringe": 2}
        | {"bob": 2, "long": 2.2, "curly": 1.6, "bun": 1.2, "spiky": 1.4}
    )
    hairline_y: float = _between(-0.84, -0.60)
    hairline_power: float = _between(2.2, 6.0)
    """Power of the hairline's curve: higher is squarer."""
    hair_part: float = _around_zero(0.8)
    """Place of the parting, from -1 (left) to 1."""
    hair_volume: float = _between(0.7, 1.3)
    hair_length: float = _between(0.0, 1.0)

    beard: str = _one_of({"none": 6, "stubble": 1.0, "moustache": 0.9, "goatee": 0.9, "full": 1.2})
    beard_size: float = _between(0.6, 1.3)
    glasses: str = _one_of({"none": 7, "round": 1.0, "square": 1.0, "wide": 0.8})
    glasses_size: float = _between(0.85, 1.15)
    glasses_width: float = _between(0.018, 0.06)
    frame: Colour = _colour_near(FRAMES, 14)
    freckles: str = _one_of({"none": 4, "few": 1, "many": 1})
    num_moles: float = _between(0.0, 2.3)
    """Rounded down."""
    marks_seed: float = _between(0.0, 1e9)
    """The places of moles and freckles."""
    folds: float = _between(-1.2, 0.8)
    """Strength of the lines beside the mouth and under the eyes; none below 0."""
    blush: float = _between(0.0, 0.34)


@dataclass(frozen=True, kw_only=True)
class Capture:
    """The nuisance: pose, expression, light, occlusion and camera of one image."""

    yaw_rad: float = _around_zero(0.62)
    pitch_rad: float = _around_zero(0.42)
    roll_rad: float = _around_zero(0.36)
    shift_x: float = _around_zero(0.46)
    shift_y: float = _around_zero(0.36)
    zoom: float = _between(0.82, 1.22)

    smile: float = _between(-0.35, 1.2)
    mouth_open: float = _between(-0.9, 1.0)
    """Closed at 0 and below."""
    eye_open: float = _between(0.6, 1.15)
    brow_raise: float = _around_zero(0.09)
    frown: float = _around_zero(0.2)
    gaze_x: float = _around_zero(0.5)
    gaze_y: float = _around_zero(0.3)

    occlusion: str = _one_of({"none": 9, "sunglasses": 1.1, "mask": 1.0, "scarf": 1.0, "hand": 1.2, "hat": 2.6})
    cloth: Colour = _any_colour()
    """Hat, scarf or mask."""
    shirt: Colour = _any_colour()
    shirt_neck: float = _between(0.1, 0.5)
    hair_mess: float = _between(0.8, 1.2)

    light_x: float = _between(-1.0, 1.0)
    light_y: float = _between(-0.9, 0.5)
    light_strength: float = _between(0.15, 0.85)
    exposure: float = _between(0.55, 1.2)
    gamma: float = _between(0.75, 1.35)
    warmth: float = _around_zero(0.32)
    tint: float = _around_zero(0.12)
    saturation: float = _between(0.35, 1.15)

    blur_px: float = _between(0.0, 1.0)
    """Standard deviation, in pixels of an image of 112."""
    noise: float = _between(1.0, 9.0)
    """Standard deviation, in grey levels."""
    jpeg_quality: float = _between(35, 95)
    clutter_seed: float = _between(0.0, 1e9)
    """Background, hand and noise."""


def draw_traits(seed: int, identity: int) -> Traits:
    """Return the identity, a pure function of its arguments (both >= 0)."""
    return _drawn(Traits, np.random.default_rng([seed, identity]))


def draw_capture(seed: int, identity: int, image: int) -> Capture:
    """Return the conditions of one image of an identity, a pure function of its arguments (all >= 0)."""
    # A trailing zero doesn't change numpy's seeding, so image + 1 keeps image 0 apart from the traits.
    return _drawn(Capture, np.random.default_rng([seed, identity, image + 1]))


def _drawn(kind: type[DrawnT], rng: np.random.Generator) -> DrawnT:
    draws: dict[str, Callable[[np.random.Generator], Any]]
    draws = {f.name: f.metadata["draw"] for f in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: draw(rng) for name, draw in draws.items()})
