"""CasiaNet: ten small convolutions, the network of the N-pair paper's face experiments."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facetrain.models.norm import Norm, norm2d

GROUP_WIDTHS = ((32, 64), (64, 128), (96, 192), (128, 256), (160, 320))
"""Output channels of the two convolutions of each group."""


class CasiaNet(nn.Module):
    """Five groups of two 3x3 convolutions with max pooling between them and average pooling at the end.

    Every convolution is followed by the normalisation and, but for the last, a ReLU: with one there, all embeddings
    would point into the positive orthant and no cosine could be negative. The output is linear in the last layer, so
    its norm is free, as the N-pair loss wants. There is no softmax layer and no dropout.

    The convolutions hold 1,751,328 weights for grey and 1,751,904 for RGB input; BatchNorm or GroupNorm add 2,880
    parameters, `none` adds 1,440 biases. Any image size works, since pooling rounds up and ends in an average: the last
    map is 7 x 7 for 100 or 112 pixels, 4 x 4 for 56.

    Source: Yi, Lei, Liao and Li, "Learning Face Representation from Scratch", 2014, table 1 (without normalisation
    there), as used by Sohn, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective", NeurIPS 2016.
    """

    embedding_dim = GROUP_WIDTHS[-1][-1]

    def __init__(self, *, channels: int, norm: Norm) -> None:
        """Make the network with fresh weights.

        Args:
            channels: Channels of the input, 1 or 3.
            norm: What follows each convolution.
        """
        super().__init__()
        groups = []
        for first, second in GROUP_WIDTHS:
            is_last = second == self.embedding_dim
            layers = [
                *_convolution(channels, first, norm, "relu"),
                *_convolution(first, second, norm, "linear" if is_last else "relu"),
            ]
            groups.append(nn.Sequential(*layers))
            channels = second
        self.groups = nn.ModuleList(groups)

    def forward(self, images: Tensor) -> Tensor:
        """Embed float [B, C, H, W] as [B, 320]; float32 also under bfloat16 autocast, for it is an average."""
        x: Tensor = self.groups[0](images)
        for group in self.groups[1:]:
            x = group(F.max_pool2d(x, kernel_size=2, ceil_mode=True))
        return x.mean(dim=(2, 3), dtype=torch.promote_types(x.dtype, torch.float32))


def _convolution(
    in_channels: int, out_channels: int, norm: Norm, activation: Literal["relu", "linear"]
) -> list[nn.Module]:
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=norm == "none")
    # He's initialisation keeps the signal's size through all ten layers, also where nothing normalises it.
    nn.init.kaiming_normal_(convolution.weight, nonlinearity=activation)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
    layers = [convolution, norm2d(norm, out_channels)]
    return [*layers, nn.ReLU(inplace=True)] if activation == "relu" else layers
