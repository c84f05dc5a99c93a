"""Stragglers: which rank the others wait for, and for how long."""

import socket
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from facetrain.losses.loss import Loss, LossValue
from facetrain.world import World


class StepClock:
    """Times this rank's own part of each step: from its beginning until it needs what other ranks have.

    All ranks take equally long for a whole step, since each exchange waits for the slowest. What differs is how long
    each takes to have its embeddings: data, copy to the device, forward; data alone where the forward exchanges as
    well. A rank that is slow later isn't seen.
    """

    def __init__(self, world: World, *, factor: float, forward_exchanges: bool = False) -> None:
        """Warn where a rank takes `factor` times the median."""
        self.world, self.factor, self.forward_exchanges = world, factor, forward_exchanges
        self._hosts = world.all_gather_object(socket.gethostname())
        self._spans: list[list[Any]] = []

    def begin(self) -> None:
        """Begin a step."""
        self._spans.append([self._now()])

    def has_data(self) -> None:
        """Take note that this rank has its batch."""
        if self.forward_exchanges:
            self._spans[-1].append(self._now())

    def has_embeddings(self) -> None:
        """Take note that this rank has its embeddings."""
        if not self.forward_exchanges:
            self._spans[-1].append(self._now())

    def read(self) -> tuple[dict[str, float], str | None]:
        """Return figures of the steps since the last call, and a warning or None; every rank must call it.

        One gather; every rank ends with the same. A sync point with the device.
        """
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
            spans_s = [begin.elapsed_time(end) * 1e-3 for begin, end in self._spans]
        else:
            spans_s = [end - begin for begin, end in self._spans]
        self._spans = []
        own_s = self.world.all_gather_object(statistics.fmean(spans_s))
        slowest = max(range(len(own_s)), key=lambda rank: own_s[rank])
        median_s = statistics.median_low(own_s)  # of two, the faster: a mean of both would hide the other
        figures = {
            "train/slowest_rank": float(slowest),
            "train/slowest_rank_s": own_s[slowest],
            "train/median_rank_s": median_s,
        }
        if own_s[slowest] <= self.factor * median_s:
            return figures, None
        part = "data" if self.forward_exchanges else "data and forward"
        return figures, (
            f"rank {slowest} on {self._hosts[slowest]} takes {own_s[slowest]:.3f} s for its {part}, the"
            f" median rank {median_s:.3f} s: all wait for it"
        )

    def _now(self) -> Any:
        """Return a moment: of the host's clock in seconds, or an event of the device."""
        if self.world.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class TimedLoss(Loss):
    """A loss, which is where a rank first needs the others; it tells the clock so."""

    def __init__(self, loss: Loss, clock: StepClock) -> None:
        self._loss, self._clock = loss, clock
        super().__init__(loss.config, loss.world)
        self.class_vectors = loss.class_vectors

    @property
    def world(self) -> World:
        """The loss's own world, so that both exchange through the same."""
        return self._loss.world

    @world.setter
    def world(self, world: World) -> None:
        self._loss.world = world

    def state(self) -> dict[str, Tensor]:
        """Return the loss's own state."""
        return self._loss.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put it back."""
        self._loss.load_state(state)

    def data_loss(self, *args: Any) -> Tensor:
        """Compute what the loss does."""
        return self._loss.data_loss(*args)

    def __call__(self, *args: Any, **kwargs: Any) -> LossValue:
        """Tell the clock, and compute what the loss does."""
        self._clock.has_embeddings()
        return super().__call__(*args, **kwargs)
