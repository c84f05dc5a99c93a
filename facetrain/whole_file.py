"""Files that are there whole or not at all, after a power cut too."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def part_of(path: Path) -> Path:
    """Return where a process writes a file until it is complete and takes its place."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def put_in_place(part: Path, path: Path) -> None:
    """Let a complete file take its place, once its content is on disk."""
    flush(part)
    part.replace(path)
    flush(path.absolute().parent)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Give where to write a file, which takes its place at the end; after an error nothing is left of it."""
    part = part_of(path)
    try:
        yield part
        put_in_place(part, path)
    finally:
        part.unlink(missing_ok=True)  # of a full disk, it would take the last room


def write_text(path: Path, text: str) -> None:
    """Write a text file, UTF-8, at once or not at all."""
    with writing(path) as part:
        part.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
