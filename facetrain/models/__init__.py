"""Backbones: networks from a face to its embedding, built by the name in `model.name`."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from facetrain.config import ModelConfig
from facetrain.models.casianet import CasiaNet
from facetrain.models.iresnet import IResNet
from facetrain.models.norm import convert_sync_batchnorm

if TYPE_CHECKING:
    from facetrain.models.torchvision_backbone import TorchvisionBackbone

__all__ = ["Backbone", "build_backbone", "convert_sync_batchnorm"]

_IRESNET_DEPTHS: dict[str, Literal[18, 50, 100]] = {"iresnet18": 18, "iresnet50": 50, "iresnet100": 100}


class Backbone(nn.Module):
    """A network and the optional linear head behind it: face in, embedding out.

    Weights are named `trunk.*` and `head.*` in every case, so that a trunk's fit with and without a head.
    """

    def __init__(self, trunk: "CasiaNet | IResNet | TorchvisionBackbone", embedding_dim: int | None) -> None:
        """Join a trunk to its head.

        Args:
            trunk: The network, float [B, C, H, W] -> [B, its own width].
            embedding_dim: Width of the linear head; None for no head.
        """
        super().__init__()
        own_dim = trunk.embedding_dim
        self.trunk = trunk
        self.head = nn.Identity() if embedding_dim is None else nn.Linear(own_dim, embedding_dim)
        self.embedding_dim = own_dim if embedding_dim is None else embedding_dim
        """D, the width of the embedding."""

    def forward(self, images: Tensor) -> Tensor:
        """Embed float [B, C, H, W] in [-1, 1] as [B, D], not normalised."""
        return self.head(self.trunk(images))  # type: ignore[no-any-return]


def build_backbone(config: ModelConfig, *, channels: int, image_px: int, with_values: bool = True) -> Backbone:
    """Make the network that `model.name` names, with fresh weights or those of `model.imagenet_weights`.

    `model.init_from` and `model.sync_batchnorm` are not acted on here.

    Args:
        config: The section `model`.
        channels: Channels of the input, 1 or 3.
        image_px: Side of the input in pixels; iResNet alone depends on it.
        with_values: False reads no file, and looks at no number that it draws: for tensors that have no data.

    Raises:
        ValueError: The name is unknown, or the network can't have the channels, the normalisation or the weights.
    """
    return Backbone(_build_trunk(config, channels, image_px, with_values), config.embedding_dim)


def _build_trunk(
    config: ModelConfig, channels: int, image_px: int, with_values: bool
) -> "CasiaNet | IResNet | TorchvisionBackbone":
    name = config.name
    if name == "casianet":
        return CasiaNet(channels=channels, norm=config.norm)
    if name in _IRESNET_DEPTHS:
        return IResNet(depth=_IRESNET_DEPTHS[name], channels=channels, image_px=image_px, norm=config.norm)
    if not name.startswith("torchvision:"):
        raise ValueError(
            f"model.name: expected casianet, {', '.join(_IRESNET_DEPTHS)} or torchvision:NAME, got '{name}'"
        )
    if channels != 3:
        raise ValueError(f"data.colour: '{name}' takes rgb, got grey")
    if config.norm != "batch":
        raise ValueError(f"model.norm: '{name}' has its own normalisation, expected 'batch', got '{config.norm}'")
    # Here, because torchvision takes a second to import and no other backbone needs it.
    from facetrain.models.torchvision_backbone import TorchvisionBackbone

    weights = None if config.imagenet_weights is None or not with_values else Path(config.imagenet_weights)
    return TorchvisionBackbone(name.removeprefix("torchvision:"), imagenet_weights=weights, drawn=with_values)
