import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from facetrain.config import LossConfig
from facetrain.losses.logit_tiles import one_vs_all, sum_of_rows
from facetrain.losses.npair import NPairLoss
from facetrain.world import World


def rows(anchors, positives, labels=None):
    labels = torch.arange(len(anchors)) if labels is None else labels
    sums = [
        sum_of_rows(one_vs_all, anchors[i : i + 1], positives, labels[i : i + 1], labels, first=i)
        for i in range(len(labels))
    ]
    return torch.stack(sums)


def test_two_dimensional_embeddings_at_known_angles():
    angle = math.radians(60)
    anchors = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    # Own inner products are 1, those with the other are cos 60 = 0.5.
    expected = math.log(1 + math.exp(0.5 - 1.0))
    torch.testing.assert_close(rows(anchors, anchors), torch.full((2,), expected, dtype=torch.float64))


def test_four_pairs_by_hand():
    anchors = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    positives = torch.tensor([[1.0, 0.0], [0.0, 3.0], [1.0, 0.0], [-2.0, 1.0]], dtype=torch.float64)
    logits = [[2, 0, 2, -4], [0, 3, 0, 1], [1, 3, 1, -1], [-1, 0, -1, 2]]
    expected = [
        math.log(1 + sum(math.exp(s - row[i]) for j, s in enumerate(row) if j != i)) for i, row in enumerate(logits)
    ]
    torch.testing.assert_close(rows(anchors, positives), torch.tensor(expected, dtype=torch.float64))


def test_rows_are_the_cross_entropy_with_the_diagonal_as_target():
    anchors, positives = torch.randn(2, 9, 5, dtype=torch.float64)
    expected = F.cross_entropy(anchors @ positives.T, torch.arange(9), reduction="none")
    torch.testing.assert_close(rows(anchors, positives), expected, rtol=1e-13, atol=1e-13)


VARIANTS = [
    {},
    {"symmetric": True},
    {"temperature": 0.3},
    {"symmetric": True, "temperature": 0.3},
    {"name": "npair-ovo"},
    {"name": "npair-ovo", "temperature": 0.3},
    {"name": "tuplet"},
    {"name": "tuplet", "temperature": 0.3},
]
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)
DISTINCT, REPEATED = torch.arange(6), torch.tensor([0, 1, 1, 2, 3, 3])


def by_the_formula(anchors, positives, labels, *, name="npair-mc", symmetric=False, temperature=None):
    """The mean loss, pair by pair."""
    if temperature is not None:
        anchors, positives = (x / x.norm(dim=1, keepdim=True) / temperature**0.5 for x in (anchors, positives))
    if symmetric:
        swapped = by_the_formula(positives, anchors, labels, name=name)
        return (by_the_formula(anchors, positives, labels, name=name) + swapped) / 2
    others = anchors if name == "tuplet" else positives
    terms = []
    for i, (anchor, positive) in enumerate(zip(anchors, positives, strict=True)):
        exponents = [anchor @ others[j] - anchor @ positive for j in range(len(others)) if labels[j] != labels[i]]
        if name == "npair-ovo":
            terms.append(sum(torch.log1p(e.exp()) for e in exponents))
        else:
            terms.append(torch.log1p(sum(e.exp() for e in exponents)))
    return sum(terms) / len(terms)


@every_variant
@pytest.mark.parametrize("labels", [DISTINCT, REPEATED], ids=["distinct", "repeated"])
def test_every_variant_is_its_formula_and_passes_gradcheck(variant, labels):
    anchors, positives = torch.randn(2, 6, 4, dtype=torch.float64).requires_grad_()
    loss = NPairLoss(LossConfig(l2_weight=0.01, **variant), World())
    value = loss(anchors, positives, labels)
    torch.testing.assert_close(value.data, by_the_formula(anchors, positives, labels, **variant).detach())

    def recomputed(a, p):  # gradcheck goes backward more than once, and the loss's graph serves one time
        return checkpoint(lambda a, p: loss(a, p, labels).total, a, p, use_reentrant=False)

    assert torch.autograd.gradcheck(recomputed, (anchors, positives))


def test_a_second_backward_through_one_graph_is_refused():
    anchors, positives = torch.randn(2, 6, 4).requires_grad_()
    total = NPairLoss(LossConfig(), World())(anchors, positives, DISTINCT).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@every_variant
