"""Heartbeat: every rank's sign of life, so that a run that loses one says which, where, and at what step."""

import json
import logging
import socket
import threading
import time
from types import TracebackType

from facetrain.world import World

log = logging.getLogger(__name__)

BEAT_S = 1.0
"""Seconds between the signs of life of a rank."""
_LOST_AFTER_BEATS = 3
_SIGNED_OFF = -1
_JOIN_S = 15.0
_SILENT_AFTER_S = 30.0
"""Seconds of silence, or half of `run.timeout_s` if that is less, after which rank 0 warns."""


class Heartbeat:
    """A context around the training loop: a thread leaves this rank's step where the others find it.

    Where an error ends the loop, ranks that show no life are looked for, and the error names them: a collective's own
    words hold an address at best.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.step = 0
        """The step that training is at."""
        self._ends = threading.Event()
        self._silent_after_s = min(_SILENT_AFTER_S, world.timeout_s / 2)

    def __enter__(self) -> "Heartbeat":
        if self.world.world_size > 1:
            self._board = self.world.open_board()
            self._hosts = self.world.all_gather_object(socket.gethostname())
            self._beat(0)
            self.world.all_gather_object(None)  # over all ranks: everyone has left a first sign
            self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Stop; after an error of a collective, find out who is lost.

        Raises:
            ConnectionError: Instead of the error, where ranks are lost; it names rank, host and step of each.
        """
        if self.world.world_size == 1:
            return
        try:
            if isinstance(error, RuntimeError):  # what collectives raise, among others
                lost = self._lost()
                if lost:
                    cause = " ".join(str(error).split())[:200]
                    raise ConnectionError(f"step {self.step}: lost {'; '.join(lost)} ({cause})") from error
        finally:
            self._ends.set()
            # A thread that comes back from the store while Python shuts down aborts the process.
            self._thread.join(_JOIN_S)
            if error is not None:
                self._sign_off()

    def _run(self) -> None:
        """Leave a sign every beat; on rank 0 look at all others' as well."""
        began_at = time.monotonic()
        heard = [(-1, began_at)] * self.world.world_size  # of each rank: its latest beat, and when that was news
        warned: set[int] = set()
        number = 0
        while not self._ends.wait(BEAT_S):
            number += 1
            try:
                self._beat(number)
                signs = self._board.read() if self.world.is_main else []
            except RuntimeError:  # rank 0, who keeps the board, is gone; the next collective says so
                return
            now = time.monotonic()
            for rank, (beat, step) in enumerate(json.loads(sign) for sign in signs):
                if beat != heard[rank][0]:
                    heard[rank] = (beat, now)
                    warned.discard(rank)
                elif now - heard[rank][1] > self._silent_after_s and rank not in warned:
                    warned.add(rank)
                    log.warning(
                        f"{self._name(rank)}: no sign of life for {now - heard[rank][1]:.0f} s, last at step {step};"
                        f" the run fails after run.timeout_s = {self.world.timeout_s:g} s of waiting for it"
                    )

    def _sign_off(self) -> None:
        """Say that this rank ends by itself: who looks for the lost later mustn't take it for one."""
        try:
            self._beat(_SIGNED_OFF)
        except RuntimeError:  # rank 0, who keeps the board, is gone
            log.debug("no board to sign off at")

    def _beat(self, number: int) -> None:
        self._board.write(self.world.rank, json.dumps([number, self.step]))

    def _lost(self) -> list[str]:
        """Return a phrase for each rank that shows no life for some beats."""
        try:
            before = self._board.read()
            time.sleep(_LOST_AFTER_BEATS * BEAT_S)
            after = self._board.read()
        except RuntimeError:
            return [f"{self._name(0)}, or the way to it"]
        return [
            f"{self._name(rank)}, last seen at step {json.loads(sign)[1]}"
            for rank, sign in enumerate(after)
            if sign == before[rank] and rank != self.world.rank and json.loads(sign)[0] != _SIGNED_OFF
        ]

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank]}"
