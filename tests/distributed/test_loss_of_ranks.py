"""Every variant of the loss over W ranks is that of one process, and so are the gradients of all embeddings."""

import pytest
import torch
from distributed.ranks import run_ranks

from facetrain.config import LossConfig
from facetrain.losses.npair import NPairLoss
from facetrain.world import World

PAIRS = 24
VARIANTS = [
    {},
    {"symmetric": True},
    {"symmetric": True, "temperature": 0.2},
    {"name": "npair-ovo"},
    {"name": "tuplet"},
    {"name": "tuplet", "temperature": 0.2},
]


def embeddings_and_labels():
    generator = torch.Generator().manual_seed(0)
    embeddings_VND = torch.randn(2, PAIRS, 6, generator=generator, dtype=torch.float64)
    labels_N = torch.arange(PAIRS)
    labels_N[[5, 20]] = 1  # repeated, also on another rank
    return embeddings_VND, labels_N


def losses_and_gradients(world):
    """Per variant: the mean of the ranks' shares, and the gradient of this rank's embeddings by that mean."""
    embeddings_VND, labels_N = embeddings_and_labels()
    rows = slice(world.rank * PAIRS // world.world_size, (world.rank + 1) * PAIRS // world.world_size)
    outcomes = []
    for variant in VARIANTS:
        local_VnD = embeddings_VND[:, rows].clone().requires_grad_()
        total = NPairLoss(LossConfig(tile_bytes=600, **variant), world)(*local_VnD, labels_N[rows]).total
        (gradient,) = torch.autograd.grad(total, local_VnD)
        outcomes.append((float(world.all_reduce_mean_(total.detach())), gradient / world.world_size))
    return outcomes


@pytest.mark.parametrize("world_size", [2, 4, *(pytest.param(w, marks=pytest.mark.slow) for w in (3, 8))])
def test_any_number_of_ranks_gives_the_loss_and_gradients_of_one(world_size):
    expected = losses_and_gradients(World())
    by_rank = run_ranks(losses_and_gradients, world_size)
    for v, (loss, gradient_VND) in enumerate(expected):
        assert [outcomes[v][0] for outcomes in by_rank] == pytest.approx([loss] * world_size, rel=1e-12)
        gathered = torch.cat([outcomes[v][1] for outcomes in by_rank], dim=1)
        torch.testing.assert_close(gathered, gradient_VND, rtol=1e-12, atol=1e-14)
