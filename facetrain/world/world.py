"""One process among the others, its device, and the collectives, with and without gradient."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from facetrain.world.board import Board
from facetrain.world.gather import GatherInFlight

ObjectT = TypeVar("ObjectT")


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
