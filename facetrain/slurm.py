"""Submitting to SLURM: launch/slurm.sbatch with this job's options and words written into it."""

import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

_ROOT = Path(__file__).parent.parent
_HERE = "set -euo pipefail\n"  # the first command of the script; SLURM reads options above it alone


def job_script(options: Mapping[str, str], words: Sequence[str]) -> str:
    """Return the batch script of a job, which `sbatch FILE` takes as it is, from any folder.

    Args:
        options: SLURM's long options without dashes, such as nodes, and their values.
        words: What the script gets as arguments: flags of the training.

    Raises:
        ValueError: This installation is without launch/, as a wheel is.
    """
    template = _ROOT / "launch" / "slurm.sbatch"
    if not template.is_file():
        raise ValueError(f"{template}: missing; expected facetrain installed from a checkout (pip install -e .)")
    head, body = template.read_text(encoding="utf-8").split(_HERE, 1)
    head += "".join(f"#SBATCH --{name}={value}\n" for name, value in options.items())
    return f"{head}{_HERE}FACETRAIN_ROOT={shlex.quote(str(_ROOT))}\nset -- {shlex.join(words)}\n{body}"


def submit(script: str) -> str:
    """Submit a batch script from the current folder; return the job's number and how to follow and end it.

    Raises:
        ValueError: There is no sbatch here, or SLURM refuses the job; its own words say why.
    """
    if shutil.which("sbatch") is None:
        raise ValueError("sbatch: not found; expected to be on a host of a SLURM cluster, or --dry-run")
    done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(" ".join(done.stderr.split()))
    job = done.stdout.strip().split(";")[0]  # "number;cluster" where there are several clusters
    return (
        f"job {job}\n"
        f"  follow   tail -F facetrain-{job}.log      each rank's own log is below facetrain-{job}/\n"
        f"  state    squeue -j {job}\n"
        f"  end      scancel {job}\n"
        f"  requeue  scancel --signal=USR1 --batch {job}      saves now, and goes on when SLURM starts it again"
    )
