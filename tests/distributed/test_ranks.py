"""The harness that other tests stand on."""

import os
import time

import pytest
import torch
from distributed.ranks import RankError, run_ranks

from facetrain.world import World


def gather_ranks(world: World, x: torch.Tensor) -> torch.Tensor:
    return world.all_gather(x + world.rank)


def read_environment(world: World, key: str) -> tuple[str | None, int]:
    return os.environ.get(key), torch.get_num_threads()


def fail_on_rank_1(world: World) -> None:
    if world.rank == 1:
        raise ValueError("rank one is unwell")
    world.all_gather_object(None)


def die_on_rank_1(world: World) -> None:
    if world.rank == 1:
        os._exit(3)
    time.sleep(60)


def test_results_come_back_by_rank() -> None:
    for gathered in run_ranks(gather_ranks, 3, torch.zeros(1)):
        assert gathered.tolist() == [0, 1, 2]


def test_ranks_see_the_environment_of_the_call_and_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACETRAIN_TEST_KEY", "set now")
    assert run_ranks(read_environment, 2, "FACETRAIN_TEST_KEY") == [("set now", 1)] * 2


def test_traceback_of_the_failing_rank_is_raised() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 failed.*fail_on_rank_1.*rank one is unwell"):
        run_ranks(fail_on_rank_1, 2)


def test_dead_and_slow_ranks_end_the_call() -> None:
    with pytest.raises(RankError, match="rank 1 died"):
        run_ranks(die_on_rank_1, 2)
    with pytest.raises(RankError, match="gave no result in time"):
        run_ranks(die_on_rank_1, 1, timeout_s=3)
