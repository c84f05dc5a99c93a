import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from facetrain.config import ModelConfig
from facetrain.models import build_backbone


def _build(name, **settings):
    return build_backbone(ModelConfig(name=name, **settings), channels=3, image_px=64)


@pytest.mark.parametrize(
    ("name", "own_dim"), [("googlenet", 1024), ("resnet18", 512), ("resnet50", 2048), ("mobilenet_v3_small", 1024)]
)
def test_the_embedding_is_what_the_classifier_took(name, own_dim):
    network = _build(f"torchvision:{name}")
    assert network.embedding_dim == own_dim
    assert network(torch.rand(2, 3, 64, 64) * 2 - 1).shape == (2, own_dim)
    assert not any(key.startswith(("trunk.network.fc", "trunk.network.aux")) for key in network.state_dict())


def test_dropout_is_off():
    network = _build("torchvision:googlenet")
    assert all(module.p == 0 for module in network.modules() if isinstance(module, nn.Dropout))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_imagenet_weights_give_what_torchvision_gives_on_normalised_input(tmp_path, suffix):
    torch.manual_seed(0)
    reference = torchvision.models.resnet18(weights=None).eval()
    network = _build("torchvision:resnet18", imagenet_weights=_save(reference, tmp_path / f"weights{suffix}")).eval()
    reference.fc = nn.Identity()
    pixels = torch.rand(2, 3, 64, 64)
    normalised = torchvision.transforms.functional.normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.no_grad():
        assert torch.allclose(network(pixels * 2 - 1), reference(normalised), rtol=1e-4, atol=1e-4)


def test_googlenet_weights_load_without_auxiliary_classifiers_and_take_the_same_input(tmp_path):
    torch.manual_seed(0)
    reference = torchvision.models.googlenet(
        weights=None, aux_logits=True, init_weights=True, transform_input=True
    ).eval()
    network = _build("torchvision:googlenet", imagenet_weights=_save(reference, tmp_path / "weights.pth")).eval()
    reference.fc = nn.Identity()
    pixels = torch.rand(2, 3, 64, 64)
    # As ImageNet weights are used in torchvision: normalised, then transformed back inside the network.
    normalised = torchvision.transforms.functional.normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.no_grad():
        assert torch.allclose(network(pixels * 2 - 1), reference(normalised), rtol=1e-4, atol=1e-5)


def test_weights_of_another_network_are_refused_by_file_and_key(tmp_path):
    path = _save(torchvision.models.resnet18(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"model.imagenet_weights: .*weights.pth lacks layer1.0.conv3.weight, .* more"):
        _build("torchvision:resnet50", imagenet_weights=path)
    wider = _save(torchvision.models.resnet50(), tmp_path / "wider.pth")
    with pytest.raises(ValueError, match=r"wider.pth has other shapes at layer1.0.conv1.weight"):
        _build("torchvision:resnext50_32x4d", imagenet_weights=wider)


def test_files_that_are_no_weights_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"model.imagenet_weights: no such file: .*missing.pth"):
        _build("torchvision:resnet18", imagenet_weights=str(tmp_path / "missing.pth"))
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("not weights")
        with pytest.raises(ValueError, match=rf"model.imagenet_weights: .*{name} can't be read as weights") as caught:
            _build("torchvision:resnet18", imagenet_weights=str(tmp_path / name))
        assert "\n" not in str(caught.value)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list.pth holds no state dict"):
        _build("torchvision:resnet18", imagenet_weights=str(tmp_path / "list.pth"))


@pytest.mark.parametrize("name", ["resnet19", "squeezenet1_0"])
def test_networks_that_torchvision_lacks_or_that_have_no_linear_classifier_are_refused(name):
    with pytest.raises(ValueError, match=rf"model.name: .*{name}"):
        _build(f"torchvision:{name}")


def test_grey_input_and_other_normalisations_are_refused():
    with pytest.raises(ValueError, match=r"data.colour: 'torchvision:resnet18' takes rgb, got grey"):
        build_backbone(ModelConfig(name="torchvision:resnet18"), channels=1, image_px=64)
    with pytest.raises(ValueError, match=r"model.norm: .* expected 'batch', got 'group'"):
        _build("torchvision:resnet18", norm="group")


def test_an_unknown_backbone_names_the_choices():
    with pytest.raises(
        ValueError,
        match=r"model.name: expected casianet, iresnet18, iresnet50, iresnet100 or torchvision:NAME, got 'vgg'",
    ):
        _build("vgg")


@pytest.mark.parametrize("name", ["casianet", "iresnet18", "torchvision:resnet18"])
def test_a_head_of_512_fits_every_backbone_and_leaves_the_trunks_names(name):
    plain, headed = _build(name), _build(name, embedding_dim=512)
    assert headed.embedding_dim == 512
    assert headed(torch.zeros(2, 3, 64, 64)).shape == (2, 512)
    assert set(headed.state_dict()) - set(plain.state_dict()) == {"head.weight", "head.bias"}


def _save(network, path):
    if path.suffix == ".safetensors":
        save_file(network.state_dict(), path)
    else:
        torch.save(network.state_dict(), path)
    return str(path)
