"""Inner products of classes that are the same to the bit however they are computed.

Greedy selection compares scores for equality, and one flipped bit changes the rest of a list. A matrix library adds in
an order of its own for each shape, thread count and device, so that a product of one row, of a block of rows and of a
subset of the columns differ in their last bits. Embeddings are therefore rounded to whole numbers of a small unit
first: float64 then holds every product and every partial sum exactly, and no order of adding can matter.

Dims: C candidate classes, D embedding width.
"""

import math

import torch
from torch import Tensor

GRID_BITS = 26
"""The longest embedding is below 2^26 units, so that inner products are below 2^53 squared units (Cauchy-Schwarz)."""


@torch.no_grad()
def on_grid(embeddings_CD: Tensor) -> Tensor:
    """Round embeddings to whole numbers of a power of two, so that all sums of their products are exact in float64.

    The unit is 2^-26 of the power of two above the longest norm. An inner product moves by 7e-9 (rms; 3e-8 at most in
    160,000) of the product of the longest norms, as much as float32 arithmetic is off by. Embeddings that are on a grid
    already, or some rows of them, are returned as they are.

    Args:
        embeddings_CD: finite, any floating type.

    Returns:
        float64 [C, D], on the same device.
    """
    exact_CD = embeddings_CD.double()
    longest = float(torch.linalg.vector_norm(exact_CD, dim=1).max())
    unit = math.ldexp(1.0, math.frexp(longest)[1] - GRID_BITS)
    rounded_CD = (exact_CD / unit).round_().mul_(unit)
    return exact_CD if torch.equal(rounded_CD, exact_CD) else rounded_CD


def norms(embeddings_CD: Tensor) -> Tensor:
    """Return the norms of embeddings on a grid, float64 [C], the same to the bit on any device."""
    return embeddings_CD.square().sum(dim=1).sqrt()
