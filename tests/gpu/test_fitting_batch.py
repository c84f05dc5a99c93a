"""How many images of one forward fit on a GPU."""

import pytest
import torch

from facetrain.config import ModelConfig
from facetrain.embed import BATCH_IMAGES, MAX_BATCH_IMAGES, fitting_batch
from facetrain.models import build_backbone
from facetrain.world import World


def test_on_a_cpu_it_is_that_of_training() -> None:
    backbone = build_backbone(ModelConfig(), channels=3, image_px=32)
    assert fitting_batch(backbone, (32, 32, 3), world=World(), precision="float32") == BATCH_IMAGES


@pytest.mark.gpu
def test_less_memory_means_fewer_images() -> None:
    world = World(device=torch.device("cuda", 0))
    backbone = build_backbone(ModelConfig(), channels=3, image_px=112).to(world.device)
    roomy = fitting_batch(backbone, (112, 112, 3), world=world, precision="float32")
    assert roomy == MAX_BATCH_IMAGES
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(1.5 * 2**30 / total_bytes)
    try:
        tight = fitting_batch(backbone, (112, 112, 3), world=world, precision="float32")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 1 <= tight < roomy
    assert tight & (tight - 1) == 0
