"""From the pixels of aligned faces to a backbone's input, inside the network, as `data.decode` does it outside."""

import torch
from torch import Tensor, nn

from facetrain.config import DataConfig

_GREY = (9798.0, 19235.0, 3735.0)
"""Shares of red, green and blue in grey, of 2^15, by which OpenCV rounds. Source: ITU-R BT.601."""


class FacePixels(nn.Module):
    """uint8 [B, shard_px, shard_px, 3], RGB -> float32 [B, C, image_px, image_px] in [-1, 1]; cropped and shrunk.

    Shrinking averages areas and rounds to whole grey levels, as OpenCV's INTER_AREA does.
    """

    weights: Tensor

    def __init__(self, data: DataConfig) -> None:
        """Take crop, size and colour.

        Raises:
            ValueError: The crop would have to be enlarged.
        """
        super().__init__()
        self.side = data.crop_px or data.shard_px
        self.corner = (data.shard_px - self.side) // 2
        self.is_grey = data.colour == "grey"
        self.image_px = data.image_px
        if self.side < data.image_px:
            raise ValueError(
                f"--preprocess: expected data.image_px of at most the {self.side} pixels that are cut out, got"
                f" {data.image_px}; enlarging isn't part of an export"
            )
        self.register_buffer("weights", _area_weights(self.side, data.image_px), persistent=False)

    def forward(self, faces_BHWC: Tensor) -> Tensor:
        """Prepare faces."""
        end = self.corner + self.side
        pixels = faces_BHWC[:, self.corner : end, self.corner : end].permute(0, 3, 1, 2).to(torch.float32)
        if self.is_grey:
            red, green, blue = (share * pixels[:, c : c + 1] for c, share in enumerate(_GREY))
            pixels = torch.floor((red + green + blue + 2.0**14) / 2.0**15)
        if self.side == 2 * self.image_px:
            # OpenCV halves in whole numbers and rounds up at one half.
            pixels = torch.floor(nn.functional.avg_pool2d(pixels, 2) + 0.5)
        elif self.side != self.image_px:
            pixels = torch.round(self.weights @ pixels @ self.weights.T)
        return pixels / 127.5 - 1.0


def _area_weights(side: int, target: int) -> Tensor:
    """Return the share of each of `side` pixels in each of `target` wider ones, float32 [target, side]."""
    edges = torch.arange(target + 1, dtype=torch.float64) * (side / target)
    pixels = torch.arange(side, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
    return (overlap.clamp(min=0) * (target / side)).float()
