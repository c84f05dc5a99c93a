import dataclasses
import os
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from drawn_faces import augmented

from facetrain.config import DataConfig
from facetrain.data.augment import adjust_colour, draw_augmentations
from facetrain.data.decode import decode_face, thumbnail
from facetrain.data.photograph import Photograph

PLAIN = DataConfig(mirror=False)


def picture(side=112):
    """Return an RGB picture without symmetry, smooth enough to survive JPEG."""
    y, x = np.mgrid[:side, :side] / side * 112
    return np.stack([2 * x, 2 * y, 60 + x / 2 + y / 3], axis=2).astype(np.uint8)


def png(image_rgb):
    return cv2.imencode(".png", image_rgb[..., ::-1])[1].tobytes()


def seed_with(config, **wanted):
    drawn = draw_augmentations(np.arange(10_000, dtype=np.uint32), config)
    return next(seed for seed, change in enumerate(drawn) if wanted.items() <= change._asdict().items())


def test_pixels_arrive_in_rgb_order():
    assert np.array_equal(decode_face(png(picture()), PLAIN, "a"), picture())


def test_grey_has_one_channel():
    grey = decode_face(png(picture()), dataclasses.replace(PLAIN, colour="grey"), "a")
    assert grey.shape == (112, 112, 1)
    luma = picture() @ np.array([0.299, 0.587, 0.114])
    assert np.abs(grey[..., 0] - luma).max() < 1.5


@pytest.mark.parametrize("crop_px", [None, 100])
@pytest.mark.parametrize("image_px", [112, 56])
@pytest.mark.parametrize("colour", ["rgb", "grey"])
def test_augmentation_off_is_the_plain_path(crop_px, image_px, colour):
    config = DataConfig(mirror=False, crop_px=crop_px, image_px=image_px, colour=colour)
    for seed in range(10):
        expected = decode_face(png(picture()), config, "a")
        assert expected.shape == (image_px, image_px, config.channels)
        assert np.array_equal(augmented(png(picture()), config, seed), expected)


def test_crop_is_the_centre():
    config = DataConfig(mirror=False, crop_px=100, image_px=100)
    assert np.array_equal(decode_face(png(picture()), config, "a"), picture()[6:106, 6:106])


def test_smaller_input_averages_areas():
    halves = decode_face(png(picture()), dataclasses.replace(PLAIN, image_px=56), "a")
    expected = picture().reshape(56, 2, 56, 2, 3).mean(axis=(1, 3))
    assert np.abs(halves - expected).max() <= 0.5


def test_image_of_another_size_is_resized_first():
    face = decode_face(png(picture(224)), PLAIN, "a")
    assert np.abs(face.astype(int) - picture()).max() <= 2


def test_image_that_is_not_square_keeps_its_proportions():
    wide = np.pad(picture(), ((0, 0), (20, 20), (0, 0)))
    assert np.array_equal(decode_face(png(wide), PLAIN, "a"), picture())


def test_seed_decides_everything():
    config = DataConfig(crop_jitter_px=4, colour_jitter=0.3)
    first, second = (augmented(png(picture()), config, seed) for seed in (11, 12))
    assert np.array_equal(first, augmented(png(picture()), config, 11))
    assert not np.array_equal(first, second)


def test_changes_are_evenly_drawn():
    config = DataConfig(crop_jitter_px=2, colour_jitter=0.3)
    drawn = draw_augmentations(np.random.default_rng(0).integers(0, 1 << 32, 20_000, dtype=np.uint32), config)
    assert abs(np.mean([d.mirrored for d in drawn]) - 0.5) < 0.02
    shifts = np.array([(d.shift_x_px, d.shift_y_px) for d in drawn])
    places, counts = np.unique(shifts, axis=0, return_counts=True)
    assert len(places) == 25
    assert shifts.min() == -2
    assert shifts.max() == 2
    assert np.abs(counts / 20_000 - 1 / 25).max() < 0.006
    light = np.array([(d.brightness, d.contrast) for d in drawn])
    assert light.min() >= 0.7
    assert light.max() <= 1.3
    assert np.abs(light.mean(axis=0) - 1).max() < 0.01
    together = np.corrcoef(np.column_stack([[d.mirrored for d in drawn], shifts, light]).T)
    assert np.abs(together - np.eye(5)).max() < 0.04


def as_composed(data, config, seed):
    """The same face by one plain step after another, with whole copies and Python's integers."""
    mask, bits = (1 << 64) - 1, []
    for draw in (1, 2):
        z = (seed + draw * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
        bits.append(z ^ z >> 31)
    where, light = bits
    jitter, side = config.crop_jitter_px, config.crop_px or config.shard_px
    x, y = ((where >> shift & 0x7FFFFFFF) % (2 * jitter + 1) for shift in (0, 31))
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB if config.channels == 3 else 0)
    corner = (config.shard_px - side) // 2
    image = np.pad(image, [(jitter, jitter)] * 2 + [(0, 0)] * (image.ndim - 2), mode="reflect")
    image = image[corner + y : corner + y + side, corner + x : corner + x + side]
    if side != config.image_px:
        image = cv2.resize(image, (config.image_px,) * 2, interpolation=cv2.INTER_AREA)
    if config.mirror and where >> 63:
        image = np.ascontiguousarray(image[:, ::-1])
    brightness, contrast = (1 + config.colour_jitter * (b / 2**31 - 1) for b in (light >> 32, light & 0xFFFFFFFF))
    if config.colour_jitter:
        mean = sum(cv2.mean(image)[: config.channels]) / config.channels
        image = cv2.addWeighted(image, brightness * contrast, image, 0, brightness * mean * (1 - contrast))
    return image.reshape(config.image_px, config.image_px, config.channels)


