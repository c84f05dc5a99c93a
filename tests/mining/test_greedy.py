"""Greedy class selection against the formula written out."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from facetrain.mining.greedy import GreedyResult, greedy_classes


def integer_embeddings(seed: int, num: int, dim: int) -> tuple[Tensor, Tensor]:
    """Embeddings of small integers: inner products are exact in float32, and many scores are equal."""
    generator = torch.Generator().manual_seed(seed)
    anchors, positives = torch.randint(-2, 3, (2, num, dim), generator=generator).float()
    return anchors, positives


def score_by_hand(
    anchors: Tensor, positives: Tensor, selected: list[int], c: int, hinge: bool = False, margin: float = 0.0
) -> float:
    a, p = anchors.double(), positives.double()
    score = max(float(a[s] @ p[c] - a[s] @ p[s]) for s in selected)
    return max(0.0, score + margin) if hinge else score


def check_against_formula(
    anchors: Tensor, positives: Tensor, found: GreedyResult, hinge: bool = False, margin: float = 0.0
) -> None:
    ties = 0
    for n in range(1, len(found.order)):
        selected = found.order[:n].tolist()
        rest = [c for c in range(len(anchors)) if c not in selected]
        scores = {c: score_by_hand(anchors, positives, selected, c, hinge, margin) for c in rest}
        hardest = [c for c in rest if scores[c] == max(scores.values())]
        assert found.order[n] in hardest
        assert found.violations[n] == max(scores.values())
        ties += len(hardest) > 1
    assert found.violations[0] == 0
    assert found.ties == ties


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("hinge", "margin"), [(False, 0.0), (True, 0.0), (True, 3.0)])
def test_each_added_class_has_the_largest_score_of_the_formula(seed: int, hinge: bool, margin: float) -> None:
    anchors, positives = integer_embeddings(seed, num=40, dim=4)
    found = greedy_classes(anchors, positives, 25, np.random.default_rng(seed), hinge=hinge, margin=margin)
    check_against_formula(anchors, positives, found, hinge, margin)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("one_image", [False, True])
def test_under_a_similarity_cap_the_hardest_of_the_allowed_classes_is_added(seed: int, one_image: bool) -> None:
    anchors, positives = integer_embeddings(seed, num=40, dim=4)
    found = greedy_classes(
        anchors, None if one_image else positives, 40, np.random.default_rng(seed), similarity_cap=0.77
    )
    a, p = anchors.double(), (anchors if one_image else positives).double()
    scores = a @ p.T - (0 if one_image else (a * p).sum(1, keepdim=True))
    capped = torch.nn.functional.cosine_similarity(a[:, None], p[None], dim=2) > 0.77
    fillers = 0
    for n in range(1, 40):
        selected = found.order[:n]
        rest = np.setdiff1d(np.arange(40), selected)
        allowed = rest[~capped[selected][:, rest].any(0).numpy()]
        if len(allowed):
            violations = scores[selected][:, allowed].amax(0)
            assert found.order[n] in allowed[(violations == violations.max()).numpy()]
            assert found.violations[n] == violations.max()
        else:
            fillers += 1
            assert found.violations[n] == 0
    assert found.fillers == fillers
    assert 0 < fillers < 39
    assert found.mean_violation == pytest.approx(found.violations.sum() / (39 - fillers))


def test_first_class_and_ties_are_drawn_uniformly() -> None:
    anchors, positives = torch.ones(5, 3), torch.ones(5, 3)
    orders = [tuple(greedy_classes(anchors, positives, 2, np.random.default_rng(s)).order) for s in range(2000)]
    counts = Counter(orders)
    assert set(counts) == {(a, b) for a in range(5) for b in range(5) if a != b}
    # 20 equal outcomes of expectation 100, standard deviation 9.7.
    assert max(abs(count - 100) for count in counts.values()) < 45


def test_hinge_draws_among_all_classes_that_do_not_violate() -> None:
    anchors = positives = 10 * torch.eye(6)
    drawn = [greedy_classes(anchors, positives, 2, np.random.default_rng(s), hinge=True) for s in range(60)]
    assert all(found.violations[1] == 0 and found.ties == 1 for found in drawn)
    assert len({tuple(found.order) for found in drawn}) > 20


def test_large_margin_of_the_hinge_gives_the_order_without_hinge() -> None:
    anchors, positives = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0))
    plain = greedy_classes(anchors, positives, 20, np.random.default_rng(1))
    hinged = greedy_classes(anchors, positives, 20, np.random.default_rng(1), hinge=True, margin=1000.0)
    assert np.array_equal(plain.order, hinged.order)


def test_a_class_that_duplicates_another_is_chosen_next_to_it() -> None:
    anchors = torch.nn.functional.normalize(torch.randn(30, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    positives = anchors.clone()
    anchors[7], positives[7] = anchors[19], positives[19]
    for seed in range(10):
        order = greedy_classes(anchors, positives, 30, np.random.default_rng(seed)).order.tolist()
        assert abs(order.index(7) - order.index(19)) == 1


def test_all_candidates_can_be_selected_and_none_stands_twice() -> None:
    anchors, positives = integer_embeddings(0, num=33, dim=3)
    found = greedy_classes(anchors, positives, 33, np.random.default_rng(0))
    assert found.order.dtype == np.int64
    assert sorted(found.order) == list(range(33))
    assert greedy_classes(anchors, positives, 1, np.random.default_rng(0)).order.shape == (1,)


def test_same_generator_gives_the_same_order() -> None:
    anchors, positives = integer_embeddings(2, num=50, dim=3)
    one, two = (greedy_classes(anchors, positives, 30, np.random.default_rng(9)) for _ in range(2))
    assert np.array_equal(one.order, two.order)


def test_bad_input_is_named() -> None:
    anchors, positives = integer_embeddings(0, num=4, dim=3)
    with pytest.raises(ValueError, match="expected 1 to 4, the number of candidates, got 5"):
        greedy_classes(anchors, positives, 5, np.random.default_rng(0))
    positives[2, 1] = torch.nan
    with pytest.raises(ValueError, match="expected finite numbers, got NaN or infinity"):
        greedy_classes(anchors, positives, 2, np.random.default_rng(0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_order_of_the_cpu() -> None:
    anchors, positives = integer_embeddings(0, num=40, dim=4)
    on_cuda = greedy_classes(anchors.cuda(), positives.cuda(), 25, np.random.default_rng(0))
    on_cpu = greedy_classes(anchors, positives, 25, np.random.default_rng(0))
    check_against_formula(anchors, positives, on_cuda)
    assert np.array_equal(on_cuda.order, on_cpu.order)
