import pytest
import torch
import torch.nn.functional as F
from torch import nn

from facetrain.models.casianet import CasiaNet
from facetrain.models.iresnet import IResNet

NORMS = ("batch", "group", "none")


def test_the_ten_convolutions_are_those_of_the_paper():
    network = CasiaNet(channels=1, norm="batch")
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [32, 64, 64, 128, 96, 192, 128, 256, 160, 320]
    assert {c.kernel_size for c in convolutions} == {(3, 3)}
    assert sum(c.weight.numel() for c in convolutions) == 1_751_328


@pytest.mark.parametrize(
    ("channels", "norm", "expected"), [(3, "batch", 1_754_784), (3, "group", 1_754_784), (1, "none", 1_752_768)]
)
def test_parameter_counts_are_those_of_the_docstring(channels, norm, expected):
    network = CasiaNet(channels=channels, norm=norm)
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


@pytest.mark.parametrize("image_px", [32, 56, 100, 112])
def test_any_image_size_gives_320_numbers(image_px):
    network = CasiaNet(channels=1, norm="group")
    assert network(torch.zeros(1, 1, image_px, image_px)).shape == (1, 320)


def test_the_last_map_at_100_pixels_is_7_by_7_as_in_the_paper():
    network = CasiaNet(channels=1, norm="none")
    sizes = []
    network.groups[-1].register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[2:]))
    network(torch.zeros(1, 1, 100, 100))
    assert sizes == [(7, 7)]


@pytest.mark.parametrize("norm", NORMS)
def test_embeddings_have_both_signs(norm):
    embeddings = CasiaNet(channels=3, norm=norm)(_images(4, 32))
    assert (embeddings < 0).any()
    assert (embeddings > 0).any()


def test_embeddings_stay_float32_under_bfloat16_autocast_and_float64_in_float64():
    network = CasiaNet(channels=3, norm="batch")
    with torch.autocast("cpu", torch.bfloat16):
        assert network(_images(2, 32)).dtype == torch.float32
    assert network.double()(_images(2, 32).double()).dtype == torch.float64


def test_channels_last_changes_nothing_but_rounding():
    network, images = CasiaNet(channels=3, norm="batch").double(), _images(4, 32).double()
    expected = network(images)
    network.to(memory_format=torch.channels_last)
    assert torch.allclose(network(images.to(memory_format=torch.channels_last)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [CasiaNet, lambda **kwargs: IResNet(depth=18, image_px=32, **kwargs)])
@pytest.mark.parametrize("norm", ["group", "none"])
def test_without_batch_statistics_an_embedding_depends_on_its_own_image_alone(make, norm):
    network, images = make(channels=3, norm=norm).double(), _images(4, 32).double()
    assert torch.allclose(network(images)[:1], network(images[:1]), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "make", [CasiaNet, lambda **kwargs: IResNet(depth=18, image_px=16, **kwargs)], ids=["casianet", "iresnet18"]
)
@pytest.mark.parametrize("norm", NORMS)
def test_npair_loss_between_mirror_images_falls_with_every_normalisation(make, norm):
    torch.manual_seed(0)
    network, images = make(channels=3, norm=norm), _images(8, 16)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4)
    losses = []
    for _ in range(12):
        anchors, positives = network(torch.cat([images, images.flip(3)])).chunk(2)
        loss = F.cross_entropy(anchors @ positives.T, torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def _images(count, image_px):
    """Smooth random pictures in [-1, 1], another one for each identity."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return F.interpolate(coarse, size=image_px, mode="bilinear")
