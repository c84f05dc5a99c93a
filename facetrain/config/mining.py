"""Section `mining`: which hard negative classes share a batch."""

from dataclasses import dataclass
from typing import Literal

from facetrain.config.bounds import at_least


@dataclass(frozen=True, kw_only=True)
class MiningConfig:
    """Which hard negative classes share a batch (Sohn 2016, section 3)."""

    mode: Literal["off", "auto", "gathered", "table", "quota"] = "off"
    """off: random classes; gathered: greedy over candidates embedded by all ranks; table: over the embeddings of recent
    training steps; quota: as gathered, with as many classes of each virtual node; auto chooses and says why."""
    candidates: int = 10_000
    """Classes drawn and embedded per round; all where there are fewer."""
    images_per_class: Literal[1, 2] = 2
    """Images embedded per candidate; with one, a class is scored by its anchor alone, at half the cost of a round."""
    candidates_per_batch: float = 0.5
    """Fraction of a round's candidates that each batch is mined from, drawn afresh per batch, so that lists differ."""
    batches_per_round: int = 32
    """Batches that one round of embedding serves."""
    warmup_steps: int = 0
    """Steps with random classes before the first round; mining an untrained network gains nothing."""
    lag_steps: int = 8
    """Steps between a round and the first batch that uses it; at least data.workers * data.prefetch."""
    random_share: float = 0.0
    """Fraction of a mined batch that is filled with random classes instead, against label noise."""
    similarity_cap: float | None = None
    """Classes of a higher cosine to a chosen class stay out of its batch: the same person twice, or wrong labels."""
    max_appearances: int | None = None
    """Batches of a round that an identity may stand in; in further ones a random identity takes its place."""
    hinge: bool = False
    """Clip violations at 0 from below: classes that don't violate the margin then tie and are drawn by the seed."""
    margin: float = 0.0
    """Margin of the hinge, in units of the score."""
    table_max_age_steps: int = 2000
    """mode=table: embeddings of a class that was trained on longer ago than this are left out."""
    table_refresh_share: float = 0.25
    """mode=table: up to this fraction of a batch are random classes of those left out, which refreshes them."""
    table_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """mode=table: how embeddings are kept, two of each class, over the memory of all ranks."""
    table_neighbours: int = 64
    """mode=table: neighbours of each class in the graph that batches are mined on, where it is approximate."""
    table_exact_limit: int = 200_000
    """mode=table: classes up to which mining is exact, by all products; beyond, neighbours are sought in clusters."""
    table_probes: int = 8
    """mode=table: clusters, of 4 sqrt(classes), that the approximation looks into; more find more and take longer."""
    virtual_nodes: int = 8
    """mode=quota: parts of the identities that give each batch as many classes; a divisor of train.global_pairs and a
    multiple of the processes."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        at_least("mining.candidates", self.candidates, 2)
        at_least("mining.batches_per_round", self.batches_per_round, 1)
        at_least("mining.warmup_steps", self.warmup_steps, 0)
        at_least("mining.lag_steps", self.lag_steps, 0)
        if self.margin and not self.hinge:
            raise ValueError(f"mining.margin: goes with mining.hinge=true, got {self.margin} without it")
        if not 0 < self.candidates_per_batch <= 1:
            raise ValueError(
                f"mining.candidates_per_batch: expected a fraction in (0, 1], got {self.candidates_per_batch}"
            )
        if not 0 <= self.random_share < 1:
            raise ValueError(f"mining.random_share: expected a fraction in [0, 1), got {self.random_share}")
        for name in ("table_neighbours", "table_exact_limit", "table_probes", "virtual_nodes"):
            at_least(f"mining.{name}", getattr(self, name), 1)
        at_least("mining.table_max_age_steps", self.table_max_age_steps, 2)
        if not 0 <= self.table_refresh_share < 1:
            raise ValueError(
                f"mining.table_refresh_share: expected a fraction in [0, 1), got {self.table_refresh_share}"
            )
        if self.similarity_cap is not None and not 0 < self.similarity_cap <= 1:
            raise ValueError(f"mining.similarity_cap: expected a cosine in (0, 1], got {self.similarity_cap}")
        if self.max_appearances is not None:
            at_least("mining.max_appearances", self.max_appearances, 1)
