"""Batch statistics over all ranks against one process that holds the whole batch."""

import pytest
import torch
import torch.distributed as dist
from distributed.ranks import run_ranks
from torch import nn

from facetrain.models import CasiaNet, convert_sync_batchnorm
from facetrain.models.norm import AllRanksBatchNorm, norm2d
from facetrain.world import World

COUNTS = {"even": {2: (4, 4), 4: (2, 2, 2, 2)}, "uneven": {2: (1, 7), 4: (3, 1, 2, 2)}}
"""Images of each rank."""


def _layers():
    """Name, network and the shape of an image, in float64; each holds a case of its own."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3, eps=1e-3), nn.ReLU())
    return [
        ("nested", nn.Sequential(first, nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.BatchNorm1d(5))), (3, 5, 5)),
        ("no affine, plain average", nn.BatchNorm2d(3, affine=False, momentum=None), (3, 4, 4)),
        ("no running statistics", nn.BatchNorm2d(3, track_running_stats=False), (3, 4, 4)),
        ("far from zero", nn.BatchNorm2d(3), (3, 4, 4)),
    ]


def _train_twice(network, images):
    """Two forward and backward passes; what comes out, and the gradient of a loss summed over images."""
    images = images.clone().requires_grad_()
    weights = torch.linspace(-1, 1, 7, dtype=images.dtype)
    for _ in range(2):
        outputs = network(images)
        (outputs**2 * weights[torch.arange(outputs.shape[1]) % 7].view(-1, *[1] * (outputs.dim() - 2))).sum().backward()
    return outputs.detach(), images.grad


def _compare(world):
    for split in COUNTS:
        counts = COUNTS[split][world.world_size]
        rows = slice(sum(counts[: world.rank]), sum(counts[: world.rank + 1]))
        for (name, alone, shape), (_, shared, _) in zip(_layers(), _layers(), strict=True):
            case = f"{name}, {split} over {world.world_size}"
            alone.double(), shared.double()
            images = torch.randn(sum(counts), *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            images = images + 100 if name == "far from zero" else images
            parameters = list(shared.parameters())
            shared = convert_sync_batchnorm(shared, world)
            assert not any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in shared.modules())
            assert all(a is b for a, b in zip(parameters, shared.parameters(), strict=True)), case
            outputs, grads = _train_twice(alone, images)
            outputs_local, grads_local = _train_twice(shared, images[rows])
            _assert_near(outputs_local, outputs[rows], case)
            _assert_near(grads_local, grads[rows], case)
            for buffer, expected in zip(shared.buffers(), alone.buffers(), strict=True):
                _assert_near(buffer, expected, case)
            for parameter, expected in zip(shared.parameters(), alone.parameters(), strict=True):
                dist.all_reduce(parameter.grad)
                _assert_near(parameter.grad, expected.grad, case)
            alone.load_state_dict(shared.state_dict())
            _assert_near(shared.eval()(images), alone.eval()(images), case)


def _assert_near(actual, expected, case):
    assert actual.shape == expected.shape, case
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error < 1e-10, f"{case}: {error:.1e}"


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_equal_one_process_on_the_whole_batch(world_size):
    run_ranks(_compare, world_size)


def test_one_rank_keeps_its_layers():
    network = CasiaNet(channels=1, norm="batch")
    before = list(network.modules())
    assert list(convert_sync_batchnorm(network, World()).modules()) == before


@pytest.mark.parametrize("affine", [True, False])
def test_gradients_of_the_synchronised_layer_match_finite_differences(affine):
    layer = AllRanksBatchNorm(nn.BatchNorm1d(3, affine=affine).double(), World())
    images = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, images)


def test_bfloat16_input_has_float32_statistics_and_keeps_dtype_and_layout():
    torch.manual_seed(0)
    images = (torch.randn(64, 8, 6, 6) + 100).bfloat16().to(memory_format=torch.channels_last)
    layer, reference = AllRanksBatchNorm(nn.BatchNorm2d(8, momentum=1.0), World()), nn.BatchNorm2d(8, momentum=1.0)
    outputs = layer(images)
    reference(images.double().float())
    assert outputs.dtype == torch.bfloat16
    assert outputs.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(layer.running_mean, reference.running_mean, rtol=1e-6)
    assert torch.allclose(layer.running_var, reference.running_var, rtol=1e-4)


def test_groupnorm_normalises_sixteen_channels_together():
    assert norm2d("group", 160).num_groups == 10
