"""What lies over a face: hair and glasses, which belong to the person, and hats, masks and hands, which don't."""

from dataclasses import dataclass

import numpy as np

from facetrain.data.synthetic.canvas import CIRCLE, DARK, WHITE, Canvas, Points, U, curve, loop, silhouette
from facetrain.data.synthetic.traits import Capture, Colour, Traits, mix


@dataclass(frozen=True, kw_only=True)
class HairShape:
    """What a hair style is made of; lengths in head units."""

    volume: float
    """How far the hair stands out from the skull."""
    sides_y: float
    """Where the hair ends beside the face."""
    back_y: float | None = None
    """Where the hair behind the neck ends; None where it isn't seen."""
    fringe: float = 0.0
    """How far hair falls over the forehead."""
    tufts: float = 0.0
    """Depth of the hairline's teeth."""
    ripple: float = 0.0
    """Depth of curls or spikes along the outside."""
    num_ripples: int = 0
    parting: float = 0.0
    """How much higher the hairline is at the parting than far from it."""
    bun: bool = False


HAIR_SHAPES: dict[str, HairShape] = {
    "buzz": HairShape(volume=0.03, sides_y=-0.25),
    "short": HairShape(volume=0.15, sides_y=-0.10, tufts=0.12, ripple=0.02, num_ripples=10),
    "parted": HairShape(volume=0.20, sides_y=-0.15, parting=0.40),
    "fringe": HairShape(volume=0.18, sides_y=0.30, fringe=0.22, tufts=0.08, back_y=0.75),
    "bob": HairShape(volume=0.20, sides_y=0.55, back_y=0.95, parting=0.34),
    "long": HairShape(volume=0.18, sides_y=0.80, back_y=1.9, parting=0.40),
    "curly": HairShape(volume=0.30, sides_y=0.20, back_y=0.5, ripple=0.06, num_ripples=19, tufts=0.10, fringe=0.04),
    "bun": HairShape(volume=0.09, sides_y=-0.05, parting=0.16, bun=True),
    "spiky": HairShape(volume=0.16, sides_y=-0.20, ripple=0.16, num_ripples=10, tufts=0.16),
}
"""What is drawn for Traits.hair_style; bald has none."""

_LENS = {"round": (0.27, 0.26, 1.0), "square": (0.29, 0.22, 0.5), "wide": (0.33, 0.19, 0.7)}
"""Half width, half height, and the power of the outline: lower is squarer."""


def _ripple(hair: HairShape, capture: Capture, count: int) -> Points:
    """How far each of `count` points along the outside stands out."""
    return hair.ripple * capture.hair_mess * np.abs(np.sin(np.linspace(0, np.pi * hair.num_ripples, count)))


def draw_hair_behind(canvas: Canvas, traits: Traits, capture: Capture, hair: HairShape) -> None:
    """Draw what is behind head and neck: a curtain of hair, a bun."""
    if hair.bun:
        bun = np.array([[0.25 * traits.hair_part, -traits.skull_height - 0.16]])
        canvas.dot(canvas.lean(bun), 0.32 * traits.hair_volume, mix(traits.hair, DARK, 0.2))
    if hair.back_y is None:
        return
    length = hair.back_y * (0.75 + 0.5 * traits.hair_length)
    t = np.linspace(0, 1, 24)
    out = hair.volume * traits.hair_volume * (0.6 + 0.5 * np.sin(np.pi * t * 0.8)) + _ripple(hair, capture, 24)
    # Rounded towards the ends, as hair that turns in.
    out = (traits.head_width + out) * (1 - 0.22 * np.clip((t - 0.8) / 0.2, 0, 1) ** 2)
    y = -0.7 + (length + 0.7) * t
    curtain = np.concatenate([curve(out, y), curve(-out, y)[::-1]])
    canvas.fill(canvas.lean(curtain), mix(traits.hair, DARK, 0.28))


def draw_hair_in_front(canvas: Canvas, traits: Traits, capture: Capture, hair: HairShape) -> None:
    """Fill between the outside, round the skull, and the hairline, with strands between the two."""
    count = 61
    u = np.linspace(-1, 1, count)
    height = traits.skull_height if hair.sides_y < 0 else traits.jaw_height
    end = np.arcsin(np.clip(hair.sides_y / height, -1, 1))
    # Hair that falls over the ears stays wide to its ends; short hair tapers to the temples.
    taper = np.clip(np.cos(u * np.pi / 2) * 2.5, 0.25 if hair.back_y is None else 0.9, 1)
    out = (hair.volume * traits.hair_volume + _ripple(hair, capture, count)) * taper / traits.head_width
    outside = silhouette(traits, np.linspace(np.pi - end, 2 * np.pi + end, count)) * (1 + out)[:, None]
    if hair.back_y is not None:
        below = outside[:, 1] > 0
        outside[below, 0] = np.sign(outside[below, 0]) * traits.head_width * (1 + out[below])
    outside = canvas.lean(outside)
    share = np.abs(u) ** traits.hairline_power
    teeth = hair.tufts * capture.hair_mess * np.abs(np.sin((u + 0.2 * traits.hair_part) * 11.0))
    forehead = traits.hairline_y + hair.fringe + teeth + hair.parting * (np.abs(u - traits.hair_part) ** 0.8 - 0.6)
    hairline = canvas.turn(curve(u * 0.95 * traits.head_width, forehead * (1 - share) + hair.sides_y * share))
    hairline[[0, -1]] = outside[[0, -1]]
    colour = mix(traits.skin, traits.hair, 0.7) if traits.hair_style == "buzz" else traits.hair
    canvas.fill(np.concatenate([outside, hairline[::-1]]), colour)
    if traits.hair_style == "buzz":
        return
    for strand, towards in ((0.3, DARK), (0.55, WHITE), (0.8, DARK)):
        line = hairline + strand * (outside - hairline)
        canvas.stroke(line[5:-5], mix(colour, towards, 0.14), 0.022)


