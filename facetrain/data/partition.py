"""Nodes that hold different shards on disks of their own: who has what, and batches that each reads its part of.

Dims: N global pairs, V parts, W ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from facetrain.data.index import ClassTable
from facetrain.data.manifest import ShardInfo
from facetrain.data.plan import Plan
from facetrain.data.window import identities_of_shards

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Held:
    """What one rank finds on its node's disk."""

    node: str
    """Name of the node, for messages."""
    shards: tuple[int, ...]
    """Numbers of the manifest's shards, ascending."""


def agree_on_parts(held_W: Sequence[Held], shards: Sequence[ShardInfo]) -> list[tuple[int, ...]]:
    """Return the parts of the shards, in the order of the ranks that hold them.

    Ranks that find the same shards share a part: those of a node, or of nodes with copies of each other.

    Args:
        held_W: What each rank holds.
        shards: All of the manifest.

    Raises:
        ValueError: A node has no shard; a shard is missing everywhere or in two parts; parts have unequal numbers of
            ranks, or ranks that aren't neighbours. One line that names shards and nodes.
    """
    owner = dict[int, Held]()
    for held in held_W:
        if not held.shards:
            raise ValueError(f"data.partitioned: expected shards of the manifest on every node, {held.node} has none")
        for shard in held.shards:
            other = owner.setdefault(shard, held)
            if other.shards != held.shards:
                raise ValueError(
                    f"data.partitioned: expected each shard in one part, {shards[shard].name} is on {other.node} and on"
                    f" {held.node}, whose other shards differ"
                )
    missing = [info.name for shard, info in enumerate(shards) if shard not in owner]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"data.partitioned: expected every shard of the manifest on a node, {missing[0]}{more} of {len(shards)} on"
            f" none of {', '.join(sorted({held.node for held in held_W}))}"
        )
    parts = list(dict.fromkeys(held.shards for held in held_W))
    ranks_per_part = len(held_W) // len(parts)
    if [held.shards for held in held_W] != [part for part in parts for _ in range(ranks_per_part)]:
        counts = [sum(held.shards == part for held in held_W) for part in parts]
        raise ValueError(
            f"data.partitioned: expected as many ranks in each part, one after another, got {counts} ranks for the"
            f" {len(parts)} parts, in the order {', '.join(held.node for held in held_W)}"
        )
    return parts


class PartitionedPlan(Plan):
    """The plan whose batches take as many pairs from each part of the shards.

    Rows v N / V to (v + 1) N / V - 1 are drawn from part v alone, as `Plan` would without the others: every identity of
    a part once in each pass over it. What a part gives depends on its shards, on N / V and on the seed, neither on the
    ranks that read it nor on its place among the parts.
    """

    def __init__(
        self,
        table: ClassTable,
        identities: Ints,
        *,
        global_pairs: int,
        seed: int,
        shards: Sequence[ShardInfo],
        parts: Sequence[Sequence[int]],
    ) -> None:
        """Plan batches of `global_pairs` pairs.

        Args:
            table: The identities and images of all shards.
            identities: Rows of the table that are trained on, each with two or more images.
            global_pairs: N.
            seed: 0 or more.
            shards: In the order of their identities.
            parts: Numbers of the shards of each part, as `agree_on_parts` returns them.

        Raises:
            ValueError: V doesn't divide N, or a part has fewer identities than pairs.
        """
        super().__init__(table, identities, global_pairs=global_pairs, seed=seed)
        if global_pairs % len(parts):
            raise ValueError(
                f"train.global_pairs: expected a multiple of the {len(parts)} parts that the nodes hold, got"
                f" {global_pairs}"
            )
        pairs, members = global_pairs // len(parts), identities_of_shards(self.identities_I, shards)
        self._parts = list[Plan]()
        for part in parts:
            own = np.concatenate([members[shard] for shard in part])
            if len(own) < pairs:
                raise ValueError(
                    f"data.partitioned: expected at least {pairs} identities that are trained on in each of"
                    f" {len(parts)} parts, since each gives as many pairs to a batch, got {len(own)} in that of"
                    f" {shards[part[0]].name}"
                )
            own_seed = int(np.random.SeedSequence([seed, _PART, part[0]]).generate_state(1)[0])
            self._parts.append(Plan(table, own, global_pairs=pairs, seed=own_seed))
        self._part_of = np.full(table.num_identities, -1)
        for v, plan in enumerate(self._parts):
            self._part_of[plan.identities_I] = v

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every part passes all of its identities."""
        return max(plan.steps_per_epoch for plan in self._parts)

    def describe(self) -> str:
        """Return how often identities are drawn, in words, for the log."""
        every = [len(plan.identities_I) / plan.global_pairs for plan in self._parts]
        return (
            f"{len(self._parts)} parts of the shards, each read by the ranks that hold it;"
            f" an identity is drawn every {min(every):.2f} to {max(every):.2f} steps"
        )

    def pools(self, first_step: int, last_step: int) -> list[Ints]:
        """Return the identities of each part."""
        return [plan.identities_I for plan in self._parts]

    def add_mined(self, first_step: int, identities_BN: Ints) -> None:
        """As `Plan.add_mined`; each list's rows are put in the order of the parts, which nodes may change on restart.

        Raises:
            ValueError: Also where a list doesn't take as many identities from each part.
        """
        identities_BN = np.array(identities_BN, dtype=np.int64)
        super().add_mined(first_step, identities_BN)
        part_BN = self._part_of[identities_BN]
        counts = (part_BN[:, :, None] == np.arange(len(self._parts))).sum(axis=1)
        if (counts != self._parts[0].global_pairs).any():
            raise ValueError(
                f"mined lists of steps from {first_step}: expected {self._parts[0].global_pairs} identities of each of"
                f" {len(self._parts)} parts; were they mined for nodes that held other shards?"
            )
        order = np.argsort(part_BN, axis=1, kind="stable")
        super().add_mined(first_step, np.take_along_axis(identities_BN, order, axis=1))

    def _random_labels(self, step: int) -> Ints:
        return np.concatenate([plan._random_labels(step) for plan in self._parts])


# A stream of random numbers that shares the run's seed with those of plan, split and window.
_PART = 6
