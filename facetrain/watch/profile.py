"""Where the time of a step goes: `train.profile_steps`."""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from facetrain.config import Config
from facetrain.engine import Engine
from facetrain.losses.loss import Loss
from facetrain.tracking import Tracker
from facetrain.watch.flops import matmul_flops_per_s, training_flops_per_image
from facetrain.watch.phases import MarkedLoss, PhaseClock
from facetrain.world import World

log = logging.getLogger(__name__)

PHASES = ("data wait", "copy", "forward", "gather", "loss", "backward", "reduce", "optimizer", "logging", "between")
"""In the order of a step. `copy` holds the pixels' way into [-1, 1]; they go to the
device beside the step before; `loss` its own backward and the
exchange in it; `between` what the loop does between two steps, such as mining and checkpoints."""
MAX_TRACED_STEPS = 3
"""Steps in a trace, which makes them slower: they are the last, and in no figure."""


@dataclass(frozen=True)
class StepShares:
    """What a profile found, over all ranks."""

    steps: int
    """Steps that were timed."""
    step_s: float
    """Seconds of a step, the ranks' mean."""
    phases_s: dict[str, float]
    """Seconds of each phase in a step, the ranks' mean."""
    slowest_s: dict[str, float]
    """The same of the rank that takes longest in the phase."""
    images_per_s: float
    """Of all ranks."""
    flops_per_s: float
    """Achieved by a rank: the network's forward and backward."""
    peak_flops_per_s: float
    """Of a large matrix product on a rank's device, the ranks' mean."""

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, a fraction: achieved by peak. Source: Chowdhery et al., PaLM, 2022, appendix B."""
        return self.flops_per_s / self.peak_flops_per_s

    def table(self) -> str:
        """Return a screen of text."""
        lines = [f"{'':12}{'ms a step':>12}{'share':>9}{'slowest rank':>15}"]
        lines += [
            f"{phase:12}{1e3 * self.phases_s[phase]:>12.2f}{self.phases_s[phase] / self.step_s:>9.1%}"
            f"{1e3 * self.slowest_s[phase]:>15.2f}"
            for phase in PHASES
        ]
        lines.append(f"{'step':12}{1e3 * self.step_s:>12.2f}{1:>9.1%}   mean of {self.steps} steps")
        lines.append(
            f"{self.images_per_s:.1f} images/s; a rank does {self.flops_per_s / 1e12:.3g} TFLOP/s of the"
            f" {self.peak_flops_per_s / 1e12:.3g} of a matrix product: MFU {self.mfu:.1%}"
        )
        return "\n".join(lines)


class StepProfile:
    """Times the phases of the steps of `train.profile_steps` and traces the last of them."""

    @classmethod
    def open(
        cls, config: Config, engine: Engine, loss: Loss, tracker: Tracker, world: World, *, step: int
    ) -> "StepProfile | None":
        """Return the profile of a run that is at `step`, or None if none is asked for."""
        if config.train.profiled is None:
            return None
        if step > config.train.profiled.start:
            log.warning(f"train.profile_steps: no profile, since the run goes on at step {step}")
            return None
        return cls(config, config.train.profiled, engine, loss, tracker, world)

    def __init__(
        self, config: Config, steps: range, engine: Engine, loss: Loss, tracker: Tracker, world: World
    ) -> None:
        """Measure the device's peak, and let engine and loss mark their phases; every rank must do so."""
        self.config, self.steps, self.tracker, self.world = config, steps, tracker, world
        self.clock = PhaseClock(world.device)
        self.loss: Any = MarkedLoss(loss, self.clock)
        """Takes the place of the loss."""
        engine.mark_phases(self.clock.mark)
        self._peak_flops_per_s = matmul_flops_per_s(world.device, config.train.precision)
        self._num_timed = len(steps) - min(MAX_TRACED_STEPS, len(steps) // 2)
        self._trace: Any = None

    def before(self, step: int) -> None:
        """Begin or end what this step begins or ends; between two steps, on every rank, and once after the last."""
        self.clock.mark("between")
        if step == self.steps.start:
            self.clock.is_on = True
            self.clock.mark("between")
        elif step == self.steps.start + self._num_timed:
            shares = self._shares(self.clock.seconds())
            self.clock.is_on = False
            self.tracker.metrics(step, {"train/mfu": shares.mfu})
            if self.world.is_main:
                self._write(shares)
                self._trace = torch.profiler.profile(activities=list(torch.profiler.supported_activities()))
                self._trace.start()
        elif step == self.steps.stop and self._trace is not None:
            self._trace.stop()
            self._write_trace()
            self._trace = None

    @property
    def _folder(self) -> Path:
        return Path(self.config.run.dir) / "profile"

    def _shares(self, seconds: dict[str, float]) -> StepShares:
        """Join what the ranks found; one gather, and every rank ends with the same."""
        mine = [seconds.get(phase, 0.0) / self._num_timed for phase in PHASES] + [self._peak_flops_per_s]
        *phases_s, peaks = zip(*self.world.all_gather_object(mine), strict=True)
        mean_s = dict(zip(PHASES, map(fmean, phases_s), strict=True))
        images_per_s = 2 * self.config.train.global_pairs / sum(mean_s.values())
        flops = training_flops_per_image(self.config.model, self.config.data)
        return StepShares(
            steps=self._num_timed,
            step_s=sum(mean_s.values()),
            phases_s=mean_s,
            slowest_s=dict(zip(PHASES, map(max, phases_s), strict=True)),
            images_per_s=images_per_s,
            flops_per_s=flops * images_per_s / self.world.world_size,
            peak_flops_per_s=fmean(peaks),
        )

    def _write(self, shares: StepShares) -> None:
        """On rank 0 alone, which a full disk must not end before the others."""
        record = asdict(shares) | {"mfu": shares.mfu, "world_size": self.world.world_size}
        table = f"steps {self.steps.start} to {self.steps.start + shares.steps - 1}\n{shares.table()}"
        log.info(f"where the time goes, {table}")
        try:
            self._folder.mkdir(exist_ok=True)
            (self._folder / "profile.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            (self._folder / "profile.txt").write_text(table + "\n", encoding="utf-8")
        except OSError as error:
            log.warning(f"{self._folder}: the profile can't be written ({error})")

    def _write_trace(self) -> None:
        """Write the trace, on rank 0 alone as well."""
        file = self._folder / "trace.json.gz"
        try:
            self._trace.export_chrome_trace(str(file))
        except (OSError, RuntimeError) as error:  # torch writes a file aside first, in C++
            log.warning(f"{file}: the trace can't be written ({error})")
        else:
            log.info(f"trace of steps {self.steps.start + self._num_timed} to {self.steps.stop - 1}: {file}")
