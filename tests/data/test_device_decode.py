"""Decoding of whole batches: the faces of the CPU's path, whatever the device."""

import dataclasses

import numpy as np
import pytest
import torch
from drawn_faces import augmented, drawn_image, encoded
from numbered_faces import SIDE_PX, numbered_shards

from facetrain.config import Config, DataConfig, RunConfig
from facetrain.data.augment import draw_augmentations
from facetrain.data.device_decode import decode_on_device
from facetrain.data.loader import PairLoader
from facetrain.data.plan import Plan

SEEDS = np.random.default_rng(0).integers(0, 1 << 32, 24, dtype=np.uint32)


@pytest.mark.parametrize("colour", ["rgb", "grey"])
@pytest.mark.parametrize(
    ("changes", "most_levels", "mean_levels"),
    [
        ({}, 0, 0.0),
        ({"crop_px": 100, "image_px": 100, "crop_jitter_px": 8}, 0, 0.0),
        ({"crop_jitter_px": 111, "mirror": False}, 0, 0.0),
        ({"crop_jitter_px": 4, "colour_jitter": 0.3}, 1, 0.02),
        ({"image_px": 56, "crop_jitter_px": 3}, 1, 0.3),
        ({"image_px": 96, "crop_jitter_px": 3}, 16, 2.5),  # where areas overlap, they are whole pixels here
    ],
)
def test_faces_are_those_of_the_workers(colour, changes, most_levels, mean_levels):
    config = DataConfig(colour=colour, **changes)
    jpegs = [encoded(drawn_image(seed)) for seed in range(len(SEEDS))]
    expected = np.stack([augmented(jpeg, config, seed) for jpeg, seed in zip(jpegs, SEEDS.tolist(), strict=True)])
    faces = decode_on_device(jpegs, draw_augmentations(SEEDS, config), config, torch.device("cpu"))
    assert faces.dtype == torch.uint8
    assert faces.shape == expected.shape
    levels = np.abs(faces.numpy().astype(int) - expected)
    assert levels.max() <= most_levels
    assert levels.mean() <= mean_levels


def test_what_is_no_image_or_of_another_size_ends_the_batch():
    config, device = DataConfig(), torch.device("cpu")
    whole = encoded(drawn_image(0))
    for other in (b"no image", encoded(drawn_image(1, 96, 96))):
        with pytest.raises(ValueError, match=r"^data\.decode: an image of the batch can't be decoded: [^\n]*$"):
            decode_on_device([whole, other], draw_augmentations(SEEDS[:2], config), config, device)


def test_a_gpu_is_not_replaced_by_the_cpu(tmp_path):
    with pytest.raises(ValueError, match=r"data\.decode: 'gpu' needs a CUDA device, got run\.device cpu"):
        Config(data=DataConfig(decode="gpu"), run=RunConfig(device="cpu"))
    with pytest.raises(ValueError, match=r"data\.on_bad_image: expected 'error' with data\.decode gpu"):
        DataConfig(decode="gpu", on_bad_image="skip")
    shards = numbered_shards(tmp_path, [3] * 8)
    plan = Plan(shards.table, np.arange(8), global_pairs=4, seed=0)
    config = DataConfig(decode="gpu", shard_px=SIDE_PX, image_px=SIDE_PX, workers=0)
    ranks = {"rank": 0, "world_size": 1, "first_step": 0, "last_step": 2}
    with pytest.raises(ValueError, match=r"^data\.decode: 'gpu' needs a CUDA device, got cpu; expected 'cpu' here$"):
        PairLoader(plan, shards, config, **ranks)


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_decoded_on_the_gpu_are_nearly_the_cpus(synthetic, workers):
    from facetrain.data.shards import ShardSet

    shards = ShardSet.open(synthetic / "shards")
    plan = Plan(shards.table, np.arange(48), global_pairs=16, seed=0)
    config = DataConfig(crop_jitter_px=3, colour_jitter=0.1, workers=workers)
    ranks = {"rank": 0, "world_size": 1, "first_step": 0, "last_step": 6}
    with PairLoader(plan, shards, config, **ranks) as loader:
        expected = list(loader)
    on_gpu = dataclasses.replace(config, decode="gpu")
    with PairLoader(plan, shards, on_gpu, device=torch.device("cuda"), **ranks) as loader:
        for batch, other in zip(loader, expected, strict=True):
            assert batch.images_VnHWC.is_cuda
            assert torch.equal(batch.labels_n.cpu(), other.labels_n)
            levels = (batch.images_VnHWC.cpu().int() - other.images_VnHWC.int()).abs().float()
            assert levels.mean() < 2
            assert levels.quantile(0.99) < 12
