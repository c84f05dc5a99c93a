"""Phases of a step: what lies between two moments is the phase that ends at the later one."""

import time
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from facetrain.losses.loss import Loss
from facetrain.world import GatherInFlight, World


class PhaseClock:
    """Takes the moments at which phases end.

    On a GPU the moments are the device's, so that nothing waits for it: a phase lasts from when the device was done
    with the one before. Time in which the device has nothing to do belongs to the phase that it waits for.
    """

    def __init__(self, device: torch.device) -> None:
        """Start with no moments, and take none as long as `is_on` is false."""
        self.device, self.is_on = device, False
        self._moments: list[tuple[str, Any]] = []

    def mark(self, phase: str) -> None:
        """Say that a phase ends here; what follows is the next one."""
        if not self.is_on:
            return
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._moments.append((phase, event))
        else:
            self._moments.append((phase, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each phase since the first moment, which ends none, and forget them; a sync point."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds: dict[str, float] = defaultdict(float)
        for (_, begin), (phase, end) in pairwise(self._moments):
            seconds[phase] += begin.elapsed_time(end) * 1e-3 if self.device.type == "cuda" else end - begin
        self._moments = []
        return dict(seconds)


@dataclass(frozen=True)
class MarkedWorld(World):
    """A World whose gathers end the phase `loss` where they begin to wait, and are the phase `gather`."""

    clock: PhaseClock = field(kw_only=True)

    def all_gather(self, x_local: Tensor) -> Tensor:
        """Return what `World.all_gather` does."""
        self.clock.mark("loss")
        gathered = super().all_gather(x_local)
        self.clock.mark("gather")
        return gathered

    def start_gather_with_grad(self, x_local: Tensor, *, reduce_dtype: torch.dtype | None = None) -> GatherInFlight:
        """Return what `World.start_gather_with_grad` does."""
        return _MarkedGather(x_local, self.world_size, reduce_dtype or x_local.dtype, self.clock)


class _MarkedGather(GatherInFlight):
    def __init__(self, x_local: Tensor, world_size: int, reduce_dtype: torch.dtype, clock: PhaseClock) -> None:
        super().__init__(x_local, world_size, reduce_dtype)
        self._clock = clock

    def finish(self) -> Tensor:
        self._clock.mark("loss")
        rows = super().finish()
        self._clock.mark("gather")
        return rows


class MarkedLoss:
    """Computes what a loss does, and ends the phase `loss` after its forward and, where it can tell, its backward."""

    def __init__(self, loss: Loss, clock: PhaseClock) -> None:
        """Mark on `clock` what `loss` does, and its gathers from now on."""
        self.loss, self.clock = loss, clock
        loss.world = MarkedWorld(**vars(loss.world), clock=clock)

    def __call__(
        self, anchors_nD: Tensor, positives_nD: Tensor, labels_n: Tensor, gather: Any = None, *, step: int = 0
    ) -> Any:
        """Compute what the loss does."""
        # With a gather under way, a network's backward lies between the two.
        inputs = [anchors_nD, positives_nD] if gather is None else [anchors_nD]
        for x_nD in inputs:
            if x_nD.requires_grad:
                x_nD.register_hook(self._has_gradient)
        value = self.loss(anchors_nD, positives_nD, labels_n, gather, step=step)
        self.clock.mark("loss")
        return value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loss, name)

    def _has_gradient(self, grad_nD: Tensor) -> None:
        self.clock.mark("loss")
