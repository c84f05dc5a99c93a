"""Run a function on several gloo processes and hand back what each rank returned.

    from distributed.ranks import run_ranks

    def cases(world: World, size: int) -> float: ...     # at the top level of a test module

    results = run_ranks(cases, 3, 128)                    # results[rank]

Put several cases into one function: each call starts its processes anew. They are forked from one server that has
imported torch already, so that only the first call of a test session pays for that.
"""

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from facetrain.world import start_world


class RankError(Exception):
    """A rank failed, died or took too long; the message holds its traceback."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 240.0) -> list[Any]:
    """Call `function(world, *args)` on `world_size` processes and return the results by rank.

    Args:
        function: Top-level function of an importable module; gets a `World` on gloo and CPU, one thread per rank.
        world_size: Number of processes; 1 starts one as well.
        args: Picklable arguments, the same for every rank. Results must be picklable too.
        timeout_s: Seconds for everything, start included; afterwards all processes are killed.

    Raises:
        RankError: The first rank that failed, with its traceback; the others are killed.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the server's BLAS reads it once, when it starts
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["facetrain.world"])
    call = pickle.dumps((function, args))  # plain pickle copies tensors; multiprocessing's own would share their memory
    shared = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    readers: dict[Connection, int] = {}
    processes = []
    try:
        for rank in range(world_size):
            reader, writer = context.Pipe(duplex=False)
            env = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(target=_run_rank, args=(writer, env, call, timeout_s), daemon=True)
            process.start()
            writer.close()  # so that a rank that dies gives end-of-file
            readers[reader] = rank
            processes.append(process)
        results = _collect(readers, time.monotonic() + timeout_s)
        for process in processes:
            process.join(timeout=5)
        return results
    finally:
        for process in processes:
            process.kill()
            process.join()
        for reader in readers:
            reader.close()


def _collect(readers: dict[Connection, int], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(readers):
        pending = [reader for reader, rank in readers.items() if rank not in results]
        ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {[readers[reader] for reader in pending]} gave no result in time")
        for reader in ready:
            assert isinstance(reader, Connection)
            rank = readers[reader]
            try:
                is_result, value = pickle.loads(reader.recv_bytes())
            except EOFError:
                raise RankError(f"rank {rank} died without a traceback") from None
            if not is_result:
                raise RankError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(readers))]


def _run_rank(writer: Connection, env: dict[str, str], call: bytes, timeout_s: float) -> None:
    os.environ.clear()  # the server's environment is that of the first test
    os.environ.update(env)
    torch.set_num_threads(1)
    try:
        function, args = pickle.loads(call)
        with start_world("cpu", timeout_s) as world:
            try:
                answer = pickle.dumps((True, function(world, *args)))
            except Exception:
                # Sent before the group closes: its peers then fail too, and the cause is to arrive first.
                writer.send_bytes(pickle.dumps((False, traceback.format_exc())))
                return
            world.all_gather_object(None)  # rank 0 holds the store; nobody leaves while a peer may still need it
        writer.send_bytes(answer)
    except Exception:
        writer.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        writer.close()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
