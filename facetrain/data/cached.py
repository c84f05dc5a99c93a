"""Who reads the shards of a cache: slices of them on demand, and windows of them ahead of their use."""

from collections.abc import Collection, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from facetrain.data.cache import ShardCache, release
from facetrain.data.daemon_threads import DaemonThreads
from facetrain.data.index import FileSlices
from facetrain.data.manifest import ShardInfo


class CachedSlices(FileSlices):
    """Reads pieces of cached shards; what is not here is fetched at the first read."""

    def __init__(self, cache: ShardCache, shards: Sequence[ShardInfo], *, keep_open: bool) -> None:
        """Take the shards; `keep_open` keeps those that were read, so that they aren't evicted."""
        super().__init__([cache.path_of(shard) for shard in shards], keep_open=keep_open)
        self._cache, self._shards = cache, tuple(shards)

    def _open(self, file: int) -> int:
        return self._cache.open(self._shards[file])

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(CachedSlices, keep_open=self._keep_open), (self._cache, self._shards)


class HeldShards:
    """Fetches the shards of a window ahead of their use, and keeps them from being evicted until they have been used.

    To be called in the training process after its workers have started, or these would hold the shards as well.
    """

    def __init__(self, cache: ShardCache, shards: Sequence[ShardInfo]) -> None:
        """Hold nothing yet."""
        self._cache, self._shards = cache, shards
        self._threads = DaemonThreads(_FETCHING_THREADS, "fetch")
        self._held: dict[int, Future[int]] = {}

    def hold(self, numbers: Collection[int]) -> None:
        """Fetch these shards in the background, where they aren't here, and let go of all others."""
        for number in [n for n in self._held if n not in numbers]:
            self._release(self._held.pop(number))
        for number in numbers:
            if number not in self._held:
                self._held[number] = self._threads.submit(self._cache.open, self._shards[number])

    def close(self) -> None:
        """Let go of all; what is being fetched goes on as long as the process does."""
        self.hold(())
        self._threads.close(wait=False)

    @staticmethod
    def _release(opening: Future[int]) -> None:
        def close(opened: Future[int]) -> None:
            # What can't be fetched is raised where its images are read.
            if not opened.cancelled() and opened.exception() is None:
                release(opened.result())

        opening.cancel()
        opening.add_done_callback(close)


_FETCHING_THREADS = 2
