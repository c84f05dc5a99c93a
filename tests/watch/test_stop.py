"""Who was asked to stop, and what becomes of the others."""

import os
import signal

import pytest
from distributed.ranks import RankError, run_ranks

from facetrain.watch.stop import StopRequest
from facetrain.world import World


def stop(world: World, number: int, launchers: list[str]) -> str:
    """The last rank gets a signal; returns its own reason, once all have ended."""
    os.environ["GROUP_RANK"] = launchers[world.rank]
    with StopRequest(world) as request:
        if world.rank == world.world_size - 1:
            for _ in range(2):  # SLURM and torchrun, both of them
                os.kill(os.getpid(), number)
        while not request.is_due():
            pass
        request.end(7)
        return request.reason


def test_a_stop_that_someone_asked_for_ends_all_ranks() -> None:
    assert run_ranks(stop, 2, signal.SIGUSR1, ["0", "1"]) == ["", "SIGUSR1"]
    assert run_ranks(stop, 2, signal.SIGTERM, ["0", "0"]) == ["", "SIGTERM"]


def test_a_stop_by_another_machines_torchrun_is_a_failure_here() -> None:
    with pytest.raises(RankError, match=r"rank 0 failed:(.|\n)*step 7: saved, since the processes on .* got SIGTERM"):
        run_ranks(stop, 2, signal.SIGTERM, ["0", "1"])