def draw_glasses(canvas: Canvas, traits: Traits, kind: str, colour: Colour, width: float) -> None:
    """Draw frames of a kind (round, square, wide), their bridge and temples."""
    half_width, half_height, power = _LENS[kind]
    half_width, half_height = half_width * traits.glasses_size, half_height * traits.glasses_size
    lens = np.sign(CIRCLE) * np.abs(CIRCLE) ** power * np.array([half_width, half_height])
    for side in (-1.0, 1.0):
        rim = np.array([[side * (traits.eye_x + 0.02), traits.eye_y + 0.03]]) + lens
        canvas.stroke(canvas.turn(rim, 0.10), colour, width, closed=True)
        hinge = np.array([[side * (traits.eye_x + half_width), traits.eye_y]])
        ear = np.array([[side * traits.head_width, traits.eye_y - 0.02]])
        canvas.stroke(np.concatenate([canvas.turn(hinge, 0.10), canvas.lean(ear)]), colour, width)
    inner = traits.eye_x - half_width + 0.02
    bridge = curve(np.array([-inner, 0, inner]), traits.eye_y + np.array([0.0, -0.03, 0.0]))
    canvas.stroke(canvas.turn(bridge, 0.12), colour, width)


def draw_occlusion(canvas: Canvas, traits: Traits, capture: Capture, rng: np.random.Generator) -> None:
    """Draw what hides a part of the face in this image, if anything does."""
    if capture.occlusion == "sunglasses":
        for side in (-1.0, 1.0):
            at = np.array([[side * (traits.eye_x + 0.02), traits.eye_y + 0.04]])
            lens = at + np.sign(CIRCLE) * np.abs(CIRCLE) ** 0.75 * np.array([0.31, 0.23])
            canvas.fill(canvas.turn(lens, 0.10), (28, 28, 34))
        draw_glasses(canvas, traits, "wide", (22, 22, 26), 0.05)
    elif capture.occlusion == "mask":
        _draw_mask(canvas, traits, capture.cloth)
    elif capture.occlusion == "scarf":
        _draw_scarf(canvas, traits, capture.cloth)
    elif capture.occlusion == "hat":
        _draw_hat(canvas, traits, capture.cloth)
    elif capture.occlusion == "hand":
        _draw_hand(canvas, traits, rng)


def _draw_mask(canvas: Canvas, traits: Traits, cloth: Colour) -> None:
    edge = canvas.lean(silhouette(traits, np.linspace(0.18, np.pi - 0.18, 21)) * 1.01)
    rim = curve(U * traits.head_width * 0.85, traits.nose_y - 0.12 + 0.12 * np.abs(U))
    top = canvas.turn(rim, 0.12 * (1 - U**2))
    canvas.fill(np.concatenate([edge, top]), cloth)
    for y in (0.28, 0.48):
        canvas.stroke(top[3:-3] + np.array([0.0, y]), mix(cloth, DARK, 0.25), 0.02)


def _draw_scarf(canvas: Canvas, traits: Traits, cloth: Colour) -> None:
    top = curve(1.3 * U, traits.nose_y + traits.mouth_y - 0.05 + 0.25 * U**2)
    canvas.fill(canvas.lean(np.concatenate([top, [[1.6, 3.0], [-1.6, 3.0]]])), cloth)
    for y in (0.2, 0.4, 0.6, 0.8):
        canvas.stroke(canvas.lean(top + np.array([0.0, y])), mix(cloth, DARK, 0.25), 0.04)


def _draw_hat(canvas: Canvas, traits: Traits, cloth: Colour) -> None:
    crown = canvas.lean(silhouette(traits, np.linspace(np.pi * 1.10, np.pi * 1.90, 21)) * 1.18)
    brim_x = 1.05 * traits.head_width * U
    brim_y = traits.hairline_y + 0.10 + 0.12 * (1 - U**2)
    canvas.fill(np.concatenate([crown, canvas.turn(curve(brim_x, brim_y), 0.12)[::-1]]), cloth)
    canvas.fill(canvas.turn(loop(brim_x, brim_y - 0.12, brim_y + 0.08), 0.12), mix(cloth, DARK, 0.3))


def _draw_hand(canvas: Canvas, traits: Traits, rng: np.random.Generator) -> None:
    """Draw a palm with four fingers that reaches in from the left or the right."""
    side = float(rng.choice([-1.0, 1.0]))
    palm = np.array([side * rng.uniform(0.75, 1.15), rng.uniform(0.1, 1.1)])
    skin = mix(traits.skin, (190, 110, 84), 0.12)
    inward = np.arctan2(-palm[1] * 0.6, -palm[0]) + rng.uniform(-0.4, 0.4)
    canvas.stroke(np.stack([palm, palm + np.array([side * 0.9, 1.6])]), skin, 0.42)
    for spread in (-0.42, -0.14, 0.14, 0.42):
        direction = np.array([np.cos(inward + spread), np.sin(inward + spread)])
        finger = np.stack([palm + 0.2 * direction, palm + rng.uniform(0.5, 0.66) * direction])
        canvas.stroke(finger, mix(skin, DARK, 0.35), 0.17)
        canvas.stroke(finger, skin, 0.13)
    canvas.fill(palm + 0.32 * CIRCLE, skin)
