"""Cross-batch memory: embeddings of batches before this one as further negatives."""

from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor


class BatchMemory:
    """What all ranks gathered in the last batches, the same on every rank; it takes no gradient.

    Dims: B batches remembered, at most; N pairs of a global batch; P = N times the batches that are there.

    Source: Wang et al., Cross-batch memory for embedding learning, CVPR 2020.
    """

    def __init__(self, batches: int) -> None:
        """Remember nothing yet, and up to `batches` batches, 1 or more."""
        self._past: deque[tuple[Tensor, Tensor]] = deque(maxlen=batches)

    def past(self) -> tuple[Tensor, Tensor] | None:
        """Return labels [P] and rows [P, D] of the batches that are there, the newest first; None before the first."""
        if not self._past:
            return None
        labels, rows = zip(*self._past, strict=True)
        return torch.cat(labels), torch.cat(rows)

    def remember(self, labels_N: Tensor, rows_ND: Tensor) -> None:
        """Take a batch, and let go of the oldest where there are B."""
        self._past.appendleft((labels_N, rows_ND.detach().clone()))

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
        for labels, rows in zip(state["labels"], state["rows"], strict=True):
            if len(labels):  # copied, so that each batch is let go of by itself
                self._past.append((labels.to(device, copy=True), rows.to(device, copy=True)))
