"""Draws a face: what lies on the head, from the neck up to the brows. Hair and what covers a face are in covers."""

from collections.abc import Iterator

import numpy as np

from facetrain.data.synthetic.canvas import (
    CIRCLE,
    DARK,
    OVERSAMPLING,
    WHITE,
    Canvas,
    Image,
    Points,
    U,
    background,
    curve,
    loop,
    photograph,
    silhouette,
)
from facetrain.data.synthetic.covers import (
    HAIR_SHAPES,
    draw_glasses,
    draw_hair_behind,
    draw_hair_in_front,
    draw_occlusion,
)
from facetrain.data.synthetic.traits import Capture, Traits, mix


def draw_face(traits: Traits, capture: Capture, image_px: int) -> Image:
    """Draw one photograph of a person, before JPEG compression.

    Args:
        traits: The identity.
        capture: The conditions of this image.
        image_px: Side of the square image, in pixels.

    Returns:
        uint8 [image_px, image_px, 3], RGB.
    """
    rng = np.random.default_rng(int(capture.clutter_seed))
    canvas = Canvas(traits, capture, background(OVERSAMPLING * image_px, rng))
    hair = HAIR_SHAPES.get(traits.hair_style)
    if hair is not None:
        draw_hair_behind(canvas, traits, capture, hair)
    _draw_body(canvas, traits, capture)
    _draw_head(canvas, traits)
    _draw_marks(canvas, traits)
    _draw_beard(canvas, traits)
    _draw_nose(canvas, traits)
    _draw_mouth(canvas, traits, capture)
    _draw_eyes(canvas, traits, capture)
    if hair is not None:
        draw_hair_in_front(canvas, traits, capture, hair)
    _draw_brows(canvas, traits, capture)
    if traits.glasses != "none" and capture.occlusion != "sunglasses":
        draw_glasses(canvas, traits, traits.glasses, traits.frame, traits.glasses_width)
    draw_occlusion(canvas, traits, capture, rng)
    return photograph(canvas, capture, image_px, rng)


def _draw_body(canvas: Canvas, traits: Traits, capture: Capture) -> None:
    width = traits.neck_width
    neck = np.array([[-width, 0.5], [width, 0.5], [width * 1.15, 1.9], [-width * 1.15, 1.9]])
    canvas.fill(neck, mix(traits.skin, DARK, 0.22))
    top = 1.36 + 0.55 * np.abs(U) ** 2.2 + np.clip(1 - np.abs(U) / 0.36, 0, 1) * capture.shirt_neck
    canvas.fill(np.concatenate([curve(2.0 * U, top), [[2.6, 4.0], [-2.6, 4.0]]]), capture.shirt)


def _draw_head(canvas: Canvas, traits: Traits) -> None:
    for side in (-1.0, 1.0):
        centre = np.array([[side * (traits.head_width + traits.ear_out) - 0.10 * canvas.sin_yaw, 0.10]])
        ear = canvas.lean(centre + traits.ear_size * np.array([0.15, 0.24]) * CIRCLE)
        inside = canvas.lean(centre + traits.ear_size * np.array([0.08, 0.15]) * CIRCLE)
        canvas.fill(ear, mix(traits.skin, (200, 80, 60), 0.12))
        canvas.stroke(inside, mix(traits.skin, DARK, 0.30), 0.02, closed=True)
    outline = canvas.lean(silhouette(traits, np.linspace(0, 2 * np.pi, 48, endpoint=False)))
    canvas.fill(outline, traits.skin)
    canvas.stroke(outline, mix(traits.skin, DARK, 0.25), 0.02, closed=True)
    if traits.blush > 0.06:
        for side in (-1.0, 1.0):
            cheek = np.array([[side * traits.eye_x * 1.25, traits.nose_y + 0.02]]) + np.array([0.20, 0.13]) * CIRCLE
            canvas.fill(canvas.turn(cheek), mix(traits.skin, (226, 96, 90), traits.blush * 0.6))


