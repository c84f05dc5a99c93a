"""Section `data`: which images, and what happens to them before the network."""

from dataclasses import dataclass
from typing import Literal

from facetrain.config.bounds import at_least


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and what happens to them before the network."""

    shards: str = "shards"
    """Folder made by `facetrain pack`."""
    shard_px: int = 112
    """Side of the square images in the shards, in pixels; checked against their manifest."""
    crop_px: int | None = None
    """Side of the centre crop taken from a shard image, in shard pixels; null takes the whole image."""
    image_px: int = 112
    """Side of the network's input, in pixels; the crop is resized to it."""
    colour: Literal["rgb", "grey"] = "rgb"
    """Channels of the network's input."""
    mirror: bool = True
    """Augmentation: mirror half of the images."""
    crop_jitter_px: int = 0
    """Augmentation: the crop moves by up to this many shard pixels along each axis."""
    colour_jitter: float = 0.0
    """Augmentation: brightness and contrast each change by a factor in 1 -/+ this fraction, in [0, 1)."""
    holdout_identities: int = 0
    """Identities, drawn by the seed, that are never trained on and give the held-out pairs."""
    exclude: tuple[str, ...] = ()
    """Names of identities that are left out of training, such as people who are also in the test set."""
    workers: int = 1
    """Decoding processes per rank; 0 decodes in the training process."""
    prefetch: int = 4
    """Batches that each worker holds ready."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        for name in ("shard_px", "image_px", "prefetch"):
            at_least(f"data.{name}", getattr(self, name), 1)
        for name in ("crop_jitter_px", "holdout_identities", "workers"):
            at_least(f"data.{name}", getattr(self, name), 0)
        if self.crop_px is not None and not 1 <= self.crop_px <= self.shard_px:
            raise ValueError(f"data.crop_px: expected 1 to data.shard_px ({self.shard_px}), got {self.crop_px}")
        if not 0 <= self.colour_jitter < 1:
            raise ValueError(f"data.colour_jitter: expected a fraction in [0, 1), got {self.colour_jitter}")

    @property
    def channels(self) -> int:
        """Channels of the network's input."""
        return 3 if self.colour == "rgb" else 1
