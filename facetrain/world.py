"""World: this process among the others, its device, and the collectives, with and without gradient.

Sole importer of torch.distributed. A World of one process needs no launcher, and its collectives are the identity.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn  # imported later, its defaults would keep the process group for ever
from torch import Tensor

ObjectT = TypeVar("ObjectT")

SHARE_CORES_VARIABLE = "FACETRAIN_SHARE_CORES"
"""Environment variable: 1 gives each CPU process of a machine cores of its own, as the scripts in launch/ do."""


@dataclass(frozen=True)
class World:
    """One process of a job. `rank`, `local_rank` and `world_size` are as torchrun sets them."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    timeout_s: float = 600.0

    @classmethod
    def alone(cls, device: Literal["auto", "cpu", "cuda"]) -> "World":
        """Return a world of this process alone, without a process group, whatever a launcher has started.

        Raises:
            ValueError: device is cuda and there is none.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: 'cuda' was asked for, but torch sees no CUDA device")
        on_cuda = device != "cpu" and torch.cuda.is_available()
        return cls(device=torch.device("cuda" if on_cuda else "cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone logs, tracks and saves."""
        return self.rank == 0

    def all_gather(self, x_local: Tensor) -> Tensor:
        """Return the rows of all ranks in rank order, [W * rows, ...]; every rank holds `rows`. No gradient."""
        if self.world_size == 1:
            return x_local
        gathered = x_local.new_empty(self.world_size * x_local.shape[0], *x_local.shape[1:])
        dist.all_gather_into_tensor(gathered, x_local.contiguous())
        return gathered

    def all_gather_with_grad(self, x_local: Tensor, *, reduce_dtype: torch.dtype | None = None) -> Tensor:
        """Return the rows of all ranks in rank order, [W * rows, ...], with gradient.

        Backward sums each row's gradient over all ranks and gives every rank its own rows (reduce-scatter), with no
        factor: where every rank's loss is its rows' sum over a constant, and gradients are then averaged over ranks,
        parameters receive exactly the gradient of the global batch.

        Args:
            x_local: [rows, ...], as many on every rank.
            reduce_dtype: What gradients are rounded to before they are summed, such as bfloat16 for half the bytes;
                None keeps them as they are.
        """
        return self.start_gather_with_grad(x_local, reduce_dtype=reduce_dtype).finish()

    def start_gather_with_grad(self, x_local: Tensor, *, reduce_dtype: torch.dtype | None = None) -> "GatherInFlight":
        """Start `all_gather_with_grad`; its `finish` gives the rows, and what is computed before runs beside it."""
        return GatherInFlight(x_local, self.world_size, reduce_dtype or x_local.dtype)

    def all_gather_uneven(self, x_local: Tensor) -> Tensor:
        """Return the rows of all ranks in rank order; each rank may hold another number of rows. No gradient."""
        if self.world_size == 1:
            return x_local
        counts = [int(c) for c in self.all_gather(torch.tensor([x_local.shape[0]], device=x_local.device)).tolist()]
        padded = x_local.new_zeros(max(counts), *x_local.shape[1:])
        padded[: x_local.shape[0]] = x_local
        blocks = self.all_gather(padded).unflatten(0, (self.world_size, max(counts)))
        return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])

    def all_gather_object(self, value: ObjectT) -> list[ObjectT]:
        """Return the picklable values of all ranks, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: ObjectT) -> ObjectT:
        """Return rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[no-any-return]

    def broadcast_(self, x: Tensor, source: int) -> Tensor:
        """Overwrite x by that of rank `source`, of the same shape and type, in place, and return it."""
        if self.world_size > 1:
            dist.broadcast(x, src=source)
        return x

    def all_reduce_mean_(self, x: Tensor) -> Tensor:
        """Replace x by its mean over the ranks, in place, and return it."""
        self.all_reduce_sum_(x)
        return x.div_(self.world_size) if self.world_size > 1 else x

    def all_reduce_sum_(self, x: Tensor) -> Tensor:
        """Replace x by its sum over the ranks, in place, and return it. No gradient."""
        if self.world_size > 1:
            dist.all_reduce(x, op=dist.ReduceOp.SUM)
        return x

    def all_reduce_max_(self, x: Tensor) -> Tensor:
        """Replace x by its maximum over the ranks, in place, and return it. No gradient."""
        if self.world_size > 1:
            dist.all_reduce(x, op=dist.ReduceOp.MAX)
        return x

    def start_any(self, value: bool) -> Callable[[], bool]:
        """Start to ask whether any rank says true; the returned function waits for the answer, and may be called again.

        Over all ranks, between CPUs: it doesn't wait for a device, and other work may go on meanwhile.
        """
        flag = torch.tensor([value], dtype=torch.uint8)
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True) if self.world_size > 1 else None

        def answer() -> bool:
            if work is not None:
                work.wait()
            return bool(flag)

        return answer

    def open_board(self) -> "Board":
        """Return where ranks leave notes for each other; for more than one rank."""
        return Board(self.world_size)

    def limit_waiting(self, timeout_s: float | None = None) -> None:
        """Give every process group of this process a timeout, that of the run if none is given.

        DeepSpeed reduces on a copy of the world group, whose 30 minutes no argument of its own reaches.
        """
        if dist.is_initialized():
            set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # torch < 2.15
            for group in dist.distributed_c10d._world.pg_map:
                set_timeout(timedelta(seconds=timeout_s or self.timeout_s), group)

    @contextmanager
    def waiting_up_to(self, timeout_s: float) -> Iterator[None]:
        """Let collectives inside wait for a peer this long, where one rank alone is at work; every rank must do so."""
        self.limit_waiting(timeout_s)
        try:
            yield
        finally:
            self.limit_waiting()

    def on_main(self, function: Callable[[], ObjectT]) -> ObjectT:
        """Call the function on rank 0 and return its value on every rank; every rank must call this.

        Raises:
            Exception: Whatever the function raised, on every rank, so that all ranks fail together.
        """
        value, error = None, None
        if self.is_main:
            try:
                value = function()
            except Exception as caught:
                error = caught
        value, error = self.broadcast_object((value, error))
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    def on_all(self, function: Callable[[], ObjectT]) -> list[ObjectT]:
        """Call the function on every rank and return the values of all, in rank order, on every rank.

        Raises:
            Exception: What it raised on the lowest rank where it did, on every rank, so that all fail together.
        """
        value, error = None, None
        try:
            value = function()
        except Exception as caught:
            error = caught
        answers = self.all_gather_object((value, error))
        for _, error in answers:
            if error is not None:
                raise error
        return [value for value, _ in answers]  # type: ignore[misc]