def _draw_marks(canvas: Canvas, traits: Traits) -> None:
    """Freckles, moles and folds, at the same places in every image."""
    rng = np.random.default_rng(int(traits.marks_seed))
    for _ in range({"none": 0, "few": 12, "many": 30}[traits.freckles]):
        at = np.array([[rng.triangular(-0.7, 0, 0.7), rng.triangular(-0.1, 0.25, 0.55)]])
        canvas.dot(canvas.turn(at), rng.uniform(0.012, 0.024), mix(traits.skin, (130, 70, 40), 0.42))
    for _ in range(int(traits.num_moles)):
        at = np.array([[rng.choice([-1, 1]) * rng.uniform(0.2, 0.68), rng.uniform(0.15, 0.8)]])
        canvas.dot(canvas.turn(at), rng.uniform(0.022, 0.036), mix(traits.skin, (40, 20, 16), 0.7))
    if traits.folds <= 0:
        return
    t = np.linspace(0, 1, 8)
    mouth_x = traits.mouth_width + 0.07
    beside = curve(traits.nose_width + 0.05 + (mouth_x - traits.nose_width) * t**1.6, traits.nose_y + 0.34 * t)
    under = curve(traits.eye_x + 0.2 * (2 * t - 1), traits.eye_y + 0.19 + 0.05 * (1 - (2 * t - 1) ** 2))
    for side in (-1.0, 1.0):
        for fold in (beside, under):
            line = mix(traits.skin, DARK, 0.12 + 0.20 * traits.folds)
            canvas.stroke(canvas.turn(fold * [side, 1.0]), line, 0.018)


def _draw_beard(canvas: Canvas, traits: Traits) -> None:
    mouth_y = traits.nose_y + traits.mouth_y
    colour = mix(traits.hair, DARK, 0.12)
    size = traits.beard_size
    if traits.beard in ("stubble", "full"):
        if traits.beard == "stubble":
            colour = mix(traits.skin, traits.hair, 0.28)
        outside = canvas.lean(silhouette(traits, np.linspace(0.02, np.pi - 0.02, 25)) * [1.0, 1 + 0.05 * size])
        top = mouth_y - 0.17
        cheeks = top + 0.10 * np.sin(np.abs(U) * np.pi) - top * np.abs(U) ** 4
        canvas.fill(np.concatenate([outside, canvas.turn(curve(U * traits.head_width * 0.97, cheeks))]), colour)
    if traits.beard == "goatee":
        middle = np.array([[0.0, (mouth_y + traits.jaw_height) / 2 + 0.06]])
        chin = middle + np.array([0.26 * size, (traits.jaw_height - mouth_y) * 0.52]) * CIRCLE
        canvas.fill(canvas.turn(chin, 0.05), colour)
    if traits.beard in ("moustache", "goatee"):
        low = mouth_y - 0.05 + 0.07 * U**2
        high = low - 0.10 * size * (1 - U**4) * (1 - 0.35 * np.exp(-((U / 0.12) ** 2)))
        canvas.fill(canvas.turn(loop(U * traits.mouth_width * (0.8 + 0.3 * size), low, high), 0.06), colour)


def _draw_nose(canvas: Canvas, traits: Traits) -> None:
    y, width, lift = traits.nose_y, traits.nose_width, traits.nose_lift
    t = np.linspace(0, 1, 9)
    bridge_x = traits.nose_bridge + (width * 0.85 - traits.nose_bridge) * t**2.5
    right = curve(bridge_x, -0.08 + (y + 0.02) * t)
    left = right * [-1.0, 1.0]
    base_x = np.array([1.0, 0.55, 0.0, -0.55, -1.0])
    bottom = curve(base_x * width, y + np.array([0.02, 0.09, 0.12, 0.09, 0.02]))
    rise, bottom_rise = lift * t, lift * np.array([0.4, 0.7, 1.0, 0.7, 0.4])
    nose = np.concatenate([right, bottom, left[::-1]])
    lifts = np.concatenate([rise, bottom_rise, rise[::-1]])
    canvas.fill(canvas.turn(nose, lifts), mix(traits.skin, (236, 150, 120), 0.13))
    far_side = right if canvas.sin_yaw < 0 else left
    canvas.stroke(canvas.turn(far_side, rise), mix(traits.skin, DARK, 0.2), 0.022)
    canvas.stroke(canvas.turn(bottom, bottom_rise), mix(traits.skin, DARK, 0.34), 0.03)
    for nostril in (-0.5, 0.5):
        hole = np.array([[nostril * width, y + 0.055]]) + np.array([0.2 * width, 0.022]) * CIRCLE
        canvas.fill(canvas.turn(hole, lift * 0.7), mix(traits.skin, DARK, 0.65))


