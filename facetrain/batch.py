"""PairBatch: the only thing that travels from data to step."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairBatch:
    """The pairs of one step that one rank holds.

    Dims: V = 2 views of a pair (0 anchor, 1 positive), n pairs on this rank, H x W pixels, C channels.
    """

    step: int
    """The optimizer step, from 0, that this batch belongs to."""

    images_VnHWC: Tensor  # noqa: N815 - dims as suffixes
    """uint8; channels last, RGB order where C = 3; anchors first."""

    labels_n: Tensor
    """int64; the identity of each pair, a row of the class table."""

    replaced: tuple[str, ...] = ()
    """A line for each image that couldn't be decoded and was replaced by another of its identity."""

    def to(self, device: torch.device) -> "PairBatch":
        """Return the batch on `device`; the copy doesn't block the host where the memory is pinned."""
        return replace(
            self,
            images_VnHWC=self.images_VnHWC.to(device, non_blocking=True),
            labels_n=self.labels_n.to(device, non_blocking=True),
        )

    def pin_memory(self) -> "PairBatch":
        """Return the batch in page-locked memory, so that copies to a GPU run beside computation."""
        return replace(self, images_VnHWC=self.images_VnHWC.pin_memory(), labels_n=self.labels_n.pin_memory())


def network_input(images_BHWC: Tensor) -> Tensor:
    """Turn uint8 pixels into what every backbone takes.

    Args:
        images_BHWC: uint8, B images, channels last in memory.

    Returns:
        float32 [B, C, H, W] in [-1, 1], in torch's channels_last memory format (no copy is made for the layout).
    """
    return images_BHWC.permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1.0)
