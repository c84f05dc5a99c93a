"""Who is lost and who is slow, by rank, host and step."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from commands import ROOT
from distributed.ranks import run_ranks

from facetrain.watch.heartbeat import Heartbeat
from facetrain.watch.stragglers import StepClock
from facetrain.world import World

COUNT_STEPS = """
import logging, os, sys, time
import torch
from facetrain.watch import heartbeat
from facetrain.command_line import user_errors
from facetrain.world import start_world

dying_rank, how = int(sys.argv[1]), int(sys.argv[2])
heartbeat.BEAT_S = 0.6
logging.basicConfig(format="%(message)s")
with user_errors(), start_world("cpu", 10.0, 120.0) as world, heartbeat.Heartbeat(world) as beat:
    for beat.step in range(10):
        if beat.step == 3 and world.rank == dying_rank:
            time.sleep(2)  # so that a beat tells the step
            os.kill(os.getpid(), how)
        world.all_reduce_sum_(torch.ones(1))
"""


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


@pytest.mark.parametrize(
    ("dying_rank", "how"),
    [
        (1, signal.SIGKILL),
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_a_lost_rank_is_named_with_its_host_and_step(dying_rank: int, how: int) -> None:
    shared = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COUNT_STEPS, str(dying_rank), str(int(how))]
    ranks = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank)}, stderr=subprocess.PIPE, cwd=ROOT)
        for rank in range(3)
    ]
    try:
        for rank, process in enumerate(ranks):
            if rank == dying_rank:
                continue
            _, err = process.communicate(timeout=240)
            said = err.decode()
            assert process.returncode == 2, said
            lost = f"rank {dying_rank} on {socket.gethostname()}"
            where = "or the way to it" if dying_rank == 0 else "last seen at step 3"
            assert f"step 3: lost {lost}, {where} (" in said  # and nobody else
            if how == signal.SIGSTOP and rank == 0:  # before the collective's own time is over
                assert re.search(rf"{re.escape(lost)}: no sign of life for \d+ s, last at step 3", said)
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def end_early_on_rank_1(world: World) -> list[str]:
    """What rank 0 takes for lost when rank 1 has ended with an error of its own."""
    with contextlib.suppress(KeyError), Heartbeat(world) as beat:
        if world.rank == 1:
            raise KeyError
        time.sleep(2)  # rank 1 has said that it ends
        return beat._lost()
    return []


def test_a_rank_that_ends_by_itself_is_not_taken_for_lost() -> None:
    assert run_ranks(end_early_on_rank_1, 2) == [[], []]


def time_steps(world: World, slow_s: float) -> tuple[dict[str, float], str | None]:
    clock = StepClock(world, factor=2.0)
    for _ in range(3):
        clock.begin()
        time.sleep(slow_s if world.rank == 1 else 0.05)
        clock.has_embeddings()
    return clock.read()


def time_forwards_that_exchange(world: World, slow_s: float) -> tuple[dict[str, float], str | None]:
    clock = StepClock(world, factor=2.0, forward_exchanges=True)
    for _ in range(3):
        clock.begin()
        time.sleep(slow_s if world.rank == 1 else 0.05)
        clock.has_data()
        world.all_gather_object(None)
        clock.has_embeddings()
    return clock.read()


def test_a_rank_that_waits_for_another_in_its_forward_is_not_slow() -> None:
    (figures, warning), _ = run_ranks(time_forwards_that_exchange, 2, 0.5)
    assert figures["train/slowest_rank"] == 1
    assert figures["train/median_rank_s"] < figures["train/slowest_rank_s"] / 2
    assert warning is not None
    assert "s for its data, the median" in warning


def test_the_slowest_rank_is_named_on_all_ranks_when_it_takes_a_multiple_of_the_median() -> None:
    (figures, warning), (others, _) = run_ranks(time_steps, 2, 0.5)
    assert figures == others
    assert figures["train/slowest_rank"] == 1
    assert figures["train/slowest_rank_s"] >= 0.5
    assert 0.05 <= figures["train/median_rank_s"] < figures["train/slowest_rank_s"] / 2
    assert warning is not None
    assert re.match(rf"rank 1 on {re.escape(socket.gethostname())} takes \d", warning)
