"""Section `data`: which images, and what happens to them before the network."""

from dataclasses import dataclass
from typing import Literal

from facetrain.config.bounds import at_least


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and what happens to them before the network."""

    shards: str = "shards"
    """Folder made by `facetrain pack`; or its URL (http, https, s3 and whatever fsspec opens), or `pipe:` and a shell
    command with {name}, and perhaps {start}, for a file of it and the byte to begin at."""
    cache_dir: str | None = None
    """Folder on each node's disk for the shards of a URL; runs may share it."""
    cache_bytes: int | None = None
    """Size of all shards in `cache_dir`; the longest unused make room. Null: all of the disk. Shards that fit are
    fetched before the run starts, others when they are read."""
    fetch_timeout_s: float = 30.0
    """Seconds without a byte after which a connection counts as broken, and is tried again where it broke."""
    fetch_attempts: int = 6
    """Tries in a row that may bring nothing, with growing pauses."""
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
    """Identities, drawn at random, that are never trained on and give the held-out pairs."""
    holdout_seed: int = 0
    """Draws them and their pairs; not run.seed, so that runs of several seeds are judged by the same people."""
    exclude: tuple[str, ...] = ()
    """Names of identities that are left out of training, such as people who are also in the test set."""
    min_images: int = 2
    """Identities with fewer images are left out of training; at least train.images_per_identity counts."""
    window_shards: int | None = None
    """Shards that each virtual node draws from at a time, for sets that are larger than a node's disk; null draws each
    batch from all shards."""
    virtual_nodes: int = 1
    """Parts of the shards with a window each, such as one for each node; a divisor of train.global_pairs."""
    partitioned: bool = False
    """Nodes hold different shards on disks of their own: each has the folder's other files and the tars of its part."""
    on_bad_image: Literal["error", "skip"] = "error"
    """What an image that can't be decoded does: ends the run, or is counted, logged and replaced by another image of
    its identity."""
    decode: Literal["cpu", "gpu"] = "cpu"
    """Where JPEGs are decoded and augmented: in the workers, or by nvJPEG on each rank's GPU, for which they read."""
    workers: int = 1
    """Decoding processes per rank; 0 decodes in the training process."""
    prefetch: int = 4
    """Batches that each worker holds ready."""
    start_method: Literal["fork", "spawn"] = "fork"
    """How workers start: forked in milliseconds, or spawned in seconds, for what doesn't survive a fork.

    PyTorch advises against forking beside NCCL over InfiniBand.
    """

    def __post_init__(self) -> None:
        """Check the bounds."""
        for name in ("shard_px", "image_px", "prefetch", "fetch_attempts", "virtual_nodes"):
            at_least(f"data.{name}", getattr(self, name), 1)
        if self.window_shards is not None:
            self._check_window(self.window_shards)
        if self.decode == "gpu" and self.on_bad_image != "error":
            raise ValueError(
                f"data.on_bad_image: expected 'error' with data.decode gpu, which decodes whole batches, got"
                f" '{self.on_bad_image}'"
            )
        if self.partitioned:
            self._check_partitioned()
        self._check_cache()
        at_least("data.min_images", self.min_images, 2)
        for name in ("crop_jitter_px", "holdout_identities", "holdout_seed", "workers"):
            at_least(f"data.{name}", getattr(self, name), 0)
        if self.crop_px is not None and not 1 <= self.crop_px <= self.shard_px:
            raise ValueError(f"data.crop_px: expected 1 to data.shard_px ({self.shard_px}), got {self.crop_px}")
        if not 0 <= self.colour_jitter < 1:
            raise ValueError(f"data.colour_jitter: expected a fraction in [0, 1), got {self.colour_jitter}")

    def _check_window(self, window_shards: int) -> None:
        at_least("data.window_shards", window_shards, 1)
        if self.holdout_identities:
            raise ValueError(
                "data.holdout_identities: expected 0 with data.window_shards, since held-out pairs lie in all shards,"
                f" got {self.holdout_identities}; eval.images can judge the run"
            )

    def _check_partitioned(self) -> None:
        if self.is_remote or self.window_shards is not None:
            given = self.shards if self.is_remote else f"data.window_shards {self.window_shards}"
            raise ValueError(f"data.partitioned: goes with shards in a folder of each node, got {given}")
        if self.holdout_identities:
            raise ValueError(
                "data.holdout_identities: expected 0 with data.partitioned, since held-out pairs lie in all shards,"
                f" got {self.holdout_identities}; eval.images can judge the run"
            )

    def _check_cache(self) -> None:
        if self.cache_bytes is not None:
            at_least("data.cache_bytes", self.cache_bytes, 1)
        if not self.fetch_timeout_s > 0:
            raise ValueError(f"data.fetch_timeout_s: expected more than 0, got {self.fetch_timeout_s}")
        if self.is_remote and self.cache_dir is None:
            raise ValueError(f"data.cache_dir: expected a folder on this node's disk for {self.shards}, got null")
        if self.shards.startswith("pipe:") and "{name}" not in self.shards:
            raise ValueError(f"data.shards: expected {{name}}, for the file to write, in '{self.shards}'")

    @property
    def is_remote(self) -> bool:
        """Whether `shards` is no folder of this file system."""
        return "://" in self.shards or self.shards.startswith("pipe:")

    @property
    def channels(self) -> int:
        """Channels of the network's input."""
        return 3 if self.colour == "rgb" else 1
