"""Stopping on request: a signal or a file seen by any rank ends all ranks at the same step, with a checkpoint."""

import logging
import os
import signal
import socket
from pathlib import Path
from types import FrameType, TracebackType

from facetrain.world import World

log = logging.getLogger(__name__)

STOP_FILE_VARIABLE = "FACETRAIN_STOP_FILE"
"""Environment variable: path of a file that asks a run to stop once it exists, for batch scripts."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether someone asked for an end; used as a context around the training loop, in the main thread.

    SIGTERM is what torchrun passes on to its processes, and what queues send before they kill; SIGUSR1 is what they
    can be asked to send earlier. More of them change nothing: a cancelled job's processes get one SIGTERM from SLURM
    and another from torchrun. Both kill what hasn't ended some seconds later.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.reason = ""
        """What asked this rank, such as SIGTERM; empty where another rank was asked."""
        self._stop_file = Path(os.environ[STOP_FILE_VARIABLE]) if os.environ.get(STOP_FILE_VARIABLE) else None
        self._pending = world.start_any(False)

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None:
            self._pending()

    def is_due(self) -> bool:
        """Return, between two steps, whether to stop here: the same on every rank, all of which must call it.

        Over all ranks, without waiting for the device: what the ranks knew at the previous call, so that the answer is
        there already.
        """
        if self._stop_file is not None and self.world.is_main and self._stop_file.exists():
            self.reason = str(self._stop_file)
        is_due = self._pending()
        self._pending = self.world.start_any(bool(self.reason))
        return is_due

    def end(self, step: int) -> None:
        """Say that training ends here, after the checkpoint of the step; every rank must call it.

        SIGTERM is also what torchrun sends when it is lost itself, or starts its processes again with another machine.
        Other machines' torchrun must not take that for the end of the job: it sees its processes fail, and starts them
        again too.

        Raises:
            ConnectionError: All who were asked got SIGTERM, and none of them belongs to this rank's torchrun.
        """
        launcher = os.environ.get("GROUP_RANK", "0")  # of this rank's torchrun
        # Over all ranks: every rank ends with who was asked, and by what.
        requests = self.world.all_gather_object((launcher, socket.gethostname(), self.reason))
        ended = {name: host for name, host, reason in requests if reason == signal.SIGTERM.name}
        if launcher not in ended and {reason for *_, reason in requests if reason} == {signal.SIGTERM.name}:
            hosts = ", ".join(sorted(set(ended.values())))
            raise ConnectionError(f"step {step}: saved, since the processes on {hosts} got SIGTERM; goes on with them")
        log.info(f"stopped at step {step} on request; the same command goes on from there")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
