"""The all-gather with gradient, in two halves between which other work goes on."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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
