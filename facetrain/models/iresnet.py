"""iResNet: the "improved" residual network of the ArcFace line, for aligned faces."""

from typing import Literal

import torch
from torch import Tensor, nn

from facetrain.models.norm import Norm, norm2d

BLOCKS_PER_STAGE = {18: (2, 2, 2, 2), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3)}
"""Residual blocks of the four stages, by depth."""

STAGE_WIDTHS = (64, 128, 256, 512)
"""Channels of the four stages, each of half the resolution of what it takes."""

PRELU_INIT = 0.25
"""The slope for negative values that PReLU starts with, torch's own."""


class IResNet(nn.Module):
    """A stem at full resolution, four residual stages of stride 2, and a fully connected layer to 512.

    Parameters with RGB input of 112 pixels and norm 'batch': 24,025,600 (iResNet-18), 43,590,848 (iResNet-50) and
    65,156,160 (iResNet-100). 12.8 million of them are the fully connected layer's, which fits one image size only.

    Where it differs from ArcFace's networks: the scale of the last BatchNorm is trained, since it sets the norm of the
    embedding, which the N-pair loss leaves free; dropout is 0 there and absent here. With norm 'group' or 'none'
    nothing follows the fully connected layer.

    Without normalisation ('none') every residual branch starts as zero (its last convolution does), and its first
    convolution is scaled by 1 / sqrt(number of blocks). Source: Zhang, Dauphin and Ma, "Fixup Initialization", ICLR
    2019, rules 1 and 2; its scalar biases and multipliers are left out, the convolutions keep their biases instead.

    Source: Han, Kim and Kim, "Deep Pyramidal Residual Networks", CVPR 2017 (the block); Deng et al., "ArcFace", CVPR
    2019, section 3.1 (stem, stride, embedding).
    """

    embedding_dim = 512

    def __init__(self, *, depth: Literal[18, 50, 100], channels: int, image_px: int, norm: Norm) -> None:
        """Make the network with fresh weights.

        Args:
            depth: The number in the network's name.
            channels: Channels of the input, 1 or 3.
            image_px: Side of the input in pixels.
            norm: What stands at every place of a BatchNorm.
        """
        super().__init__()
        self.stem = nn.Sequential(
            _conv3x3(channels, STAGE_WIDTHS[0], norm), norm2d(norm, STAGE_WIDTHS[0]), nn.PReLU(STAGE_WIDTHS[0])
        )
        num_blocks = sum(BLOCKS_PER_STAGE[depth])
        stages, side_px, width = [], image_px, STAGE_WIDTHS[0]
        for next_width, blocks_in_stage in zip(STAGE_WIDTHS, BLOCKS_PER_STAGE[depth], strict=True):
            blocks = []
            for stride in (2, *[1] * (blocks_in_stage - 1)):
                blocks.append(_Block(width, next_width, stride, norm, num_blocks))
                width = next_width
            stages.append(nn.Sequential(*blocks))
            side_px = (side_px + 1) // 2  # a 3x3 convolution of stride 2 and padding 1 rounds up
        self.stages = nn.Sequential(*stages)
        self.last_norm = norm2d(norm, width)
        self.fc = nn.Linear(width * side_px**2, self.embedding_dim)
        self.embedding_norm = nn.BatchNorm1d(self.embedding_dim) if norm == "batch" else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Embed float [B, C, image_px, image_px] as [B, 512]."""
        x = self.last_norm(self.stages(self.stem(images)))
        return self.embedding_norm(self.fc(torch.flatten(x, 1)))  # type: ignore[no-any-return]


class _Block(nn.Module):
    """x -> shortcut(x) + norm conv(stride) prelu norm conv norm (x): no activation after the sum."""

    def __init__(self, in_width: int, width: int, stride: int, norm: Norm, num_blocks: int) -> None:
        super().__init__()
        first, last = _conv3x3(in_width, width, norm), _conv3x3(width, width, norm, stride=stride)
        if norm == "none":
            with torch.no_grad():
                first.weight *= num_blocks**-0.5
                last.weight.zero_()
        self.branch = nn.Sequential(
            norm2d(norm, in_width), first, norm2d(norm, width), nn.PReLU(width), last, norm2d(norm, width)
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_width != width:
            projection = nn.Conv2d(in_width, width, kernel_size=1, stride=stride, bias=False)
            nn.init.kaiming_normal_(projection.weight, nonlinearity="linear")
            self.shortcut = nn.Sequential(projection, norm2d(norm, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.branch(x)  # type: ignore[no-any-return]


def _conv3x3(in_width: int, width: int, norm: Norm, stride: int = 1) -> nn.Conv2d:
    convolution = nn.Conv2d(in_width, width, kernel_size=3, stride=stride, padding=1, bias=norm == "none")
    nn.init.kaiming_normal_(convolution.weight, a=PRELU_INIT)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
    return convolution
