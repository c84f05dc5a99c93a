"""Run facetrain's commands and scripts as a user does."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

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
    started = psutil.Popen(
        [str(word) for word in command],
        cwd=cwd,
        env=_environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = started.communicate(timeout=timeout_s)
    except BaseException:
        _end_with_stacks(started)
        sys.stdout.write("\n".join(started.communicate(timeout=60)))
        raise
    return subprocess.CompletedProcess(started.args, started.returncode, output, errors)


@contextmanager
def started_job(*command: str | Path, log: Path) -> Iterator[psutil.Popen]:
    """Start a job whose output goes to a file. A test that fails meanwhile shows that, and what the job was doing."""
    with log.open("wb") as output:
        job = psutil.Popen([str(word) for word in command], env=_environment(), stdout=output, stderr=output)
    try:
        yield job
    except BaseException:
        _end_with_stacks(job)
        sys.stdout.write(log.read_text())
        raise


def wait_until(is_so: Callable[[], bool], job: psutil.Popen, *, timeout_s: float = 240.0) -> None:
    """Wait for something that a job does before it ends."""
    give_up_at = time.monotonic() + timeout_s
    while not is_so():
        assert job.poll() is None, "the job ended before"
        assert time.monotonic() < give_up_at, f"not in {timeout_s:g} s"
        time.sleep(0.01)


def kill(job: psutil.Popen) -> None:
    """Kill all processes of a job, without warning: torchrun's workers have process groups of their own."""
    for process in [*job.children(recursive=True), job]:
        process.kill()
    job.wait()


def _environment(**env: str) -> dict[str, str]:
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NNODES", "NODE_RANK")
    inherited = {key: value for key, value in os.environ.items() if key not in launcher}
    ours = {"OMP_NUM_THREADS": "1", "FACETRAIN_VENV": sys.prefix, "PYTHONFAULTHANDLER": "1"}
    return inherited | ours | env


def _end_with_stacks(job: psutil.Popen) -> None:
    """End all processes of a job that hangs; those of Python write where their threads are to stderr."""
    with suppress(psutil.NoSuchProcess):
        for process in [*job.children(recursive=True)[::-1], job]:  # the first to end would end the others
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGABRT)
                time.sleep(0.5)  # one after another, or their lines mix
                process.kill()


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
