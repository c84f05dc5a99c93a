"""Embeddings with structure: classes lie in groups, as faces do."""

import torch
from torch import Tensor


def clustered(num: int, dim: int, *, seed: int = 0, num_groups: int = 12, spread: float = 0.7) -> tuple[Tensor, Tensor]:
    """Return anchors and positives, float32 [num, dim], of classes around `num_groups` centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_groups, dim, generator=generator)
    classes = centres[torch.arange(num) % num_groups] + spread * torch.randn(num, dim, generator=generator)
    anchors, positives = classes + 0.4 * torch.randn(2, num, dim, generator=generator)
    return anchors, positives