REPORT_TIMEOUT_S = 3600.0
"""Seconds that the other ranks wait while rank 0 computes figures and writes a report."""


_GLOO_LETS_GO_S = 0.2
"""Seconds in which gloo's threads let go of the last tensors, for which they need Python: where it is ending already,
the process aborts. DeepSpeed keeps copies of the group, so that no thread can be joined."""


@contextmanager
def start_world(
    device: Literal["auto", "cpu", "cuda"], timeout_s: float, rendezvous_timeout_s: float | None = None
) -> Iterator[World]:
    """Join the processes that the launcher started (torchrun, srun torchrun), or be a world of one.

    Backends: gloo for CPU tensors, nccl for CUDA tensors. The process group is closed at the end, unless by an error.

    Args:
        device: auto is cuda where there is one.
        timeout_s: Seconds after which a collective whose peer is gone fails.
        rendezvous_timeout_s: Seconds to wait here until all processes are there; `timeout_s` if not given.

    Raises:
        ValueError: device is cuda and there is none, or there are more processes than devices.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device: 'cuda' was asked for, but torch sees no CUDA device")
    on_cuda = device != "cpu" and torch.cuda.is_available()
    env = os.environ
    # WORLD_SIZE alone may be a leftover of something else.
    started = env if "RANK" in env else {}
    rank, local_rank, world_size = (int(started.get(key, default)) for key, default in _LAUNCHER_KEYS.items())
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
    yield World(rank=rank, local_rank=local_rank, world_size=world_size, device=here, timeout_s=timeout_s)
    # Not after an error: peers that wait in a collective would fail at once, and hide what this rank has to say.
    dist.destroy_process_group()
    if world_size > 1:
        time.sleep(_GLOO_LETS_GO_S)


def _keep_to_own_cores(local_rank: int, local_world_size: int) -> None:
    """Keep this process, and the loader's that it will start, to its share of the cores that the machine gave it."""
    if hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        share = len(cores) // local_world_size
        if share > 0:  # else the processes share what there is
            os.sched_setaffinity(0, cores[local_rank * share : (local_rank + 1) * share])


