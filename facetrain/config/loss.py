"""Section `loss`: the objective."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The objective."""

    name: Literal["npair-mc", "npair-ovo", "tuplet"] = "npair-mc"
    """npair-mc: the multi-class N-pair loss (Sohn, NeurIPS 2016); npair-ovo: one against one; tuplet: other anchors."""
    l2_weight: float = 0.002
    """Weight of the penalty mean ||f||^2 over all 2N embeddings."""
    symmetric: bool = False
    """npair-mc: the mean of anchors against all positives and of positives against all anchors."""
    temperature: float | None = None
    """A number: cosines divided by it take the place of inner products; null: embeddings aren't normalised."""
    reduce_precision: Literal["float32", "bfloat16"] = "float32"
    """In which gradients of gathered embeddings are summed over ranks; bfloat16: half the bytes, 0.05% error."""
    tile_bytes: int = 1 << 25
    """Memory for logits at a time, in bytes: the n x N of a rank are made in tiles of rows."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        if self.l2_weight < 0:
            raise ValueError(f"loss.l2_weight: expected 0 or more, got {self.l2_weight}")
        if self.symmetric and self.name != "npair-mc":
            raise ValueError(f"loss.symmetric: goes with loss.name=npair-mc, got '{self.name}'")
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(f"loss.temperature: expected more than 0, or null, got {self.temperature}")
