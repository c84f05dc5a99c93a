"""Stopping on request: a signal or a file seen by any rank ends all ranks at the same step, with a checkpoint."""

import logging
import os
import signal
import socket
import time
from pathlib import Path
from types import FrameType, TracebackType

from facetrain.world import World

log = logging.getLogger(__name__)

STOP_FILE_VARIABLE = "FACETRAIN_STOP_FILE"
"""Environment variable: path of a file that asks a run to stop once it exists, for batch scripts."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_OF_A_TERMINAL = (signal.SIGINT, signal.SIGHUP)
_SAME_REQUEST_S = 2.0
"""Seconds in which another SIGINT is the same Ctrl-C: the terminal sends one, and torchrun passes on another."""


class StopRequest:
    """Whether someone asked for an end; used as a context around the training loop, in the main thread.

    SIGTERM is what torchrun passes on to its processes, and what queues send before they kill; SIGUSR1 is what they
    can be asked to send earlier; SIGINT and SIGHUP come from a terminal, by Ctrl-C or when it is gone. More of them
    change nothing: a cancelled job's processes get one SIGTERM from SLURM and another from torchrun. Both kill what
    hasn't ended some seconds later. Only a SIGINT that comes later than that of the same Ctrl-C ends this rank at once.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.reason = ""
        """What asked this rank, such as SIGTERM; empty where another rank was asked."""
        self._asked_at = 0.0
        self._stop_file = Path(os.environ[STOP_FILE_VARIABLE]) if os.environ.get(STOP_FILE_VARIABLE) else None
        self._pending = world.start_any(False)

    def __enter__(self) -> "StopRequest":
        # What nohup or a shell's background has this process ignore stays ignored.
        deaf = {number for number in _OF_A_TERMINAL if signal.getsignal(number) is signal.SIG_IGN}
        self._before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS if number not in deaf}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None:
            self._pending()

    def is_due(self) -> bool:
        """Return, between two steps, whether to stop here: the same on every rank, all of which must call it.

        Over all ranks, without waiting for the device: what the ranks knew at the previous call, so that the answer is
        there already. One rank of each host looks for the file: where it is on a network file system, other hosts may
        see it a minute after the one that made it.
        """
        # os.path takes any error of the file system for no file: one that hiccups ends no run.
        if self._stop_file is not None and self.world.local_rank == 0 and os.path.exists(self._stop_file):
            self.reason = str(self._stop_file)
        is_due = self._pending()
        self._pending = self.world.start_any(bool(self.reason))
        return is_due

    def end(self, step: int) -> None:
        """Say that training ends here, after the checkpoint of the step; every rank must call it.

        SIGTERM is also what torchrun sends when it is lost itself, or starts its processes again with another machine.
        Other machines' torchrun must not take that for the end of the job: it sees its processes fail, and starts them
        again too. It never sends the other signals by itself, so that those are somebody's wish.

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
        """Take note of the request; what somebody wishes isn't outdone by a SIGTERM, which torchrun may send after it.

        Raises:
            KeyboardInterrupt: SIGINT, later than the first request.
        """
        now = time.monotonic()
        if number == signal.SIGINT and self.reason and now - self._asked_at > _SAME_REQUEST_S:
            raise KeyboardInterrupt
        self._asked_at = self._asked_at if self.reason else now
        if self.reason in ("", signal.SIGTERM.name):
            self.reason = signal.Signals(number).name