def _draw_mouth(canvas: Canvas, traits: Traits, capture: Capture) -> None:
    opening = 0.2 * max(0.0, capture.mouth_open)
    closing = 1 - U**2
    line = traits.nose_y + traits.mouth_y - 0.14 * capture.smile * U**2 + 0.04 * capture.smile
    under = line + opening * closing
    above = line - traits.upper_lip * closing**0.7 * (1 - traits.lip_bow * np.exp(-((U / 0.18) ** 2)))
    below = under + traits.lower_lip * closing**0.8
    x = U * traits.mouth_width * (1 + 0.16 * capture.smile)
    lips = mix(traits.skin, traits.lips, traits.lip_colour)
    canvas.fill(canvas.turn(loop(x, above, line), 0.04), mix(lips, DARK, 0.12))
    canvas.fill(canvas.turn(loop(x, under, below), 0.04), lips)
    if opening > 0.02:
        canvas.fill(canvas.turn(loop(x, line, under), 0.04), (84, 30, 34))
        canvas.fill(canvas.turn(loop(x, line, np.minimum(under, line + 0.08)), 0.04), WHITE)
    canvas.stroke(canvas.turn(curve(x, line), 0.04), mix(lips, DARK, 0.6), 0.022)


def _eyes(traits: Traits) -> Iterator[tuple[float, Points]]:
    for side in (-1.0, 1.0):
        yield side, np.array([[side * traits.eye_x, traits.eye_y]])


def _draw_eyes(canvas: Canvas, traits: Traits, capture: Capture) -> None:
    width, height = traits.eye_width, traits.eye_height * capture.eye_open
    shade = mix(traits.skin, DARK, 0.3)
    gaze = np.array([capture.gaze_x * (width - traits.iris_size), capture.gaze_y * 0.05])
    for side, centre in _eyes(traits):
        x = centre[0, 0] + U * width
        tilt = centre[0, 1] - side * traits.eye_tilt * U * width
        upper = tilt - height * (1 - np.abs(U) ** traits.eye_corner)
        lower = tilt + 0.72 * height * (1 - U**2)
        canvas.fill(canvas.turn(loop(x, upper, lower)), WHITE)
        for radius, colour in ((traits.iris_size, traits.iris), (traits.iris_size * 0.5, DARK)):
            disc = centre + gaze + radius * CIRCLE
            # Keeping the disc's points between the lids cuts it exactly where they cover it.
            disc[:, 1] = np.clip(disc[:, 1], np.interp(disc[:, 0], x, upper), np.interp(disc[:, 0], x, lower))
            canvas.fill(canvas.turn(disc), colour)
        if capture.eye_open > 0.65:
            canvas.dot(canvas.turn(centre + gaze + [[0.03, -0.035]]), 0.02, WHITE)
        canvas.stroke(canvas.turn(curve(x, upper)), DARK, traits.lash_width)
        canvas.stroke(canvas.turn(curve(x, lower)), shade, 0.015)
        if traits.lid_crease > 0.3:
            canvas.stroke(canvas.turn(curve(x, upper - 0.05)[3:-3]), shade, 0.012 + 0.012 * traits.lid_crease)


def _draw_brows(canvas: Canvas, traits: Traits, capture: Capture) -> None:
    towards, share = (traits.skin, 0.2) if traits.hair_style == "bald" else (DARK, 0.35)
    for side, centre in _eyes(traits):
        x = centre[0, 0] + U * traits.brow_width
        slope = -(traits.brow_tilt - capture.frown) * 0.35 * side * U * traits.brow_width
        middle = centre[0, 1] - traits.brow_gap - capture.brow_raise + slope - traits.brow_arch * (1 - U**2)
        half = 0.5 * traits.brow_thickness * (0.35 + 0.65 * np.clip(1.0 - side * U, 0, 1.2)) + 0.008
        canvas.fill(canvas.turn(loop(x, middle - half, middle + half)), mix(traits.hair, towards, share))
