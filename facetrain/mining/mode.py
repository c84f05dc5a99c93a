"""Which mode mining runs in, why, and what it costs."""

from dataclasses import dataclass

from facetrain.config import Config, MiningConfig
from facetrain.mining.lists import check_appearances

GATHERED_LIMIT = 100_000
"""Trained identities up to which mode 'auto' takes gathered mining."""


@dataclass(frozen=True)
class MiningMode:
    """A mode as it was chosen."""

    name: str
    """off, gathered, table or quota."""
    reason: str
    """Why, in one line."""
    round_steps: float
    """Predicted cost of a round's embeddings, in training steps: C e / (6 N) for C candidates of e images each and
    steps of 2 N images, forward and backward being three forward passes. 0 for the table, which embeds nothing."""
    cost: str
    """The same in words."""

    def describe(self) -> str:
        """Return the choice, its reason and its cost, for the log."""
        return f"mining: {self.name}; {self.reason}; {self.cost}"


def choose_mode(config: MiningConfig, *, num_identities: int, num_pairs: int) -> MiningMode:
    """Resolve mode 'auto' by the number of trained identities.

    It never chooses 'quota', which is for shards of which each rank reads a part: data.window_shards and
    data.partitioned refuse 'auto'.
    """
    name = config.mode
    reason = "mining.mode asks for it"
    if config.mode == "auto":
        few = num_identities <= GATHERED_LIMIT
        name = "gathered" if few else "table"
        reason = f"{num_identities} identities are {'at most' if few else 'more than'} {GATHERED_LIMIT}"
    if name == "table":
        renewed = config.table_refresh_share * num_pairs * config.table_max_age_steps / num_identities
        cost = (
            f"no forward passes: embeddings are those of the last {config.table_max_age_steps} training steps, enough"
            f" to renew {min(renewed, 1.0):.0%} of the identities"
        )
        return MiningMode(name=name, reason=reason, round_steps=0.0, cost=cost)
    round_steps = config.images_per_class * min(config.candidates, num_identities) / (6 * num_pairs)
    cost = (
        f"a round embeds for as long as {round_steps:.1f} training steps,"
        f" {round_steps / config.batches_per_round:.2f} for each of its {config.batches_per_round} batches"
    )
    return MiningMode(name=name, reason=reason, round_steps=round_steps, cost=cost)


def check_mode(config: Config, *, num_identities: int, world_size: int) -> None:
    """Refuse what the chosen mode can't do with these identities and ranks, before anything starts.

    Raises:
        ValueError: Fewer candidates than pairs, or too few identities for `mining.max_appearances`; for quota, virtual
            nodes that the ranks can't share evenly.
    """
    mining, num_pairs = config.mining, config.train.global_pairs
    mode = choose_mode(mining, num_identities=num_identities, num_pairs=num_pairs).name
    if mode == "off":
        return
    candidates = min(mining.candidates, num_identities)
    if mode in ("gathered", "quota") and candidates < num_pairs:
        raise ValueError(
            f"mining.candidates: expected at least train.global_pairs = {num_pairs} classes to choose from, got"
            f" {candidates} (mining.candidates = {mining.candidates}, {num_identities} trained identities)"
        )
    if mining.max_appearances is not None:
        parts = mining.virtual_nodes if mode == "quota" else 1
        check_appearances(mining.max_appearances, mining.batches_per_round, num_pairs // parts, num_identities // parts)
    if mode == "quota" and mining.virtual_nodes % world_size:
        raise ValueError(
            f"mining.virtual_nodes: expected a multiple of the {world_size} processes, got {mining.virtual_nodes}"
        )
