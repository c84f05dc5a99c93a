"""Run facetrain's commands and scripts as a user does."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
CONFIG = ROOT / "configs" / "casia_npair320.yaml"
SCRIPTS = [
    *sorted((ROOT / "launch").glob("*.s*")),
    ROOT / "benchmarks" / "gpu.sh",
    ROOT / "tests" / "run.sh",
    ROOT / ".ci" / "run",
]


def run(
    *command: str | Path, cwd: Path = ROOT, timeout_s: float = 120.0, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in the environment of these tests; torchrun's variables of the caller are left out."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NNODES", "NODE_RANK")
    inherited = {key: value for key, value in os.environ.items() if key not in launcher}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**inherited, "OMP_NUM_THREADS": "1", "FACETRAIN_VENV": sys.prefix, **env},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def facetrain(*words: str | Path, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m facetrain WORDS`."""
    return run(sys.executable, "-m", "facetrain", *words, cwd=cwd, **env)


def assert_user_error(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2, nothing on stdout, and one line on stderr that holds the words."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("facetrain: error: ")
    for word in words:
        assert word in lines[0]