def test_tiles_change_nothing_but_memory(variant):
    anchors, positives = torch.randn(2, 23, 8, dtype=torch.float64).requires_grad_()

    def outcome(tile_bytes):
        loss = NPairLoss(LossConfig(tile_bytes=tile_bytes, **variant), World())
        total = loss(anchors, positives, torch.arange(23) // 2).total
        return [total.detach(), *torch.autograd.grad(total, (anchors, positives))]

    whole = outcome(1 << 20)
    for tile_bytes in (1, 3 * 23 * 8, 22 * 23 * 8):
        for tiled, expected in zip(outcome(tile_bytes), whole, strict=True):
            torch.testing.assert_close(tiled, expected, rtol=1e-12, atol=1e-12)


def test_the_symmetric_loss_is_the_mean_of_two_cross_entropies():
    anchors, positives = torch.randn(2, 9, 5, dtype=torch.float64)
    logits = anchors @ positives.T
    expected = (F.cross_entropy(logits, torch.arange(9)) + F.cross_entropy(logits.T, torch.arange(9))) / 2
    value = NPairLoss(LossConfig(symmetric=True), World())(anchors, positives, torch.arange(9))
    torch.testing.assert_close(value.data, expected)


def test_gradients_equal_those_of_a_cross_entropy():
    anchors, positives = torch.randn(2, 9, 5, dtype=torch.float64).requires_grad_()
    expected = torch.autograd.grad(F.cross_entropy(anchors @ positives.T, torch.arange(9)), (anchors, positives))
    gradients = torch.autograd.grad(rows(anchors, positives).mean(), (anchors, positives))
    for got, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)


def test_pairs_of_one_identity_are_no_negatives_of_each_other():
    anchors, positives = torch.randn(2, 3, 4, dtype=torch.float64)
    repeated = rows(anchors, positives, torch.tensor([7, 7, 8]))
    alone = sum_of_rows(one_vs_all, anchors[:1], positives[[0, 2]], torch.tensor([7]), torch.tensor([7, 8]))
    torch.testing.assert_close(repeated[0], alone)


@every_variant
def test_pairs_without_negatives_have_loss_and_gradient_zero(variant):
    anchors, positives = torch.randn(2, 3, 4).requires_grad_()
    objective = NPairLoss(LossConfig(l2_weight=0.0, **variant), World())
    loss = objective(anchors, positives, torch.zeros(3, dtype=torch.int64)).total
    gradients = torch.autograd.grad(loss, (anchors, positives))
    assert loss.item() == 0
    assert all(gradient.eq(0).all() for gradient in gradients)


def test_large_norms_do_not_overflow():
    anchors, positives = 20 * torch.randn(2, 64, 128).requires_grad_()
    loss = rows(anchors, positives).sum()
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("scale", [3.0, 4.5])
def test_attracting_gradient_survives_a_small_loss(scale):
    """In float32 the gradient of a nearly solved row agrees with float64 where a cross-entropy's no longer does."""
    anchors = scale * torch.eye(8, 16, dtype=torch.float64)
    positives = anchors + 0.01 * torch.randn(8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def gradient(dtype):
        leaf = anchors.to(dtype, copy=True).requires_grad_()
        loss = rows(leaf, positives.to(dtype)).sum()
        return loss, torch.autograd.grad(loss, leaf)[0].double()

    loss, exact = gradient(torch.float64)
    assert loss < 1e-2
    assert (gradient(torch.float32)[1] - exact).norm() < 1e-5 * exact.norm()


def test_penalty_is_the_mean_squared_norm_of_all_embeddings():
    anchors, positives = torch.randn(2, 5, 3)
    value = NPairLoss(LossConfig(l2_weight=0.5), World())(anchors, positives, torch.arange(5))
    mean = torch.cat([anchors, positives]).square().sum(1).mean()
    torch.testing.assert_close(value.squared_norm, mean)
    torch.testing.assert_close(value.total, value.data + 0.5 * mean)


def test_bfloat16_embeddings_are_scored_in_float32_also_under_autocast():
    anchors, positives = torch.randn(2, 32, 64).to(torch.bfloat16)
    loss = NPairLoss(LossConfig(), World())
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(anchors, positives, torch.arange(32))
    torch.testing.assert_close(value.data, rows(anchors.float(), positives.float()).mean())
    assert value.total.dtype == torch.float32
