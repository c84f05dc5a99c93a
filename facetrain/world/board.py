"""Short notes that ranks leave for each other."""

from datetime import timedelta

import torch.distributed as dist


class Board:
    """A short note of each rank, kept by rank 0's process: reading and writing waits for no other rank."""

    def __init__(self, world_size: int) -> None:
        self._keys = [f"facetrain/note/{rank}" for rank in range(world_size)]
        self._store = dist.distributed_c10d._get_default_store().clone()  # a connection of its own, for any thread
        self._store.set_timeout(timedelta(seconds=10))

    def write(self, rank: int, note: str) -> None:
        """Replace a rank's note; RuntimeError where rank 0 can't be reached."""
        self._store.set(self._keys[rank], note)

    def read(self) -> list[str]:
        """Return all ranks' notes, once each has written one; RuntimeError where rank 0 can't be reached."""
        return [note.decode() for note in self._store.multi_get(self._keys)]
