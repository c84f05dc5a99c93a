"""Health of a training run: what ends it, because nothing good can follow, and what is worth a warning."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from facetrain.config import LossConfig
from facetrain.step import StepStats
from facetrain.world import World

_MIN_SPREAD = 0.01
"""`train/spread` below which embeddings are as good as equal; networks that learn have far more than 0.1."""
_NEAR_CHANCE = 0.005
"""Relative distance from the loss of equal scores within which nothing is told apart."""
_COLLAPSED_LINES = 3
"""Log lines in a row that look collapsed before there is a warning."""
_CPU_FILE = Path("/proc/cpuinfo")


class FiniteWatch:
    """Remembers the first step whose gradient isn't finite, without making the host wait for the device.

    The norm of the averaged gradient is the same on all ranks, so that they find the same step and end together.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        # Step, loss, squared norm, gradient norm; the step is -1 as long as all is well.
        self._first_bad = torch.tensor([-1.0, 0.0, 0.0, 0.0], dtype=torch.float64, device=world.device)

    def observe(self, step: int, stats: StepStats) -> None:
        """Look at the figures of a step that was just taken."""
        figures = [figure.to(self._first_bad) for figure in (stats.loss, stats.squared_norm, stats.grad_norm)]
        now = torch.stack([torch.full_like(figures[0], step), *figures])
        is_first = (self._first_bad[0] < 0) & ~figures[2].isfinite()
        self._first_bad = torch.where(is_first, now, self._first_bad)

    def first_bad_step(self) -> dict[str, float] | None:
        """Return `step` and its figures under their metric names, or None; a sync point, every rank must call it.

        Over all ranks, if there is such a step: every rank ends with the means.
        """
        if self._first_bad[0] < 0:
            return None
        names = ("step", "train/loss", "train/squared_norm", "train/grad_norm")
        return dict(zip(names, self.world.all_reduce_mean_(self._first_bad.clone()).tolist(), strict=True))


def not_finite_error(
    figures: dict[str, float], identities: Sequence[str], *, learning_rate: float, folder: Path, is_main: bool
) -> ValueError:
    """Return the error that ends a run at a step that isn't finite, after rank 0 has written down what was in it.

    Args:
        figures: Of the step, as `FiniteWatch.first_bad_step` returns them.
        identities: Names of the people in its batch.
        learning_rate: Of the step.
        folder: The run folder; `logs/not_finite.json` in it gets all of this.
        is_main: Whether this is the rank that writes.
    """
    step = int(figures["step"])
    file = folder / "logs" / "not_finite.json"
    if is_main:
        record = figures | {"step": step, "train/learning_rate": learning_rate, "identities": list(identities)}
        file.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return ValueError(
        f"step {step}: train/loss is {figures['train/loss']:.4g}, train/grad_norm {figures['train/grad_norm']:.4g},"
        f" mean squared norm {figures['train/squared_norm']:.4g}, learning rate {learning_rate:.3g}; try a smaller"
        f" train.learning_rate or train.clip_norm=10. The batch's identities are in {file}; checkpoints in"
        f" {folder / 'checkpoints'} are from before"
    )


def slow_precision_warning(
    precision: Literal["float32", "bfloat16"], device: torch.device, *, cpu_file: Path = _CPU_FILE
) -> str | None:
    """Return what to say where bfloat16 was chosen for a CPU that isn't fast at it, else None.

    Intel's avx512_bf16 without AMX counts as slow: training CasiaNet took 1.1 to 1.5 times as long with it.
    """
    if precision == "float32" or device.type != "cpu" or not cpu_file.is_file():
        return None
    cpu = cpu_file.read_text(encoding="utf-8")
    if re.search(r"\b(amx_bf16|svebf16|bf16)\b", cpu) or ("avx512_bf16" in cpu and "GenuineIntel" not in cpu):
        return None
    return "train.precision: this CPU has no fast bfloat16 instructions (Intel's AMX or the like): float32 is faster"


def loss_of_equal_scores(config: LossConfig, global_pairs: int, images_per_identity: int = 2) -> float | None:
    """Return the loss of a network that gives every image the same embedding; None where it isn't known.

    With m negatives for each pair that is log(1 + m), or m log 2 one on one.
    """
    negatives = global_pairs * (1 + config.memory_batches) - images_per_identity // 2
    known = {"npair-mc": math.log(1 + negatives), "npair-ovo": negatives * math.log(2)}
    return (known | {"tuplet": known["npair-mc"]}).get(config.name)


class CollapseWatch:
    """Says once when a network gives everyone the same embedding, or tells nobody apart."""

    def __init__(self, chance_loss: float | None) -> None:
        """Compare with `chance_loss`, that of equal scores; None looks at the spread alone."""
        self.chance_loss = chance_loss
        self._lines = 0

    def warning(self, figures: dict[str, float]) -> str | None:
        """Return what to say about the figures of a log line after the warm-up; once a run, else None."""
        chance_loss = self.chance_loss
        near_chance = chance_loss is not None and abs(figures["train/data_loss"] / chance_loss - 1) < _NEAR_CHANCE
        if self._lines < _COLLAPSED_LINES:
            self._lines = self._lines + 1 if near_chance or figures["train/spread"] < _MIN_SPREAD else 0
            if self._lines == _COLLAPSED_LINES:
                equal = "" if chance_loss is None else f", equal scores give {chance_loss:.4f}"
                return (
                    f"the network seems to have collapsed: loss {figures['train/data_loss']:.4f}{equal}; spread of the"
                    f" embeddings {figures['train/spread']:.2%}. Try a smaller train.learning_rate, a longer"
                    " train.warmup_steps, a smaller loss.l2_weight, or model.norm=batch"
                )
        return None
