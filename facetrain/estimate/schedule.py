"""How a step passes a rank's images through the network: at once, positives first, or chunk by chunk."""

from dataclasses import dataclass

from facetrain.config import TrainConfig
from facetrain.data.plan import pairs_per_rank


@dataclass(frozen=True)
class Schedule:
    """The passes of a step on one rank."""

    pairs: int
    """n, the pairs of the rank."""
    images: int
    """Images of one forward."""
    forwards: int
    """Forwards of a step."""
    backwards: int
    """Backwards of a step."""
    alive: int
    """Forwards whose activations live at the same time."""

    @property
    def is_chunked(self) -> bool:
        """Whether chunks are embedded twice (GradCache)."""
        return self.forwards > self.backwards


def schedule_of(train: TrainConfig, world_size: int) -> Schedule:
    """Return the passes of a step.

    Raises:
        ValueError: The pairs can't be divided among the ranks, or those of a rank into chunks of `train.micro_pairs`.
    """
    pairs = pairs_per_rank(train.global_pairs, world_size)
    micro_pairs = train.micro_pairs or pairs
    if pairs % micro_pairs:
        raise ValueError(
            f"train.micro_pairs: expected a divisor of the {pairs} pairs of a process (train.global_pairs /"
            f" {world_size} processes), got {micro_pairs}"
        )
    if micro_pairs < pairs:
        chunks = pairs // micro_pairs
        return Schedule(pairs=pairs, images=2 * micro_pairs, forwards=2 * chunks, backwards=chunks, alive=1)
    if train.overlap:
        return Schedule(pairs=pairs, images=pairs, forwards=2, backwards=2, alive=2)
    return Schedule(pairs=pairs, images=2 * pairs, forwards=1, backwards=1, alive=1)
