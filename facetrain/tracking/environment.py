"""The environment of a run, as its tags record it: versions, machine, state of the code."""

import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from facetrain.world import launched_world_size

_PACKAGES = ("facetrain", "torch", "deepspeed", "torchvision", "webdataset", "numpy", "opencv-python-headless")


def environment_tags() -> dict[str, str]:
    """Return versions, machine, and the git state of this package where it is a checkout; no environment variables."""
    tags = _versions() | {
        "python": platform.python_version(),
        "host": platform.node(),
        "world_size": str(launched_world_size()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    if commit := git_commit():
        tags |= {"git_commit": commit, "git_changes": _git("status --porcelain")[:5000]}
    return tags


def _versions() -> dict[str, str]:
    """Return the versions of the packages that are installed under these names; a checkout on PYTHONPATH isn't."""
    versions = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[f"version.{name}"] = version(name)
    return versions


def git_commit() -> str:
    """Return the revision of this package where it is a checkout; else nothing.

    Installed below a checkout of something else, as in its virtual environment, git would answer for that.
    """
    return _git("rev-parse HEAD") if _git(f"ls-files {Path(__file__).name}") else ""


def _git(command: str) -> str:
    try:
        done = subprocess.run(
            ["git", *command.split()], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
