"""torchvision's classification networks without their classifier. Sole importer of torchvision."""

import pickle
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, unset_fake_temporarily

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of red, green and blue, as fractions, that torchvision's weights expect to be subtracted."""

IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviation of red, green and blue, as fractions, that torchvision's weights expect to be divided by."""

_OWN_RANGE = ("googlenet", "inception_v3")
"""Networks whose ImageNet weights come from TensorFlow and take [-1, 1] as it is; both have auxiliary classifiers."""

_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
"""Prefixes of the auxiliary classifiers' weights, which are never built here."""


class TorchvisionBackbone(nn.Module):
    """A network of torchvision up to what its classifier takes: [B, 1024] of GoogLeNet, [B, 2048] of ResNet-50.

    Its last linear layer, `fc` or the last of `classifier`, becomes the identity; auxiliary classifiers are left out
    and dropout is off. Where ImageNet weights expect the mean subtracted and the deviation divided by, the network
    does that itself, so that it takes [-1, 1] like every other backbone, whether its weights are fresh or loaded.
    """

    embedding_dim: int
    """The width of what the classifier takes."""

    scale: Tensor
    shift: Tensor

    def __init__(self, name: str, *, imagenet_weights: Path | None = None, drawn: bool = True) -> None:
        """Make the network, with fresh weights or with those of a file.

        Args:
            name: torchvision's name of the network, for example 'googlenet' or 'resnet50'.
            imagenet_weights: torchvision's weights, a .pth or .safetensors file; the classifier's are ignored.
            drawn: False leaves out GoogLeNet's and Inception's own initialisation, which looks at what it draws.

        Raises:
            ValueError: torchvision has no such network, its classifier is not of a known form, or the file is missing,
                can't be read or isn't of this network.
        """
        super().__init__()
        self.network = _build_network(name, drawn)
        classifier = _last_linear(self.network, name)
        self.embedding_dim = int(self.network.get_parameter(f"{classifier}.weight").shape[1])
        parent, _, attribute = classifier.rpartition(".")
        setattr(self.network.get_submodule(parent), attribute, nn.Identity())
        for module in self.network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        mean, std = ((0.5,) * 3, (0.5,) * 3) if name in _OWN_RANGE else (IMAGENET_MEAN, IMAGENET_STD)
        # (x / 2 + 1 / 2 - mean) / std, which is exactly x for the networks that take [-1, 1].
        std_C11, mean_C11 = torch.tensor(std).view(3, 1, 1), torch.tensor(mean).view(3, 1, 1)
        self.register_buffer("scale", 0.5 / std_C11, persistent=False)
        self.register_buffer("shift", (0.5 - mean_C11) / std_C11, persistent=False)
        if imagenet_weights is not None:
            _load_weights(self.network, imagenet_weights, ignored=(f"{classifier}.", *_AUXILIARY))

    def forward(self, images: Tensor) -> Tensor:
        """Embed float [B, 3, H, W] in [-1, 1] as [B, embedding_dim]."""
        return self.network(images * self.scale + self.shift)  # type: ignore[no-any-return]


def _build_network(name: str, drawn: bool) -> nn.Module:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ValueError(
            f"model.name: torchvision has no network '{name}', expected one such as googlenet, resnet18, resnet34,"
            " resnet50, resnet101, resnet152"
        )
    arguments = {"aux_logits": False, "init_weights": drawn} if name in _OWN_RANGE else {}
    try:
        return torchvision.models.get_model(name, weights=None, **arguments)  # type: ignore[no-any-return]
    except DataDependentOutputException:  # tensors have no data here, and ConvNeXt, RegNet and others look at theirs
        with unset_fake_temporarily() as mode:
            network: nn.Module = torchvision.models.get_model(name, weights=None, **arguments)
            _drop_data(network, mode)
        return network


def _drop_data(network: nn.Module, mode: Any) -> None:
    """Replace a network's tensors by those that have shapes and no data in a mode of torch's fake tensors."""
    for module in network.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            setattr(module, name, nn.Parameter(mode.from_tensor(parameter.detach()), parameter.requires_grad))
        for name, buffer in [*module.named_buffers(recurse=False)]:
            setattr(module, name, mode.from_tensor(buffer))


def _last_linear(network: nn.Module, name: str) -> str:
    """Return the dotted name of the classifier's last linear layer."""
    for attribute in ("fc", "classifier"):
        classifier = getattr(network, attribute, None)
        if isinstance(classifier, nn.Linear):
            return attribute
        if isinstance(classifier, nn.Sequential) and isinstance(classifier[-1], nn.Linear):
            return f"{attribute}.{len(classifier) - 1}"
    raise ValueError(f"model.name: 'torchvision:{name}' has no linear classifier `fc` or `classifier` to remove")


def _load_weights(network: nn.Module, path: Path, *, ignored: tuple[str, ...]) -> None:
    """Put the weights of a file into the network; all but the ignored ones must be there, and no others."""
    weights = {key: value for key, value in _read_weights(path).items() if not key.startswith(ignored)}
    own = network.state_dict()
    # Files older than torch 0.4.1 don't hold this counter; load_state_dict then fills it in by itself.
    missing = [key for key in own if key not in weights and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in weights if key not in own]
    misfits = [key for key in weights if key in own and weights[key].shape != own[key].shape]
    for problem, keys in (("lacks", missing), ("has unexpected", unexpected), ("has other shapes at", misfits)):
        if keys:
            listed = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise ValueError(f"model.imagenet_weights: {path} {problem} {listed}; it is of another network")
    network.load_state_dict(weights)


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"model.imagenet_weights: no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"model.imagenet_weights: {path} can't be read as weights: {reason}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"model.imagenet_weights: {path} holds no state dict, expected names and their tensors")
    return weights
