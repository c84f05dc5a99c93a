"""Section `model`: the backbone."""

from dataclasses import dataclass
from typing import Literal

from facetrain.config.bounds import at_least


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The backbone that turns a face into an embedding."""

    name: str = "casianet"
    """casianet, iresnet18, iresnet50, iresnet100, or torchvision:NAME with its classifier removed."""
    embedding_dim: int | None = None
    """Width of the embedding; null keeps the backbone's own, a number adds a linear layer to that width."""
    norm: Literal["batch", "group", "none"] = "batch"
    """Normalisation in casianet and iresnet; networks without batch statistics are exactly the same on any ranks."""
    sync_batchnorm: bool = False
    """Batch statistics over the images of all ranks instead of each rank's own."""
    imagenet_weights: str | None = None
    """Local file with torchvision's ImageNet weights, for torchvision:NAME."""
    init_from: str | None = None
    """Run folder or .safetensors file whose weights a new run starts from; layers that don't fit are named."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        if self.embedding_dim is not None:
            at_least("model.embedding_dim", self.embedding_dim, 1)
        if self.imagenet_weights is not None and not self.name.startswith("torchvision:"):
            raise ValueError(f"model.imagenet_weights: only for torchvision:NAME, model.name is '{self.name}'")
