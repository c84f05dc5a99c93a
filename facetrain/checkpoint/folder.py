"""Folders of checkpoints on disk: one is whole, as its checksums prove, or it doesn't count.

What is being written stands aside as `.step-00001000.tmp`. It is flushed to disk, and last of all `SHA256SUMS` is
written, which `sha256sum -c SHA256SUMS` reads too; then it gets its name by a rename.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from facetrain.whole_file import flush

SUMS_FILE = "SHA256SUMS"
"""Checksum and name of every other file of a checkpoint."""

_STEP_FOLDER = re.compile(r"step-(\d{8})")


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Return where the checkpoint of a step is."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def aside_of(final: Path) -> Path:
    """Return where a checkpoint is written before it gets its name."""
    return final.with_name(f".{final.name}.tmp")


def publish(aside: Path, final: Path, sums: Mapping[str, str]) -> None:
    """Flush files and folder to disk, add the checksums, and rename; a crash leaves the whole checkpoint or none.

    Args:
        aside: The folder, with all its files.
        final: Its name from now on.
        sums: SHA-256 of files that others have flushed and summed already, by name; here they may not show yet.
    """
    lines = []
    for name in sorted({file.name for file in aside.iterdir()} | sums.keys()):
        lines.append(f"{sums.get(name) or flush_and_sum(aside / name)}  {name}\n")
    (aside / SUMS_FILE).write_text("".join(lines), encoding="utf-8")
    flush(aside / SUMS_FILE)
    flush(aside)
    os.rename(aside, final)
    flush(final.parent)


def damage_of(folder: Path) -> str:
    """Return what is wrong with a checkpoint, empty if it is whole; reads every byte.

    Raises:
        OSError: It can't be read, as where a file server fails: that says nothing about what is on its disk.
    """
    try:
        text = (folder / SUMS_FILE).read_bytes().decode(errors="replace")
        if not text.endswith("\n"):
            return f"{SUMS_FILE} is cut off"
        sums = {name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())}
        for name in sorted(sums.keys() ^ {file.name for file in folder.iterdir() if file.name != SUMS_FILE}):
            return f"{name} is missing" if name in sums else f"{SUMS_FILE} lacks {name}"
        for name, digest in sums.items():
            if _sum(folder / name) != digest:
                return f"{name} isn't what was saved"
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except OSError as error:
        raise OSError(
            f"{error.filename or folder}: can't be read ({error.strerror}), so that nobody knows whether the checkpoint"
            f" is whole; start again when it can, or move {folder.name} away to go on from the one before"
        ) from None
    return ""


def begun(run_dir: Path) -> bool:
    """Return whether a run folder holds a checkpoint, whole or not."""
    return bool(_step_folders(run_dir))


def newest_checkpoint(run_dir: Path) -> tuple[Path | None, dict[Path, str]]:
    """Return the newest checkpoint that is whole, or None; and what is wrong with those that are newer."""
    damaged: dict[Path, str] = {}
    found = _step_folders(run_dir)
    for step in sorted(found, reverse=True):
        damage = damage_of(found[step])
        if not damage:
            return found[step], damaged
        damaged[found[step]] = damage
    return None, damaged


def tidy(run_dir: Path, damaged: Mapping[Path, str]) -> None:
    """Remove what a killed job left half written, and rename damaged checkpoints, so that their steps can be saved."""
    for path in (run_dir / "checkpoints").glob(".step-*.tmp"):
        shutil.rmtree(path)
    for path in damaged:
        aside = path.with_name(f"{path.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


def prune(run_dir: Path, *, keep: int, best_step: int) -> None:
    """Remove checkpoints that are neither among the newest `keep` nor that of `best_step`."""
    found = _step_folders(run_dir)
    for step in sorted(found)[:-keep]:
        if step != best_step:
            aside = aside_of(found[step])  # killed half way, what is left isn't taken for a checkpoint
            found[step].rename(aside)
            shutil.rmtree(aside)


def flush_and_sum(file: Path) -> str:
    """Flush a file to disk and return its SHA-256 in hexadecimal digits."""
    flush(file)
    return _sum(file)


def _sum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _step_folders(run_dir: Path) -> dict[int, Path]:
    """Return the checkpoints of a run by their step."""
    matches = {path: _STEP_FOLDER.fullmatch(path.name) for path in (run_dir / "checkpoints").glob("step-*")}
    return {int(match[1]): path for path, match in matches.items() if match}
