"""EmbeddingTable: the newest training embeddings of every identity, sharded over the ranks, for nothing but a gather.

Dims: I trained identities, R of them on this rank, F with a fresh entry, N global pairs, n local pairs, V = 2 views
(0 anchor, 1 positive), D embedding width.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facetrain.world import World

BLOCK_ROWS = 1024
"""Rows that stay together: ranks own whole blocks, and a search takes a block at a time, so that its results are the
same whatever the number of ranks."""

_NEVER = -(1 << 31)


class EmbeddingTable:
    """One row per trained identity: the embeddings of its anchor and positive, and the step that they are of.

    Ranks own contiguous rows. The embeddings are those of training: augmented images, in train mode, of the network
    as it was when the identity was last in a batch; a user of the table asks for rows that are fresh enough.

    Memory of a rank: R (2 D b + 4) bytes on its device, b = 2 for bfloat16 and 4 for float32: at two million
    identities, D = 512 and bfloat16 4.1 GB over all ranks.
    """

    def __init__(
        self, identities: NDArray[np.int64], *, dtype: torch.dtype, world: World, block_rows: int = BLOCK_ROWS
    ) -> None:
        """Prepare an empty table; its memory is taken when the first embeddings show their width.

        Args:
            identities: int64 [I], ascending; the labels that will be observed.
            dtype: How embeddings are kept and sent.
            world: The ranks that share the table.
            block_rows: Rows of a block.
        """
        self.identities, self.world, self.dtype = identities, world, dtype
        num_blocks = -(-len(identities) // block_rows)
        bounds = np.arange(world.world_size + 1) * num_blocks // world.world_size * block_rows
        self._bounds = np.minimum(bounds, len(identities))  # rank r owns rows bounds[r] to bounds[r + 1] - 1
        self._block_rows = block_rows
        self.rows = range(*self._bounds[world.rank : world.rank + 2].tolist())
        """The rows that this rank owns."""
        # One row more than it owns takes what belongs to other ranks, so that the host needn't wait for their number.
        self._refreshed_at = torch.full((len(self.rows) + 1,), _NEVER, dtype=torch.int32, device=world.device)
        self._labels = torch.from_numpy(identities).to(world.device)
        self._anchors = self._positives = torch.empty(0)

    def observe(self, step: int, labels_n: Tensor, embeddings_VnD: Tensor) -> None:
        """Take the embeddings of a training step; every rank must call it.

        Over all ranks: an all-gather of the labels and one of the embeddings, 8 N and 2 N D b bytes in all, after
        which each rank keeps the rows that it owns. At N = 64k, D = 512 and bfloat16 that is 134 MB a step, as much
        as the loss's own gather of the positives in float32.

        Args:
            step: The step that was trained.
            labels_n: int64; the identities of this rank's pairs.
            embeddings_VnD: This rank's embeddings; detached.
        """
        if not self._anchors.numel():
            width = embeddings_VnD.shape[-1]
            self._anchors = torch.zeros(len(self._refreshed_at), width, dtype=self.dtype, device=self.world.device)
            self._positives = torch.zeros_like(self._anchors)
        labels_N = self.world.all_gather(labels_n)
        embeddings_NVD = self.world.all_gather(embeddings_VnD.to(self.dtype).transpose(0, 1).contiguous())
        rows_N = torch.searchsorted(self._labels, labels_N) - self.rows.start
        rows_N = torch.where((rows_N >= 0) & (rows_N < len(self.rows)), rows_N, len(self.rows))
        self._anchors[rows_N] = embeddings_NVD[:, 0]
        self._positives[rows_N] = embeddings_NVD[:, 1]
        # Training reports broken embeddings by itself; here they are no entries, so that a search needn't look out.
        is_finite_N = embeddings_NVD.isfinite().flatten(1).all(dim=1)
        self._refreshed_at[rows_N] = torch.where(is_finite_N, step, _NEVER).int()

    def fresh_rows(self, step: int, max_age_steps: int) -> NDArray[np.int64]:
        """Return the rows that were observed in the last `max_age_steps` steps before `step`, int64 [F], ascending.

        Over all ranks: an all-gather of the row numbers, 8 F bytes; every rank ends with all of them.
        """
        is_fresh_R = self._refreshed_at[: len(self.rows)] >= step - max_age_steps
        return self.world.all_gather_uneven(is_fresh_R.nonzero()[:, 0] + self.rows.start).cpu().numpy()

    def blocks(self, rows_F: NDArray[np.int64]) -> Iterator[tuple[int, slice]]:
        """Cut ascending rows where blocks end; yield the rank that owns each piece, and its place in `rows_F`."""
        edges = np.searchsorted(rows_F, np.arange(0, len(self.identities) + self._block_rows, self._block_rows))
        for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            if start < stop:
                owner = int(np.searchsorted(self._bounds, rows_F[start], side="right")) - 1
                yield owner, slice(start, stop)

    def own(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return anchors and positives of rows that this rank owns, each float32 [len(rows), D] on its device."""
        local = torch.from_numpy(rows - self.rows.start).to(self.world.device)
        return self._anchors[local].float(), self._positives[local].float()

    def empty(self, *sizes: int) -> Tensor:
        """Return memory for embeddings, [*sizes, D], of the table's type and on its device."""
        return self._anchors.new_empty(*sizes, self._anchors.shape[1])

    def embedding_blocks(self, rows_F: NDArray[np.int64]) -> Iterator[tuple[slice, Tensor]]:
        """Yield anchors and positives of ascending rows block by block, [2, rows, D], on every rank.

        Over all ranks: a broadcast per block by its owner, 2 F D b bytes in all. No rank holds them all unless the
        caller keeps them.
        """
        for owner, piece in self.blocks(rows_F):
            rows = rows_F[piece]
            block = self.empty(2, len(rows))
            if owner == self.world.rank:
                local = torch.from_numpy(rows - self.rows.start).to(self.world.device)
                torch.stack([self._anchors[local], self._positives[local]], out=block)
            yield piece, self.world.broadcast_(block, owner)

    def lookup(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return anchors and positives of any few rows, each float32 [len(rows), D], on every rank.

        Over all ranks: an all-gather of 8 D bytes a row.
        """
        ascending, back = np.unique(rows, return_inverse=True)
        first, last = np.searchsorted(ascending, (self.rows.start, self.rows.stop))
        # Ranks own ascending rows, so what they hold of ascending rows is in order once it is gathered.
        found = self.world.all_gather_uneven(torch.stack(self.own(ascending[first:last]), dim=1))
        anchors, positives = found[torch.from_numpy(back).to(found.device)].unbind(dim=1)
        return anchors, positives

    def state(self) -> dict[str, Tensor]:
        """Return this rank's rows for a checkpoint, without a copy where they are on the CPU; empty before the first.

        `first_row` says where they belong; the others have a row each.
        """
        if not self._anchors.numel():
            return {}
        own = slice(len(self.rows))
        rows = {"anchors": self._anchors, "positives": self._positives, "refreshed_at": self._refreshed_at}
        return {"first_row": torch.tensor([self.rows.start])} | {name: x[own].cpu() for name, x in rows.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put back this rank's rows of what `state` gave, on however many ranks."""
        anchors, positives = (state[name].to(self.world.device) for name in ("anchors", "positives"))
        spare = anchors.new_zeros(1, anchors.shape[1])
        self._anchors, self._positives = torch.cat([anchors, spare]), torch.cat([positives, spare])
        self._refreshed_at[: len(self.rows)] = state["refreshed_at"].to(self.world.device)
