import pytest
import torch
from torch import nn

from facetrain.models.iresnet import BLOCKS_PER_STAGE, IResNet


@pytest.mark.parametrize(("depth", "expected"), [(18, 24_025_600), (50, 43_590_848), (100, 65_156_160)])
def test_parameter_counts_are_those_of_arcface(depth, expected):
    with torch.device("meta"):
        network = IResNet(depth=depth, channels=3, image_px=112, norm="batch")
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


@pytest.mark.parametrize("depth", [18, 50, 100])
def test_the_name_counts_the_layers(depth):
    # Two convolutions a block, the stem and the fully connected layer.
    assert 2 * sum(BLOCKS_PER_STAGE[depth]) + 2 == depth


@pytest.mark.parametrize("image_px", [32, 48, 56])
def test_the_fully_connected_layer_fits_the_image_size(image_px):
    network = IResNet(depth=18, channels=1, image_px=image_px, norm="batch")
    assert network(torch.zeros(2, 1, image_px, image_px)).shape == (2, 512)


def test_resolution_halves_in_each_stage_and_not_in_the_stem():
    network, sizes = IResNet(depth=18, channels=3, image_px=112, norm="none"), []
    for module in (network.stem, *network.stages):
        module.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[1:])))
    network(torch.zeros(1, 3, 112, 112))
    assert sizes == [(64, 112, 112), (64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)]


@pytest.mark.parametrize("norm", ["group", "none"])
def test_no_batchnorm_is_left_without_batch_statistics(norm):
    network = IResNet(depth=18, channels=3, image_px=32, norm=norm)
    assert not any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in network.modules())


def test_without_normalisation_a_deep_network_starts_at_the_scale_of_its_shortcuts():
    torch.manual_seed(0)
    network, images = IResNet(depth=50, channels=3, image_px=32, norm="none"), torch.rand(2, 3, 32, 32) * 2 - 1
    shortcuts = network.stem(images)
    for stage in network.stages:
        shortcuts = stage[0].shortcut(shortcuts)
    assert torch.equal(network.stages(network.stem(images)), shortcuts)
    assert 0.1 < shortcuts.std() < 10
