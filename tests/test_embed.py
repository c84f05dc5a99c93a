import numpy as np
import pytest
import torch
from distributed.ranks import run_ranks

from facetrain.config import ModelConfig
from facetrain.embed import embed_images
from facetrain.models import build_backbone
from facetrain.world import World

NUM_IMAGES = 37


def decode(image: int) -> np.ndarray:
    return np.random.default_rng(image).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def embed(world, *, mirror=False, precision="float32", decode=decode):
    torch.manual_seed(0)
    backbone = build_backbone(ModelConfig(), channels=3, image_px=32)
    backbone.train()
    embeddings = embed_images(
        backbone, decode, NUM_IMAGES, world=world, precision=precision, mirror=mirror, batch_images=8
    )
    assert backbone.training
    return embeddings.numpy()


def test_embeddings_are_the_same_to_the_bit_on_any_number_of_ranks():
    expected = embed(World())
    assert expected.shape == (NUM_IMAGES, 320)
    assert expected.dtype == np.float32
    for world_size in (2, 7):  # seven ranks for five batches: some have none
        for embeddings in run_ranks(embed, world_size):
            np.testing.assert_array_equal(embeddings, expected)


def test_mirroring_adds_the_embedding_of_the_flipped_image():
    flipped = embed(World(), decode=lambda image: decode(image)[:, ::-1])
    np.testing.assert_allclose(embed(World(), mirror=True), embed(World()) + flipped, atol=1e-5)


def test_bfloat16_stays_near_float32():
    exact, rough = embed(World()), embed(World(), precision="bfloat16")
    cosine = (exact * rough).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rough, axis=1)
    assert cosine.min() > 0.99


def test_an_image_that_cannot_be_read_is_the_error():
    def broken(image: int) -> np.ndarray:
        raise ValueError(f"image {image}: not a JPEG")

    with pytest.raises(ValueError, match="image 0: not a JPEG"):
        embed(World(), decode=broken)
