"""Section `train`: the optimization."""

import re
from dataclasses import dataclass
from typing import Literal

from facetrain.config.bounds import at_least


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimization."""

    global_pairs: int = 128
    """N: pairs of the global batch, each of another identity; pairs per rank are N / world size."""
    images_per_identity: int = 2
    """K, even: an identity gives K different images, K / 2 of the pairs, so that a batch has 2 N / K identities."""
    micro_pairs: int | None = None
    """Pairs per forward, a divisor of N / world size: less memory for one more forward (GradCache); null: all."""
    overlap: bool = False
    """Gather positives while anchors are embedded, in two forwards; for networks without batch statistics."""
    steps: int = 1000
    """Optimizer steps of the whole run; 0 evaluates the untrained network."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    """sgd has momentum."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    momentum: float = 0.9
    """Momentum of sgd."""
    weight_decay: float = 0.0
    """Weight decay of weight matrices and kernels; biases and normalisation have none."""
    schedule: Literal["constant", "step", "cosine"] = "constant"
    """How the learning rate goes on after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    drop_steps: tuple[int, ...] = ()
    """schedule=step: the steps at which the learning rate is multiplied by drop_factor."""
    drop_factor: float = 0.1
    """schedule=step: the factor of each drop."""
    clip_norm: float = 0.0
    """Largest norm of the averaged gradient of the whole objective; 0 is no clipping."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast forward; weights, statistics, loss and optimizer stay float32."""
    compile: bool = False
    """Compile the network by torch.compile for training, where minutes of warm-up pay; not at zero_stage 3."""
    straggler_factor: float = 2.0
    """Warn where a rank takes this many times the median rank's seconds for data and forward; for data alone where the
    forward exchanges too, by `model.sync_batchnorm` or at ZeRO 3."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights too are sharded over the ranks."""
    log_every_steps: int = 20
    """Steps between log lines and metrics."""
    save_every_steps: int = 500
    """Steps between checkpoints; one is always written at the end."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept, besides the best."""
    async_checkpoint: bool = False
    """Write checkpoints beside the training, from a copy in rank 0's memory; the mining table's part isn't."""
    max_failed_saves: int = 3
    """Checkpoints in a row that can't be written, as on a full disk, without ending the training."""
    profile_steps: str | None = None
    """A:B shows where the time of steps A to B - 1 goes, and traces the last, in profile/ of the run folder."""

    @property
    def profiled(self) -> range | None:
        """The steps of `profile_steps`."""
        if self.profile_steps is None:
            return None
        first, _, end = self.profile_steps.partition(":")
        return range(int(first), int(end))

    def __post_init__(self) -> None:
        """Check the bounds."""
        if self.profile_steps is not None:
            self._check_profile(self.profile_steps)
        at_least("train.global_pairs", self.global_pairs, 2)
        pairs_each, odd = divmod(self.images_per_identity, 2)
        if pairs_each < 1 or odd or self.global_pairs % pairs_each or self.global_pairs < 2 * pairs_each:
            raise ValueError(
                f"train.images_per_identity: expected an even number K, of which K / 2 pairs divide train.global_pairs"
                f" = {self.global_pairs} into two identities or more, got {self.images_per_identity}"
            )
        for name in ("log_every_steps", "save_every_steps", "keep_checkpoints"):
            at_least(f"train.{name}", getattr(self, name), 1)
        at_least("train.max_failed_saves", self.max_failed_saves, 0)
        at_least("train.steps", self.steps, 0)
        at_least("train.warmup_steps", self.warmup_steps, 0)
        if self.micro_pairs is not None:
            at_least("train.micro_pairs", self.micro_pairs, 1)
        if self.learning_rate <= 0:
            raise ValueError(f"train.learning_rate: expected more than 0, got {self.learning_rate}")
        for name in ("weight_decay", "clip_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name}: expected 0 (off) or more, got {getattr(self, name)}")
        if self.compile and self.zero_stage == 3:
            raise ValueError("train.compile: goes with train.zero_stage 0, 1 or 2, got 3")
        if self.straggler_factor <= 1:
            raise ValueError(f"train.straggler_factor: expected more than 1, got {self.straggler_factor}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"train.momentum: expected a fraction in [0, 1), got {self.momentum}")
        if not 0 < self.drop_factor < 1:
            raise ValueError(f"train.drop_factor: expected a fraction in (0, 1), got {self.drop_factor}")
        if (self.schedule == "step") != bool(self.drop_steps):
            raise ValueError(
                f"train.drop_steps: goes with train.schedule=step, got {list(self.drop_steps)} with '{self.schedule}'"
            )
        if list(self.drop_steps) != sorted(set(self.drop_steps)):
            raise ValueError(f"train.drop_steps: expected rising steps, got {list(self.drop_steps)}")

    def _check_profile(self, profile_steps: str) -> None:
        is_range = re.fullmatch(r"\d+:\d+", profile_steps) is not None
        first, end = map(int, profile_steps.split(":")) if is_range else (0, 0)
        if end - first < 2 or end > self.steps:
            raise ValueError(
                "train.profile_steps: expected A:B, two steps or more up to train.steps ="
                f" {self.steps}, such as 10:20, got '{profile_steps}'"
            )