@pytest.mark.parametrize("colour", ["rgb", "grey"])
@pytest.mark.parametrize(
    "changes",
    [
        {"crop_jitter_px": 4, "colour_jitter": 0.3},
        {"crop_px": 100, "image_px": 100, "crop_jitter_px": 8, "colour_jitter": 0.1},
        {"image_px": 56, "crop_jitter_px": 3},
        {"mirror": False, "crop_jitter_px": 111},
        {},
    ],
)
def test_faces_are_to_the_bit_those_of_plain_steps(colour, changes):
    config = DataConfig(colour=colour, **changes)
    for seed in np.random.default_rng(7).integers(0, 1 << 32, 30).tolist():
        assert np.array_equal(augmented(png(picture()), config, seed), as_composed(png(picture()), config, seed))


def test_mirror_swaps_left_and_right():
    mirrored = augmented(png(picture()), DataConfig(), seed_with(DataConfig(), mirrored=True))
    assert np.array_equal(mirrored, picture()[:, ::-1])


def test_jitter_moves_the_crop_and_reflects_the_border():
    config = DataConfig(mirror=False, crop_jitter_px=3)
    moved = augmented(png(picture()), config, seed_with(config, shift_x_px=3, shift_y_px=-2))
    reflected = np.pad(picture(), ((3, 3), (3, 3), (0, 0)), mode="reflect")
    assert np.array_equal(moved, reflected[1:113, 6:118])


def test_jitter_within_the_image_needs_no_border():
    config = DataConfig(mirror=False, crop_px=100, image_px=100, crop_jitter_px=4)
    moved = augmented(png(picture()), config, seed_with(config, shift_x_px=-4, shift_y_px=1))
    assert np.array_equal(moved, picture()[7:107, 2:102])


@pytest.mark.parametrize("shape", [(112, 112, 3), (112, 112)])
def test_colour_follows_its_formula(shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for brightness, contrast in ((1.2, 1.0), (1.0, 0.7), (0.8, 1.3)):
        mean = image.mean()
        expected = (brightness * (mean + contrast * (image - mean))).clip(0, 255)
        adjusted = image.copy()
        adjust_colour(image, brightness, contrast, adjusted)
        assert np.abs(adjusted - expected).max() <= 0.51
        adjust_colour(image_too := image.copy(), brightness, contrast, image_too)
        assert np.array_equal(image_too, adjusted)


@pytest.mark.parametrize("data", [b"", b"no image at all", b"\xff\xd8\xff\xe0 truncated"])
def test_bytes_that_are_no_image_are_named(data):
    message = rf"^0000012_0003\.jpg: expected an image, got {len(data)} bytes that can't be decoded$"
    with pytest.raises(ValueError, match=message):
        decode_face(data, PLAIN, "0000012_0003.jpg")
    with pytest.raises(ValueError, match=message):
        augmented(data, PLAIN, 0, "0000012_0003.jpg")


def test_an_image_that_states_too_many_pixels_is_named_undecoded(monkeypatch):
    bomb = bytearray(png(picture()))
    bomb[16:24] = (8000).to_bytes(4, "big") * 2
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("it was decoded"))
    readings = (
        lambda data: decode_face(data, PLAIN, "Ann/1.png"),
        lambda data: thumbnail(data, 56, "Ann/1.png"),
        lambda data: Photograph(data, "Ann/1.png").pixels(),
        lambda data: Photograph(data, "Ann/1.png").pixels(8),
    )
    for read in readings:
        with pytest.raises(ValueError, match=r"^Ann/1\.png: too large: 8000x8000 pixels, more than 50,000,000 aren't"):
            read(bytes(bomb))


def test_real_faces_keep_their_mean_through_augmentation():
    folder = os.environ.get("FACETRAIN_DATA")
    if folder is None:
        pytest.skip("FACETRAIN_DATA is not set")
    config = DataConfig(image_px=56, crop_jitter_px=4)
    with tarfile.open(Path(folder) / "faces_train-00.tar") as tar:
        files = [tar.extractfile(m) for m, _ in zip((m for m in tar if m.isfile()), range(50), strict=False)]
        faces = [file.read() for file in files]
    plain = np.stack([decode_face(face, config, "a") for face in faces])
    moved = np.stack([augmented(face, config, seed) for seed, face in enumerate(faces)])
    assert plain.std() > 30
    assert abs(plain.mean() - moved.mean()) < 3
    assert not np.array_equal(plain, moved)
