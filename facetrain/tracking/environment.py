"""The environment of a run, as its tags record it: versions, machine, state of the code."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

_PACKAGES = ("facetrain", "torch", "deepspeed", "torchvision", "webdataset", "numpy", "opencv-python-headless")


def environment_tags() -> dict[str, str]:
    """Return versions, machine, and the git state of this package where it is a checkout; no environment variables."""
    tags = {f"version.{name}": version(name) for name in _PACKAGES}
    tags |= {
        "python": platform.python_version(),
        "host": platform.node(),
        "world_size": os.environ.get("WORLD_SIZE", "1"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    for tag, command in {"git_commit": "git rev-parse HEAD", "git_changes": "git status --porcelain"}.items():
        try:
            done = subprocess.run(
                command.split(), cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5, check=True
            )
        except (OSError, subprocess.SubprocessError):
            continue
        tags[tag] = done.stdout.strip()[:5000]
    return tags
