"""Listens to the collectives that a process issues, whoever issues them."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OPERATIONS = {
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
}


class Traffic(TorchDispatchMode):
    """Records (operation, payload in bytes) of every collective in a `with` block: torch dispatches them as c10d's."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            # What is larger of what goes in and what comes out is the whole; the other is a rank's share of it.
            sides = [sum(x.numel() * x.element_size() for x in tensors_of(side)) for side in args[:2]]
            self.calls.append((OPERATIONS.get(name, name), max(sides)))
        return func(*args, **(kwargs or {}))


def tensors_of(side: Any) -> list[Tensor]:
    return [x for x in tree_leaves(side) if isinstance(x, Tensor)]
