"""The processes that a launcher started become a world."""

import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
import torch.distributed.nn  # imported later, its defaults would keep the process group for ever

from facetrain.world.world import World

SHARE_CORES_VARIABLE = "FACETRAIN_SHARE_CORES"
"""Environment variable: 1 gives each CPU process of a machine cores of its own, as the scripts in launch/ do."""

REPORT_TIMEOUT_S = 3600.0
"""Seconds that the other ranks wait while rank 0 computes figures and writes a report."""


_GLOO_LETS_GO_S = 0.2
"""Seconds in which gloo's threads let go of the last tensors, for which they need Python: where it is ending already,
the process aborts. DeepSpeed keeps copies of the group, so that no thread can be joined."""


def launched_world_size() -> int:
    """Return how many processes the launcher has started, before they meet in `start_world`; 1 without a launcher."""
    # WORLD_SIZE alone may be a leftover of something else.
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextmanager
def start_world(
    device: Literal["auto", "cpu", "cuda"],
    timeout_s: float,
    rendezvous_timeout_s: float | None = None,
    *,
    refuse_mixed: bool = True,
) -> Iterator[World]:
    """Join the processes that the launcher started (torchrun, srun torchrun), or be a world of one.

    Backends: gloo for CPU tensors, nccl for CUDA tensors. The process group is closed at the end, unless by an error.

    Args:
        device: auto is cuda where there is one.
        timeout_s: Seconds after which a collective whose peer is gone fails.
        rendezvous_timeout_s: Seconds to wait here until all processes are there; `timeout_s` if not given.
        refuse_mixed: Whether ranks on CPUs beside ranks on GPUs are an error; they could only wait for each other.

    Raises:
        ValueError: device is cuda and there is none, there are more processes than devices, or ranks have devices of
            different kinds.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device: 'cuda' was asked for, but torch sees no CUDA device")
    on_cuda = device != "cpu" and torch.cuda.is_available()
    env = os.environ
    started = env if "RANK" in env else {}
    rank, local_rank = (int(started.get(key, "0")) for key in ("RANK", "LOCAL_RANK"))
    world_size = launched_world_size()
    here = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    if on_cuda:
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"--nproc-per-node: expected at most the {torch.cuda.device_count()} CUDA devices of this machine, or"
                f" --run.device cpu, got a process number {local_rank}"
            )
        torch.cuda.set_device(here)
    elif env.get(SHARE_CORES_VARIABLE) == "1":
        _keep_to_own_cores(local_rank, int(env.get("LOCAL_WORLD_SIZE", "1")))
    store = dist.HashStore()  # type: ignore[attr-defined]
    if started:
        patience = timedelta(seconds=rendezvous_timeout_s or timeout_s)
        store, *_ = next(dist.rendezvous("env://", timeout=patience))  # type: ignore[attr-defined]
        store.set_timeout(timedelta(seconds=timeout_s))
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
    world = World(rank=rank, local_rank=local_rank, world_size=world_size, device=here, timeout_s=timeout_s)
    if refuse_mixed:
        _check_devices(world)
    yield world
    # Not after an error: peers that wait in a collective would fail at once, and hide what this rank has to say.
    dist.destroy_process_group()
    if world_size > 1:
        time.sleep(_GLOO_LETS_GO_S)


def _check_devices(world: World) -> None:
    """Refuse ranks on CPUs beside ranks on GPUs: they would wait for each other, and nobody would be named."""
    # Over all ranks, between CPUs, for which every rank has gloo: all end with the same answer.
    mixed = mixed_devices(world.all_gather_object((socket.gethostname(), world.device.type)))
    if mixed:
        raise ValueError(f"run.device: {mixed}; mend the driver there, or give --run.device cpu for all")


def mixed_devices(ranks: Sequence[tuple[str, str]]) -> str:
    """Return which hosts have another kind of device than most, as where a driver is broken; empty if none has.

    Args:
        ranks: Host and kind of device of each rank.
    """
    counts = Counter(kind for _, kind in ranks)
    usual = max(counts, key=lambda kind: (counts[kind], kind != "cpu"))  # of as many each, the CPUs are the mistake
    odd = sorted({f"{kind} on {host}" for host, kind in ranks if kind != usual})
    if not odd:
        return ""
    num_usual = len({host for host, kind in ranks if kind == usual})
    return f"expected one kind of device everywhere, got {', '.join(odd)}; hosts with {usual}: {num_usual}"


def _keep_to_own_cores(local_rank: int, local_world_size: int) -> None:
    """Keep this process, and the loader's that it will start, to its share of the cores that the machine gave it."""
    if hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        share = len(cores) // local_world_size
        if share > 0:  # else the processes share what there is
            os.sched_setaffinity(0, cores[local_rank * share : (local_rank + 1) * share])
