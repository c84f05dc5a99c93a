"""Cross-batch memory: embeddings of batches before this one as further negatives."""

from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor


class BatchMemory:
    """What all ranks gathered in the last batches, the same on every rank; it takes no gradient.

    Dims: B batches remembered, at most; N pairs of a global batch; K = N (1 + batches that are there) columns.

    Source: Wang et al., Cross-batch memory for embedding learning, CVPR 2020.
    """

    def __init__(self, batches: int) -> None:
        """Remember nothing yet, and up to `batches` batches, 1 or more."""
        self._past: deque[tuple[Tensor, Tensor]] = deque(maxlen=batches)

    def extend(self, labels_N: Tensor, rows_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return labels [K] and rows [K, D], first of this batch, with gradient, then of those before; remember it."""
        labels_K = torch.cat([labels_N, *(labels for labels, _ in self._past)])
        rows_KD = torch.cat([rows_ND, *(rows for _, rows in self._past)])
        self._past.appendleft((labels_N, rows_ND.detach().clone()))
        return labels_K, rows_KD

    def state(self) -> dict[str, Tensor]:
        """Return labels [B, N] and rows [B, N, D] as CPU tensors, the newest batch first; empty ones without any."""
        labels, rows = zip(*self._past, strict=True) if self._past else ((torch.empty(0),), (torch.empty(0),))
        return {name: torch.stack(x).to("cpu", copy=True) for name, x in (("labels", labels), ("rows", rows))}

    def load(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Put back what `state` gave.

        Raises:
            ValueError: It is of something else.
        """
        if not {"labels", "rows"} <= state.keys():
            raise ValueError(f"expected a memory of labels and rows, got {sorted(state)}")
        batches = zip(state["labels"].to(device), state["rows"].to(device), strict=True)
        self._past.extend(pair for pair in batches if len(pair[0]))
