import gc
import os
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import run
from distributed.ranks import run_ranks

from facetrain.doctor import _ranks
from facetrain.world import SHARE_CORES_VARIABLE, GatherInFlight, World, mixed_devices
from facetrain.world.start import _check_devices


def collectives(world):
    rank = world.rank
    own = torch.full((rank, 2), float(rank))  # rank 0 has no rows
    called = []

    def fail():
        called.append(rank)
        raise ValueError("rank 0 could not")

    def fail_on_rank_1():
        if rank == 1:
            raise ValueError("rank 1 could not")

    caught = None
    try:
        world.on_main(fail)
    except ValueError as error:
        caught = str(error)
    caught_of_all = None
    try:
        world.on_all(fail_on_rank_1)
    except ValueError as error:
        caught_of_all = str(error)
    return {
        "even": world.all_gather(torch.tensor([rank])).tolist(),
        "uneven": world.all_gather_uneven(own)[:, 0].tolist(),
        "nothing": list(world.all_gather_uneven(own[:0]).shape),
        "objects": world.all_gather_object({"rank": rank}),
        "broadcast": world.broadcast_object(f"from {rank}"),
        "mean": world.all_reduce_mean_(torch.tensor([float(rank)])).item(),
        "on_main": world.on_main(lambda: f"from {rank}"),
        "caught": (caught, called),
        "caught_of_all": caught_of_all,
        "overwritten": world.broadcast_(torch.tensor([rank, 7], dtype=torch.bfloat16), 1).tolist(),
    }


def test_every_rank_ends_with_the_same_values():
    results = run_ranks(collectives, 3)
    for rank, result in enumerate(results):
        assert result["even"] == [0, 1, 2]
        assert result["uneven"] == [1.0, 2.0, 2.0]
        assert result["nothing"] == [0, 2]
        assert result["objects"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert result["broadcast"] == "from 0"
        assert result["mean"] == 1.0
        assert result["on_main"] == "from 0"
        assert result["caught"] == ("rank 0 could not", [0] if rank == 0 else [])
        assert result["caught_of_all"] == "rank 1 could not"
        assert result["overwritten"] == [1, 7]


def exchanges_alive_after_backward(world):
    alive = []
    for _ in range(3):
        x = torch.ones(4, 3, requires_grad=True)
        flight = GatherInFlight(x, world.world_size, torch.float32)
        alive.append(weakref.ref(flight._exchange))
        flight.finish().square().sum().backward()
        assert x.grad.tolist() == [[2.0 * world.world_size] * 3] * 4
    del flight
    gc.collect()
    return sum(exchange() is not None for exchange in alive)


def test_a_gather_leaves_nothing_in_memory_behind():
    assert run_ranks(exchanges_alive_after_backward, 2) == [0, 0]


def test_a_world_of_one_needs_no_process_group():
    world = World()
    x = torch.randn(3, 2, requires_grad=True)
    assert world.all_gather_with_grad(x) is x
    assert world.all_gather_uneven(x) is x
    assert world.broadcast_object(7) == 7
    assert world.on_main(lambda: 8) == 8
    with pytest.raises(ZeroDivisionError):
        world.on_main(lambda: 1 // 0)


@pytest.mark.parametrize(
    ("ranks", "named"),
    [
        ([("a", "cpu"), ("b", "cpu")], None),
        ([("a", "cuda"), ("a", "cuda"), ("b", "cuda")], None),
        ([("a", "cpu"), ("b", "cuda"), ("c", "cuda")], "got cpu on a; hosts with cuda: 2"),
        ([("a", "cpu"), ("b", "cuda")], "got cpu on a; hosts with cuda: 1"),
        ([("a", "cpu"), ("b", "cpu"), ("c", "cuda"), ("d", "cpu")], "got cuda on c; hosts with cpu: 3"),
    ],
)
def test_hosts_with_another_kind_of_device_are_named(ranks, named):
    assert mixed_devices(ranks) == (f"expected one kind of device everywhere, {named}" if named else "")


def ranks_of_two_kinds(world):
    """As where one rank has lost its GPU: the doctor's line, and what `start_world` says."""
    odd = replace(world, device=torch.device("meta" if world.rank == 2 else "cpu"))
    with pytest.raises(ValueError, match="expected one kind of device") as error:
        _check_devices(odd)
    return _ranks(odd, ["a", "a", "b"]), str(error.value)


def test_a_rank_with_another_kind_of_device_fails_on_all_ranks_and_with_the_doctor():
    for finding, error in run_ranks(ranks_of_two_kinds, 3):
        assert "got meta on b; hosts with cpu: 1" in finding.advice
        assert "run.device: expected one kind of device everywhere, got meta on" in error


def cores(world):
    return os.sched_getaffinity(0)


def test_processes_of_a_machine_keep_to_cores_of_their_own(monkeypatch):
    given = os.sched_getaffinity(0)
    if len(given) < 2:
        pytest.skip("one core")
    monkeypatch.setenv(SHARE_CORES_VARIABLE, "1")
    first, second = run_ranks(cores, 2)
    assert first | second <= given
    assert len(first) == len(second) == len(given) // 2
    assert not first & second
    monkeypatch.setenv(SHARE_CORES_VARIABLE, "0")
    assert run_ranks(cores, 1) == [given]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux")
def test_a_closed_world_leaves_no_thread_of_gloo_that_could_abort_the_end_of_the_process():
    program = """
import torch
from pathlib import Path
from facetrain.world import start_world

with start_world("cpu", 60) as world:
    import torch.distributed.nn  # takes the world group for a default; torch._dynamo imports it
print([name for task in Path("/proc/self/task").iterdir() if "gloo" in (name := (task / "comm").read_text())])
"""
    done = run(sys.executable, "-c", program)
    assert done.stdout.strip() == "[]", done.stderr
