"""Programs that tests need, from Debian's packages."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path


def missing_programs(programs: Sequence[str], packages: Sequence[str]) -> str:
    """Return which programs aren't here; empty if all are. As root on Debian they are installed, by one at a time."""
    with Path(tempfile.gettempdir(), "facetrain-tests-apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = [program for program in programs if not shutil.which(program)]
        if missing and os.geteuid() == 0 and shutil.which("apt-get"):
            apt = ["apt-get", "-qq", "-o", "Acquire::Retries=3", "-o", "DPkg::Lock::Timeout=300"]
            subprocess.run([*apt, "update"], check=True, stdout=subprocess.DEVNULL)
            install = [*apt, "install", "-y", "--no-install-recommends", *packages]
            subprocess.run(install, check=True, stdout=subprocess.DEVNULL)
            missing = [program for program in programs if not shutil.which(program)]
    return f"not installed: {', '.join(missing)}" if missing else ""
