import dataclasses
import os
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from facetrain.config import DataConfig
from facetrain.data.augment import adjust_colour, draw_augmentation
from facetrain.data.decode import decode_augmented, decode_face

PLAIN = DataConfig(mirror=False)


def picture(side=112):
    """Return an RGB picture without symmetry, smooth enough to survive JPEG."""
    y, x = np.mgrid[:side, :side] / side * 112
    return np.stack([2 * x, 2 * y, 60 + x / 2 + y / 3], axis=2).astype(np.uint8)


def png(image_rgb):
    return cv2.imencode(".png", image_rgb[..., ::-1])[1].tobytes()


def seed_with(config, **wanted):
    return next(
        seed for seed in range(10_000) if wanted.items() <= dataclasses.asdict(draw_augmentation(seed, config)).items()
    )


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
        assert np.array_equal(decode_augmented(png(picture()), config, seed, "a"), expected)


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
    first, second = (decode_augmented(png(picture()), config, seed, "a") for seed in (11, 12))
    assert np.array_equal(first, decode_augmented(png(picture()), config, 11, "a"))
    assert not np.array_equal(first, second)


def test_changes_are_evenly_drawn():
    config = DataConfig(crop_jitter_px=2, colour_jitter=0.3)
    seeds = np.random.default_rng(0).integers(0, 1 << 32, 20_000).tolist()
    drawn = [draw_augmentation(seed, config) for seed in seeds]
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


def test_mirror_swaps_left_and_right():
    mirrored = decode_augmented(png(picture()), DataConfig(), seed_with(DataConfig(), mirrored=True), "a")
    assert np.array_equal(mirrored, picture()[:, ::-1])


def test_jitter_moves_the_crop_and_reflects_the_border():
    config = DataConfig(mirror=False, crop_jitter_px=3)
    moved = decode_augmented(png(picture()), config, seed_with(config, shift_x_px=3, shift_y_px=-2), "a")
    reflected = np.pad(picture(), ((3, 3), (3, 3), (0, 0)), mode="reflect")
    assert np.array_equal(moved, reflected[1:113, 6:118])


def test_jitter_within_the_image_needs_no_border():
    config = DataConfig(mirror=False, crop_px=100, image_px=100, crop_jitter_px=4)
    moved = decode_augmented(png(picture()), config, seed_with(config, shift_x_px=-4, shift_y_px=1), "a")
    assert np.array_equal(moved, picture()[7:107, 2:102])


@pytest.mark.parametrize("shape", [(112, 112, 3), (112, 112)])
def test_colour_follows_its_formula(shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for brightness, contrast in ((1.2, 1.0), (1.0, 0.7), (0.8, 1.3)):
        mean = image.mean()
        expected = (brightness * (mean + contrast * (image - mean))).clip(0, 255)
        assert np.abs(adjust_colour(image, brightness, contrast) - expected).max() <= 0.51


@pytest.mark.parametrize("data", [b"", b"no image at all", b"\xff\xd8\xff\xe0 truncated"])
def test_bytes_that_are_no_image_are_named(data):
    message = rf"^0000012_0003\.jpg: expected an image, got {len(data)} bytes that can't be decoded$"
    with pytest.raises(ValueError, match=message):
        decode_face(data, PLAIN, "0000012_0003.jpg")
    with pytest.raises(ValueError, match=message):
        decode_augmented(data, PLAIN, 0, "0000012_0003.jpg")


def test_real_faces_keep_their_mean_through_augmentation():
    folder = os.environ.get("FACETRAIN_DATA")
    if folder is None:
        pytest.skip("FACETRAIN_DATA is not set")
    config = DataConfig(image_px=56, crop_jitter_px=4)
    with tarfile.open(Path(folder) / "faces_train-00.tar") as tar:
        files = [tar.extractfile(m) for m, _ in zip((m for m in tar if m.isfile()), range(50), strict=False)]
        faces = [file.read() for file in files]
    plain = np.stack([decode_face(face, config, "a") for face in faces])
    moved = np.stack([decode_augmented(face, config, seed, "a") for seed, face in enumerate(faces)])
    assert plain.std() > 30
    assert abs(plain.mean() - moved.mean()) < 3
    assert not np.array_equal(plain, moved)
