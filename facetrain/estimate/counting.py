"""Counting what code computes, moves and holds, by running it on tensors that have shapes and no data.

Nothing is allocated and nothing computed, so that a batch of any size takes a second on any machine.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from facetrain.estimate.cluster import Cluster

_NO_KERNEL = ("alias", "detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
"""Operations of torch that touch no data, besides views."""


@dataclass(frozen=True)
class Work:
    """The operations of a piece of code, in order."""

    flops: NDArray[np.float64]
    """[operations]; of matrix products and convolutions, a multiplication and an addition being two; else 0."""
    moved_bytes: NDArray[np.float64]
    """[operations]; what each reads and writes of its arguments and results."""
    peak_bytes: int
    """The most that lived at once of what the code itself made."""

    def seconds(self, cluster: Cluster, tflops: float) -> float:
        """Return the time on a GPU: each operation is bound by arithmetic, by memory or by its launch.

        Source: Williams, Waterman and Patterson, "Roofline", CACM 2009, operation by operation.
        """
        bound = np.maximum(self.flops / (1e12 * tflops), self.moved_bytes / (1e9 * cluster.gpu_gb_per_s))
        return float(np.maximum(bound, 1e-6 * cluster.kernel_us).sum())


class WorkCounter(TorchDispatchMode):
    """Counts the operations of a `with` block, and the bytes of the tensors that they make and that still live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = self.peak_bytes = 0
        self._flops: list[float] = []
        self._moved_bytes: list[float] = []
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    @property
    def num_operations(self) -> int:
        """Operations so far."""
        return len(self._flops)

    def work(self, first: int = 0, last: int | None = None) -> Work:
        """Return operations first to last - 1 of what was counted; the peak is that of all of them."""
        part = slice(first, last)
        return Work(np.array(self._flops[part]), np.array(self._moved_bytes[part]), self.peak_bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        known = {x.untyped_storage()._cdata for x in given}
        for x in made:
            if x.untyped_storage()._cdata not in known:
                self._take(x.untyped_storage())
        if func.namespace == "aten" and not func.is_view and func.overloadpacket.__name__ not in _NO_KERNEL:
            self._flops.append(_flops(func, args, kwargs, result))
            self._moved_bytes.append(sum(x.numel() * x.element_size() for x in [*given, *made]))
        return result

    def _take(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        num_bytes = storage.nbytes()
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._release, num_bytes)

    def _release(self, num_bytes: int) -> None:
        self.live_bytes -= num_bytes


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> float:
    """Return what torch's own counter says; it doesn't know that `addmm_` is `addmm`."""
    packet = getattr(torch.ops.aten, func.overloadpacket.__name__.rstrip("_"), func.overloadpacket)
    count = flop_registry.get(packet)
    return float(count(*args, **kwargs, out_val=result)) if count else 0.0


def without_data() -> FakeTensorMode:
    """Return the context in which tensors, also those of a new network, have shapes and no data."""
    return FakeTensorMode()
