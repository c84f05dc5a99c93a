"""WindowedPlan: batches from a few shards at a time, for sets that are larger than a node's disk.

Dims: N global pairs, V virtual nodes, M shards of a window.
"""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from facetrain.data.index import ClassTable
from facetrain.data.manifest import ShardInfo
from facetrain.data.plan import Plan

Ints = npt.NDArray[np.int64]


class WindowedPlan(Plan):
    """The plan whose batches draw from V * M shards at a time.

    V virtual nodes own disjoint shards, dealt so that each has about as many identities. Rows v N / V to
    (v + 1) N / V - 1 of a batch are drawn by virtual node v, so that a rank reads the shards of a few of them, and
    nothing depends on the number of ranks.

    A virtual node passes its shards in a shuffled order, again and again. Each shard's identities are dealt to M
    consecutive blocks, and a block is what M consecutive shards gave to it, shuffled; the node's draws are its blocks
    one after another. So each identity is drawn exactly once in each pass. The next pass keeps the shards that
    came last away from its beginning, so that no identity stands twice in a batch.
    """

    def __init__(
        self,
        table: ClassTable,
        identities: Ints,
        *,
        global_pairs: int,
        seed: int,
        shards: Sequence[ShardInfo],
        virtual_nodes: int,
        window_shards: int,
    ) -> None:
        """Plan batches of `global_pairs` pairs.

        Args:
            table: The identities and images of the shards.
            identities: Rows of the table that are trained on, each with two or more images.
            global_pairs: N.
            seed: 0 or more.
            shards: In the order of their identities.
            virtual_nodes: V, which divides N.
            window_shards: M.

        Raises:
            ValueError: There are fewer identities than pairs, or too few shards or identities for such a window.
        """
        super().__init__(table, identities, global_pairs=global_pairs, seed=seed)
        self.pairs_per_node = global_pairs // virtual_nodes
        members = identities_of_shards(self.identities_I, shards)
        owned = _deal([len(m) for m in members], virtual_nodes, seed)
        self._nodes = [
            _VirtualNode(
                {shard: members[shard] for shard in own},
                window=window_shards,
                spacing=_spacing([len(members[shard]) for shard in own], window_shards, self.pairs_per_node),
                seed=[seed, _WINDOW, v],
            )
            for v, own in enumerate(owned)
        ]

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every virtual node passes all of its identities."""
        return max(-(-node.num_identities // self.pairs_per_node) for node in self._nodes)

    def describe(self) -> str:
        """Return how often identities are drawn, in words, for the log."""
        every = [node.num_identities / self.pairs_per_node for node in self._nodes]
        num_shards = [node.num_shards for node in self._nodes]
        return (
            f"{len(self._nodes)} virtual nodes with {min(num_shards)} to {max(num_shards)} shards each,"
            f" {self._nodes[0].window} in a window;"
            f" an identity is drawn every {min(every):.2f} to {max(every):.2f} steps"
        )

    def shards_between(self, first_step: int, last_step: int, rank: int, world_size: int) -> set[int]:
        """Return the shards that a rank's rows of these steps, both included, are drawn from, and the next to come."""
        n, rows = self.pairs_per_node, self.global_pairs // world_size
        nodes = self._nodes[rank * rows // n : -(-(rank + 1) * rows // n)]
        return {shard for node in nodes for shard in node.shards_of(first_step * n, (last_step + 1) * n)}

    def pools(self, first_step: int, last_step: int) -> list[Ints]:
        """Return, for each virtual node, the identities of the shards that are in its window in all of these steps."""
        n = self.pairs_per_node
        return [node.staying(first_step * n, (last_step + 1) * n) for node in self._nodes]

    def room_bytes(self, shards: Sequence[ShardInfo], ranks: range, world_size: int, steps_ahead: int) -> int:
        """Return the most bytes of shards that the rows of some ranks need at a time, over one pass.

        Args:
            shards: As for the plan.
            ranks: Those that share a cache.
            world_size: W.
            steps_ahead: Steps that are prepared while one is trained.
        """
        most = 0
        for step in range(self.steps_per_epoch):
            first_step = max(0, step - steps_ahead)
            needed = set().union(*(self.shards_between(first_step, step, rank, world_size) for rank in ranks))
            most = max(most, sum(shards[number].size_bytes for number in needed))
        return most

    def _random_labels(self, step: int) -> Ints:
        n = self.pairs_per_node
        return np.concatenate([node.draws(step * n, (step + 1) * n) for node in self._nodes])


class _VirtualNode:
    """The draws of one virtual node: an endless stream of identities."""

    def __init__(self, members: dict[int, Ints], *, window: int, spacing: int, seed: list[int]) -> None:
        self.members, self.window, self.spacing, self.seed = members, window, spacing, seed
        self.num_shards = len(members)
        self.num_identities = sum(len(m) for m in members.values())
        self._queue: list[int] = []  # the shard at each position, pass after pass
        self._ends: list[int] = []  # where each block ends in the stream
        self._blocks: dict[int, Ints] = {}

    def draws(self, begin: int, end: int) -> Ints:
        """Return the identities begin to end - 1 of the stream."""
        blocks = self._blocks_of(begin, end)
        start = self._ends[blocks[0] - 1] if blocks[0] else 0
        return np.concatenate([self._block(b) for b in blocks])[begin - start : end - start]

    def shards_of(self, begin: int, end: int) -> list[int]:
        """Return the shards that give these draws, and the next one of the queue."""
        blocks = self._blocks_of(begin, end)
        return [self._shard(k) for k in range(blocks[0], blocks[-1] + self.window + 1)]

    def staying(self, begin: int, end: int) -> Ints:
        """Return the identities of the shards that every block of these draws takes from."""
        blocks = self._blocks_of(begin, end)
        shards = [self._shard(k) for k in range(blocks[-1], blocks[0] + self.window)]
        return np.concatenate([np.empty(0, dtype=np.int64), *(self.members[shard] for shard in sorted(shards))])

    def _blocks_of(self, begin: int, end: int) -> range:
        """Return the blocks in which draws begin to end - 1 lie."""
        while not self._ends or self._ends[-1] < end:
            block = len(self._ends)
            sizes = (self._part(block, k)[0] for k in range(block, block + self.window))
            self._ends.append((self._ends[-1] if self._ends else 0) + sum(sizes))
        return range(bisect_right(self._ends, begin), bisect_right(self._ends, end - 1) + 1)

    def _part(self, block: int, position: int) -> tuple[int, int]:
        """Return how many identities a shard of the queue gives to a block, and how many it gave before."""
        first = max(0, position - self.window + 1)  # the shards at the beginning have fewer blocks
        size, extra = divmod(len(self.members[self._shard(position)]), position - first + 1)
        part = block - first
        return size + (part < extra), part * size + min(part, extra)

    def _block(self, block: int) -> Ints:
        if block not in self._blocks:
            parts = []
            for k in range(block, block + self.window):
                size, before = self._part(block, k)
                order = np.random.default_rng([*self.seed, _SHARD, k]).permutation(self.members[self._shard(k)])
                parts.append(order[before : before + size])
            shuffled = np.random.default_rng([*self.seed, _BLOCK, block]).permutation(np.concatenate(parts))
            self._blocks[block] = shuffled
            if len(self._blocks) > _KEPT_BLOCKS:
                del self._blocks[next(iter(self._blocks))]
        return self._blocks[block]

    def _shard(self, position: int) -> int:
        while len(self._queue) <= position:
            number = len(self._queue) // self.num_shards
            shuffled = np.random.default_rng([*self.seed, _PASS, number]).permutation(list(self.members)).tolist()
            # Any shard comes again after `spacing` positions at the earliest.
            away = self.spacing - 1
            recent = set(self._queue[-away:])
            head = [shard for shard in shuffled if shard not in recent][:away]
            self._queue += head + [shard for shard in shuffled if shard not in set(head)]
        return self._queue[position]


def identities_of_shards(identities_I: Ints, shards: Sequence[ShardInfo]) -> list[Ints]:
    """Return which of the identities, ascending rows of the class table, lie in each shard."""
    bounds = np.searchsorted(identities_I, np.cumsum([shard.identities for shard in shards]))
    return np.split(identities_I, bounds[:-1])


def _deal(num_identities: Sequence[int], virtual_nodes: int, seed: int) -> list[list[int]]:
    """Deal shards to virtual nodes: the largest first, in an order that the seed decides, each to whom has least."""
    order = np.random.default_rng([seed, _WINDOW]).permutation(len(num_identities)).tolist()
    order.sort(key=lambda shard: -num_identities[shard])
    owned: list[list[int]] = [[] for _ in range(virtual_nodes)]
    totals = [0] * virtual_nodes
    for shard in order:
        least = min(range(virtual_nodes), key=lambda v: (totals[v], len(owned[v]), v))
        owned[least].append(shard)
        totals[least] += num_identities[shard]
    return owned


def _spacing(sizes: Sequence[int], window: int, pairs: int) -> int:
    """Return after how many positions of the queue a shard may come again, so that no identity does within a batch.

    A batch reaches over at most so many blocks after its first as there are consecutive blocks that hold pairs - 1
    draws, whatever the order of the shards; an identity's last block of a pass and its first of the next are to be
    further apart. Of r blocks in a row, the shards in the middle give to min(M, r) of them.
    """
    parts = sorted(size // window for size in sizes)
    for reach in range(1, len(sizes) // 2 - window + 2):
        num_shards = reach + window - 1
        times = sorted((min(i + 1, window, reach, num_shards - i) for i in range(num_shards)), reverse=True)
        if sum(part * time for part, time in zip(parts, times, strict=False)) >= pairs - 1:
            return window + reach
    raise ValueError(
        f"data.window_shards: expected clearly less than half of the {len(sizes)} shards of a virtual node, for its"
        f" {pairs} pairs of each batch, got {window}; fewer data.virtual_nodes or smaller shards allow more"
    )


# Streams of random numbers that share the run's seed with those of the plan and the split.
_WINDOW = 5
_PASS, _SHARD, _BLOCK = 0, 1, 2
_KEPT_BLOCKS = 4
