"""A small file system, and how to fill it."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def missing_disk() -> str:
    """Return why no file system can be mounted here; empty if one can."""
    if os.geteuid() != 0:
        return "a small file system can be mounted by root alone"
    done = subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], check=False)
    return "no file system can be mounted here" if done.returncode else ""


@contextmanager
def small_disk(folder: Path, *, size: str) -> Iterator[None]:
    """Mount an empty file system of a size such as 64m at `folder`, as long as the context lasts."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(file: Path) -> None:
    """Let a file take all the room that is left."""
    with file.open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(4096))
        except OSError:
            pass
