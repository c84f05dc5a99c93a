"""What a fault costs: how it shows, how soon, how many steps, and whether the final weights are as without it."""

import itertools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.training import Training
from safetensors.numpy import load_file

STEPS = 60
SAVE_EVERY = 10
STRIKE_AT = 25
"""The step at which most faults strike."""
TIMEOUT_S = 10.0
"""`run.timeout_s` of these runs."""


@dataclass(frozen=True)
class Outcome:
    """A row of the table."""

    said: str
    """What the user sees."""
    detected_s: float | None
    """Seconds from the fault to that; None where nothing needs to be said."""
    next_step_s: float
    """Seconds from the fault to the first step after the last restart; the longest step where nothing is said."""
    steps_lost: int
    """Steps that were taken again."""
    is_equal: bool
    """Whether the final weights are those expected, to the bit."""
    note: str = ""
    """What else was seen."""


@dataclass
class Bench:
    """Where runs are made, and what an undisturbed one ends with."""

    folder: Path
    shards: Path

    def settings(self, name: str, **more: object) -> dict[str, object]:
        """Return the flags of a run of seconds, in a fresh folder."""
        return {
            "run.dir": self.folder / name,
            "run.timeout_s": TIMEOUT_S,
            "run.rendezvous_timeout_s": 120,
            "data.shards": self.shards,
            "data.image_px": 32,
            "data.workers": 0,
            "train.global_pairs": 8,
            "train.steps": STEPS,
            "train.learning_rate": 1e-4,
            "train.save_every_steps": SAVE_EVERY,
            "train.log_every_steps": 1,
            "train.straggler_factor": 1000,  # a busy machine isn't what is looked at
            "tracking.backend": "none",
        } | {key.replace("__", "."): value for key, value in more.items()}

    def undisturbed(self) -> Path:
        """Return the folder of a run of two ranks that nothing happened to."""
        run_dir = self.folder / "undisturbed"
        if not (run_dir / "results.json").exists():
            with Training(self.settings("undisturbed"), processes=2) as training:
                assert training.wait_until_ended() == [0], training.said()
        return run_dir


def strike(training: Training, harm: Callable[[], object]) -> float:
    """Do harm, and return when."""
    struck_at = time.monotonic()
    harm()
    return struck_at


def outcome(
    training: Training,
    struck_at: float,
    says: str,
    expected: Path,
    *,
    nodes: list[int] | None = None,
    note: str = "",
) -> Outcome:
    """Wait until a training has come through, and say how.

    Args:
        training: After a fault.
        struck_at: Its moment.
        says: What is to be seen of it; empty where training just goes on.
        expected: Folder of the run whose weights it must end with.
        nodes: Those whose launchers end well; all if not given.
        note: Goes into the outcome.
    """
    codes = training.wait_until_ended(nodes=nodes)
    assert codes == [0] * len(codes), training.said()
    is_equal = same_weights(training.run_dir, expected)
    taken = [line for line in training.lines if line.step]
    if not says:
        restart = re.compile("continues at step|lost rank|started again")
        assert not any(restart.search(line.text) for line in training.lines if line.at > struck_at), training.said()
        since = max(line.at for line in taken if line.at < struck_at)
        longest_s = max(b.at - a.at for a, b in itertools.pairwise(taken) if a.at >= since)
        return Outcome("nothing", None, longest_s, 0, is_equal, note)
    seen = training.wait_for(says, after=struck_at, timeout_s=0)
    restarts = [line.at for line in training.lines if line.at > struck_at and "continues at step" in line.text]
    goes_on_at = max([seen.at, *restarts])
    if not restarts and goes_on_at > taken[-1].at:  # said after the last step, of a training that never stopped
        goes_on_at = struck_at
    again = next(line for line in taken if line.at > goes_on_at)
    last = max((line.step or 0 for line in taken if line.at < again.at), default=0)
    return Outcome(
        said=cleaned(seen.text),
        detected_s=seen.at - struck_at,
        next_step_s=again.at - struck_at,
        steps_lost=last + 1 - (again.step or 0),
        is_equal=is_equal,
        note=note,
    )


def cleaned(text: str) -> str:
    """Return a line without its time, its prefix, a library's own words, and the names that are of one run alone."""
    text = re.sub(r"^\d\d:\d\d:\d\d |^facetrain: (error: )?", "", text)
    text = re.sub(r"(lost rank .*?) \(.*", r"\1", text)
    text = re.sub(r"\bft\d+[ab]\b", "HOST", text)
    text = re.sub(r"/\S*/(checkpoints|logs|run)\b", r"\1", text)
    return text if len(text) < 160 else f"{text[:157]}..."


def same_weights(run_dir: Path, expected: Path) -> bool:
    """Return whether two finished runs hold the same weights, to the bit."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (run_dir, expected))
    return ours.keys() == theirs.keys() and all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
