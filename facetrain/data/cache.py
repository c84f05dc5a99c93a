"""ShardCache: shards from elsewhere on this node's disk, for all processes of the node and from run to run.

A cache folder holds

    SHA256.tar                a shard, complete and checked; named by its content, so that sets and runs share it
    SHA256-SIZE.part          a shard that is being fetched, or was when its process died; stands for SIZE bytes
    sets/SHA256/              manifest, class table and image index of one set of shards

A process holds a lock on the file itself, shared on what it reads and exclusive on what it fetches, and the system
drops the locks of a process that dies. Under the lock of the folder parts are made and named, and files evicted.
"""

import fcntl
import hashlib
import os
import random
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from facetrain.data.daemon_threads import DaemonThreads
from facetrain.data.manifest import MANIFEST_FILE, Manifest, ShardInfo, combined_sha256
from facetrain.data.remote import RemoteFolder
from facetrain.whole_file import put_in_place, writing

_FETCHING_THREADS = 4
_POLL_S = 0.05
_ENTRY = re.compile(r"[0-9a-f]{64}(\.tar|-(?P<size>\d+)\.part)")


@dataclass(frozen=True)
class ShardCache:
    """A folder on this node's disk that holds shards from elsewhere; safe over processes, and can be pickled."""

    folder: Path
    """On a file system of this node."""
    max_bytes: int | None
    """Shards that are longest unused are evicted to stay within; None means as much as the disk holds."""
    remote: RemoteFolder
    """Where the shards come from."""
    windowed: bool = False
    """Whether only a few of a set's shards are needed at a time, so that they are fetched one by one."""

    def fetch_tables(self, names: Sequence[str]) -> Path:
        """Fetch the manifest, as it is now, and the files that it comes with, unless they are here.

        Returns:
            The folder in which they are.

        Raises:
            ValueError: One of them can't be had, or the manifest isn't one; the message names the URL.
        """
        (self.folder / "sets").mkdir(parents=True, exist_ok=True)
        with self._locked("sets/.lock"):
            arrived = self.folder / "sets" / "manifest.part"
            self._fetch_file(MANIFEST_FILE, arrived)
            data = arrived.read_bytes()
            manifest = Manifest.parse(data, self.remote.shown(MANIFEST_FILE))
            folder = self.folder / "sets" / hashlib.sha256(data).hexdigest()
            tables = [folder / name for name in names]
            is_here = (folder / MANIFEST_FILE).is_file() and all(table.is_file() for table in tables)
            if not (is_here and _is_index_of(manifest, tables)):
                folder.mkdir(exist_ok=True)
                for part in folder.glob("*.tmp"):  # of a process that was killed, or it would not let us in here
                    part.unlink()
                for table in tables:
                    with writing(table) as part:  # a running job may have mapped the one that is there
                        self._fetch_file(table.name, part)
                if not _is_index_of(manifest, tables):
                    raise ValueError(
                        f"{self.remote.shown(MANIFEST_FILE)}: its class table and image index have another sha256;"
                        " was the folder packed anew in this moment?"
                    )
                put_in_place(arrived, folder / MANIFEST_FILE)  # last: it says that the others are complete
        return folder

    def holds(self, size_bytes: int) -> bool:
        """Return whether that many bytes are allowed here at once."""
        return self.max_bytes is None or size_bytes <= self.max_bytes

    def keeps(self, manifest: Manifest) -> bool:
        """Return whether all shards of a set are to be here."""
        return not self.windowed and self.holds(manifest.size_bytes)

    def fetch(self, shards: Sequence[ShardInfo], *, progress: bool) -> None:
        """Fetch all shards that aren't here; processes that do so together share the work.

        Raises:
            ValueError: A shard can't be had, isn't what the manifest says, or finds no room.
        """
        # Each process in an order of its own: in the same one they would all wait for the same shard.
        order = random.Random(os.getpid()).sample(list(shards), len(shards))
        missing = [shard for shard in order if not self.path_of(shard).is_file()]
        if not missing:
            return
        size_bytes = sum(shard.size_bytes for shard in missing)
        self._check_disk(size_bytes, kept={self.path_of(shard) for shard in shards})
        bar = tqdm(total=size_bytes, unit="B", unit_scale=True, desc="fetch", disable=None if progress else True)
        threads = DaemonThreads(_FETCHING_THREADS, "fetch")
        with bar:
            futures = {threads.submit(lambda s: release(self.open(s)), shard): shard for shard in missing}
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.update(futures[future].size_bytes)
            except BaseException:
                for future in futures:
                    future.cancel()
                threads.close(wait=False)
                raise
        threads.close(wait=True)

    def open(self, shard: ShardInfo) -> int:
        """Open a shard, fetched first where it isn't here.

        Returns:
            A file descriptor; until it and its copies in forked processes are closed, the shard isn't evicted.

        Raises:
            ValueError: The shard can't be had, isn't what the manifest says, or finds no room.
        """
        while True:
            fd = self._open_complete(shard)
            if fd is None:
                fd = self._open_part(shard)
            if fd is not None:
                return fd

    def path_of(self, shard: ShardInfo) -> Path:
        """Return where a shard is once it is complete."""
        return self.folder / f"{shard.sha256}.tar"

    def _open_complete(self, shard: ShardInfo) -> int | None:
        path = self.path_of(shard)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(fd, fcntl.LOCK_SH)
        is_here = _is_at(fd, path)  # or it was evicted before the lock
        if not is_here or os.fstat(fd).st_size != shard.size_bytes:
            if is_here:  # somebody damaged it since it was checked
                path.unlink(missing_ok=True)
            release(fd)
            return None
        os.utime(fd)  # its time says when it was last used
        return fd

    def _open_part(self, shard: ShardInfo) -> int | None:
        """Fetch a shard, or wait for the process that does; None where its part is gone afterwards."""
        path, part = self.path_of(shard), self.folder / f"{shard.sha256}-{shard.size_bytes}.part"
        fd = self._claim(part, path, shard)
        if fd is None:
            return None
        try:
            if not _lock_now(fd):
                # Shared, since who has fetched it may go on to use it for hours.
                fcntl.flock(fd, fcntl.LOCK_SH)
                if _is_at(fd, path):
                    return fd
                release(fd)  # the process that fetched it failed or died
                time.sleep(random.SystemRandom().uniform(0, _POLL_S))  # or two that wait could be in each other's way
                return None
            if _is_at(fd, part):
                try:
                    self.remote.download(shard.name, fd, size_bytes=shard.size_bytes, sha256=shard.sha256)
                except ValueError:
                    if os.fstat(fd).st_size == 0:
                        part.unlink()
                    raise
                os.fsync(fd)  # before it gets its name: after a power cut it is complete or not there
                with self._locked(".lock"):  # a name that changes while they are counted would be left out
                    part.replace(path)
            elif not _is_at(fd, path):
                release(fd)
                return None
            fcntl.flock(fd, fcntl.LOCK_SH)
        except BaseException:
            release(fd)
            raise
        return fd

    def _claim(self, part: Path, path: Path, shard: ShardInfo) -> int | None:
        """Open the shard's part, made first, with room on the disk, where it isn't there; None if it is complete."""
        if not self.holds(shard.size_bytes):
            raise ValueError(
                f"data.cache_bytes: expected at least the {shard.size_bytes} bytes of"
                f" {self.remote.shown(shard.name)}, got {self.max_bytes}"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        before, waiting_since = None, time.monotonic()
        while True:
            with self._locked(".lock"):
                if path.exists():
                    return None
                is_new = not part.exists()
                lacking_bytes = self._make_room(shard.size_bytes) if is_new else 0
                if lacking_bytes <= 0:
                    fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                    if is_new:
                        fcntl.flock(fd, fcntl.LOCK_EX)  # before anybody could evict it
                    return fd
                # Without times, which every reader of the cache renews.
                now = {(entry.path, entry.found_bytes) for entry in self._entries()}
            if now != before:  # somebody fetches or has finished: there will be room
                before, waiting_since = now, time.monotonic()
            if not now or time.monotonic() - waiting_since > self.remote.timeout_s:
                bound = "the disk is full" if self.max_bytes is None else f"data.cache_bytes is {self.max_bytes}"
                raise ValueError(
                    f"data.cache_dir: {self.folder}: {bound}, and all that is there is in use:"
                    f" lacks {lacking_bytes} bytes for {self.remote.shown(shard.name)}"
                )
            time.sleep(_POLL_S)

    def _make_room(self, size_bytes: int) -> int:
        """Evict what is longest unused until a file of that size fits; returns the bytes that are lacking still."""
        entries = self._entries()
        held = sum(entry.size_bytes for entry in entries)
        to_come = sum(entry.size_bytes - entry.found_bytes for entry in entries)
        lacking = size_bytes - (shutil.disk_usage(self.folder).free - to_come)
        if self.max_bytes is not None:
            lacking = max(lacking, held + size_bytes - self.max_bytes)
        for entry in entries:
            if lacking > 0 and _evict(entry.path):
                lacking -= entry.size_bytes
        return lacking

    def _entries(self) -> list["_Entry"]:
        """Return what the folder holds, the longest unused first."""
        entries = []
        for path in self.folder.iterdir():
            if match := _ENTRY.fullmatch(path.name):  # whatever else somebody keeps there is left alone
                try:
                    stat = path.stat()
                except FileNotFoundError:  # removed since, by who found it damaged
                    continue
                size_bytes = int(match["size"] or stat.st_size)
                entries.append(_Entry(stat.st_mtime_ns, path, size_bytes, stat.st_size))
        return sorted(entries)

    def _check_disk(self, size_bytes: int, kept: set[Path]) -> None:
        """Refuse what the disk can't hold beside the shards that are kept, before anything is fetched."""
        entries = self._entries()
        # Room for this set's own parts counts as free, since they are among the missing shards.
        free_bytes = shutil.disk_usage(self.folder).free + sum(e.found_bytes for e in entries if e.path not in kept)
        if size_bytes > free_bytes:
            raise ValueError(
                f"data.cache_dir: {self.folder}: expected room for {size_bytes} bytes of {self.remote.shown('')},"
                f" the disk has {free_bytes}; data.cache_bytes bounds what is kept at once"
            )

    def _fetch_file(self, name: str, path: Path) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            self.remote.download(name, fd)
        finally:
            os.close(fd)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold one of the folder's locks, which all processes of the node share."""
        fd = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            release(fd)


@dataclass(frozen=True, order=True)
class _Entry:
    """A file of the cache."""

    used_at_ns: int
    path: Path
    size_bytes: int
    """What it takes, or will take once it is complete."""
    found_bytes: int
    """What it takes now."""


def _is_index_of(manifest: Manifest, tables: Sequence[Path]) -> bool:
    """Return whether class table and image index are those that belong to a manifest."""
    return manifest.index_sha256 in ("", combined_sha256(tables))  # '': packed by an earlier version


def _evict(path: Path) -> bool:
    """Remove a file that no process uses."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    if not _lock_now(fd):
        os.close(fd)
        return False
    path.unlink(missing_ok=True)
    release(fd)
    return True


def _lock_now(fd: int) -> bool:
    """Lock a file for this process alone, unless another uses it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def release(fd: int) -> None:
    """Unlock a file and close it: closing alone doesn't unlock, where a process was forked meanwhile."""
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def _is_at(fd: int, path: Path) -> bool:
    """Return whether an open file is the one that a path names."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False
