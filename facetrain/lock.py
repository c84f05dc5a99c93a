"""A lock on a folder: one job at a time writes there, and the lock ends with its owner, however that ends."""

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"
"""File in a locked folder: host, process and time of who holds it; empty when nobody does."""


@contextmanager
def hold_folder(folder: Path, *, name: str = "", wait_s: float = 0.0) -> Iterator[None]:
    """Hold an existing folder for this process.

    The kernel keeps the lock and lets go when the process ends, by kill -9 too. Processes forked meanwhile, such as
    those that read data, don't hold it: one that outlives its parent doesn't keep a restarted job out.

    Args:
        folder: What only one process may write to.
        name: What the user calls the folder, such as `run.dir: runs/a`; its path if not given.
        wait_s: Seconds to wait for whoever holds it.

    Raises:
        ValueError: Another process holds it; one line says which, on which host, since when, and what to do.
    """
    file = folder / LOCK_FILE
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            _lock(descriptor, wait_s)
        except (BlockingIOError, PermissionError):  # which of the two, POSIX leaves open
            owner = _read_owner(descriptor)
            raise ValueError(f"{name or folder}: in use by {_describe(owner)}; {_advice(owner, file)}") from None
        except OSError as error:
            log.warning(f"{file}: this file system keeps no locks ({error}); don't start a second job on this folder")
        else:
            owner = _read_owner(descriptor)
            if owner and owner.get("host") != socket.gethostname():
                log.warning(
                    f"{folder}: taken over from {_describe(owner)}, which didn't end cleanly; if it still runs, this"
                    " file system's locks don't reach other hosts: stop one of the two"
                )
        _write(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}))
        try:
            yield
        finally:
            _write(descriptor, "")
    finally:
        os.close(descriptor)


def _lock(descriptor: int, wait_s: float) -> None:
    give_up_at = time.monotonic() + wait_s
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except (BlockingIOError, PermissionError):
            if time.monotonic() >= give_up_at:
                raise
        time.sleep(1.0)


def _read_owner(descriptor: int) -> dict[str, object]:
    """Return what the last owner wrote; empty if it let go, or was killed before it had written."""
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _write(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)


def _describe(owner: dict[str, object]) -> str:
    if not owner:
        return "another process"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(str(owner.get("since", 0)))))
    return f"process {owner.get('pid')} on {owner.get('host')} since {since}"


def _advice(owner: dict[str, object], file: Path) -> str:
    advice = "wait for it, stop it, or give another folder"
    if owner and owner.get("host") != socket.gethostname():
        advice += f"; if {owner.get('host')} is down, its lock may stay: then remove {file}"
    return advice