_LAUNCHER_KEYS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


class Board:
    """A short note of each rank, kept by rank 0's process: reading and writing waits for no other rank."""

    def __init__(self, world_size: int) -> None:
        self._keys = [f"facetrain/note/{rank}" for rank in range(world_size)]
        self._store = dist.distributed_c10d._get_default_store().clone()  # a connection of its own, for any thread
        self._store.set_timeout(timedelta(seconds=10))

    def write(self, rank: int, note: str) -> None:
        """Replace a rank's note; RuntimeError where rank 0 can't be reached."""
        self._store.set(self._keys[rank], note)

    def read(self) -> list[str]:
        """Return all ranks' notes, once each has written one; RuntimeError where rank 0 can't be reached."""
        return [note.decode() for note in self._store.multi_get(self._keys)]


class GatherInFlight:
    """An all-gather with gradient that leaves time for other work, in forward and in backward.

    Autograd runs the youngest operation first. The end of the gather is younger than what was computed beside it, and
    its beginning is older: so backward starts the reduce-scatter, goes through that work, and waits only then.
    """

    def __init__(self, x_local: Tensor, world_size: int, reduce_dtype: torch.dtype) -> None:
        self._begin: Tensor | None = x_local
        self._exchange = _Exchange(world_size, reduce_dtype)
        if world_size > 1:
            self._begin = _GatherBegin.apply(x_local, self._exchange)
            self._exchange.start_gather(x_local.detach().contiguous())

    def finish(self) -> Tensor:
        """Wait, and return the rows of all ranks in rank order, [W * rows, ...]; call it once."""
        begin, self._begin = self._begin, None
        assert begin is not None  # it is called once
        rows: Tensor = begin if self._exchange.world_size == 1 else _GatherEnd.apply(begin, self._exchange)
        return rows


class _Exchange:
    """What is under way between the ranks.

    Both ends of the gather hold it from forward to backward, so it must hold no tensor of the graph: a cycle through
    autograd is never freed. Hence buffers are handed over, not kept.
    """

    def __init__(self, world_size: int, reduce_dtype: torch.dtype) -> None:
        self.world_size, self._reduce_dtype = world_size, reduce_dtype
        self._work: Any = None
        self._sent: Tensor | None = None
        self._received: Tensor | None = None

    def start_gather(self, x_local: Tensor) -> None:
        """Over all ranks: every rank ends with the rows of all."""
        self._sent, self._received = x_local, x_local.new_empty(self.world_size * len(x_local), *x_local.shape[1:])
        self._work = dist.all_gather_into_tensor(self._received, x_local, async_op=True)

    def start_reduce_scatter(self, grad: Tensor) -> Tensor:
        """Over all ranks: every rank ends with its own rows' sum. Returns a placeholder of its shape."""
        self._sent = grad.to(self._reduce_dtype).contiguous()
        self._received = self._sent.new_empty(len(grad) // self.world_size, *grad.shape[1:])
        self._work = dist.reduce_scatter_tensor(self._received, self._sent, op=dist.ReduceOp.SUM, async_op=True)
        return torch.empty_like(self._received, dtype=grad.dtype)

    def finish(self) -> Tensor:
        """Wait, and hand over what has been received."""
        assert self._received is not None  # something was started
        self._work.wait()
        received, self._work, self._sent, self._received = self._received, None, None, None
        return received


class _GatherBegin(torch.autograd.Function):
    """The identity. Backward waits for the reduce-scatter that `_GatherEnd` has started."""

    @staticmethod
    def forward(ctx: Any, x_local: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return x_local.view_as(x_local)

    @staticmethod
    def backward(ctx: Any, placeholder: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.finish().to(placeholder.dtype), None


class _GatherEnd(torch.autograd.Function):
    """Local [rows, ...] -> global [W * rows, ...]. Backward starts a SUM reduce-scatter, global -> local."""

    @staticmethod
    def forward(ctx: Any, x_local: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.finish()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.start_reduce_scatter(grad), None
