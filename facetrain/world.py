"""World: this process among the others, its device, and the collectives, with and without gradient.

Sole importer of torch.distributed. A World of one process needs no launcher, and its collectives are the identity.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

ObjectT = TypeVar("ObjectT")


@dataclass(frozen=True)
class World:
    """One process of a job. `rank`, `local_rank` and `world_size` are as torchrun sets them."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    timeout_s: float = 600.0

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

    def all_gather_with_grad(self, x_local: Tensor) -> Tensor:
        """Return the rows of all ranks in rank order, [W * rows, ...], with gradient.

        Backward sums each row's gradient over all ranks and gives every rank its own rows (reduce-scatter), with no
        factor: where every rank's loss is its rows' sum over a constant, and gradients are then averaged over ranks,
        parameters receive exactly the gradient of the global batch.
        """
        if self.world_size == 1:
            return x_local
        return _AllGather.apply(x_local)  # type: ignore[no-any-return]

    def all_gather_uneven(self, x_local: Tensor) -> Tensor:
        """Return the rows of all ranks in rank order; each rank may hold another number of rows. No gradient."""
        if self.world_size == 1:
            return x_local
        counts = [int(c) for c in self.all_gather(torch.tensor([x_local.shape[0]], device=x_local.device)).tolist()]
        most = max(1, *counts)  # where no rank has a row, there is nothing to split
        padded = x_local.new_zeros(most, *x_local.shape[1:])
        padded[: x_local.shape[0]] = x_local
        blocks = self.all_gather(padded).split(most)
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

    def all_reduce_mean_(self, x: Tensor) -> Tensor:
        """Replace x by its mean over the ranks, in place, and return it."""
        if self.world_size > 1:
            dist.all_reduce(x, op=dist.ReduceOp.SUM)
            x /= self.world_size
        return x

    def limit_waiting(self) -> None:
        """Give every process group of this process the run's timeout.

        DeepSpeed reduces on a copy of the world group, whose 30 minutes no argument of its own reaches.
        """
        if dist.is_initialized():
            set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # torch < 2.15
            for group in dist.distributed_c10d._world.pg_map:
                set_timeout(timedelta(seconds=self.timeout_s), group)

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


@contextmanager
def start_world(device: Literal["auto", "cpu", "cuda"], timeout_s: float) -> Iterator[World]:
    """Join the processes that the launcher started (torchrun, srun torchrun), or be a world of one.

    Backends: gloo for CPU tensors, nccl for CUDA tensors. The process group is closed at the end, unless by an error.

    Raises:
        ValueError: device is cuda and there is none, or there are more processes than devices.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device: 'cuda' was asked for, but torch sees no CUDA device")
    on_cuda = device != "cpu" and torch.cuda.is_available()
    env = os.environ
    rank, local_rank, world_size = (int(env.get(key, default)) for key, default in _LAUNCHER_KEYS.items())
    here = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    if on_cuda:
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"--nproc-per-node: expected at most the {torch.cuda.device_count()} CUDA devices of this machine, or"
                f" --run.device cpu, got a process number {local_rank}"
            )
        torch.cuda.set_device(here)
    arguments: dict[str, Any] = {"timeout": timedelta(seconds=timeout_s)}
    if "RANK" not in env:
        arguments |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", **arguments)
    yield World(rank=rank, local_rank=local_rank, world_size=world_size, device=here, timeout_s=timeout_s)
    # Not after an error: peers that wait in a collective would fail at once, and hide what this rank has to say.
    dist.destroy_process_group()


_LAUNCHER_KEYS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


class _AllGather(torch.autograd.Function):
    """Local [rows, ...] -> global [W * rows, ...]. Backward: SUM reduce-scatter, global -> local."""

    @staticmethod
    def forward(ctx: Any, x_local: Tensor) -> Tensor:
        gathered = x_local.new_empty(dist.get_world_size() * x_local.shape[0], *x_local.shape[1:])
        dist.all_gather_into_tensor(gathered, x_local.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad_local = grad.new_empty(grad.shape[0] // dist.get_world_size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(grad_local, grad.contiguous(), op=dist.ReduceOp.SUM)
        return grad_local
