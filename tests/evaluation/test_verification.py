"""Every figure against a plain count over all thresholds, on scores with many ties."""

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from facetrain.evaluation.threshold import at_far, at_threshold, num_allowed
from facetrain.evaluation.verification import (
    area_under_curve,
    best_threshold,
    equal_error_rate,
    roc_curve,
    verification_rate,
    verify,
)

Scores = NDArray[np.float32]


def tied_scores(seed: int, num: int = 60) -> tuple[Scores, NDArray[np.bool_], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    scores = (rng.integers(-4, 5, num) / np.float32(7)).astype(np.float32)
    is_genuine = rng.random(num) < np.clip(0.5 + scores, 0.1, 0.9)
    return scores, is_genuine, rng.permutation(num) % 5


def brute_threshold(scores: Scores, is_genuine: NDArray[np.bool_]) -> float:
    distinct = sorted({float(score) for score in scores})
    intervals = [(-math.inf, distinct[0], distinct[0] - 1e-6)]
    intervals += [(low, high, (low + high) / 2) for low, high in itertools.pairwise(distinct)]
    intervals += [(distinct[-1], math.inf, distinct[-1] + 1e-6)]
    best, best_key = math.nan, (-1, -math.inf)
    for low, high, threshold in intervals:
        right = sum((float(score) >= threshold) == bool(same) for score, same in zip(scores, is_genuine, strict=True))
        if (right, high - low) > best_key:  # an equal key keeps the earlier, lower interval
            best, best_key = threshold, (right, high - low)
    return best


@pytest.mark.parametrize("seed", range(40))
def test_best_threshold_equals_trying_every_interval(seed: int) -> None:
    scores, is_genuine, _ = tied_scores(seed, num=5 + seed)
    assert best_threshold(scores, is_genuine) == brute_threshold(scores, is_genuine)


@pytest.mark.parametrize(
    ("scores", "is_genuine", "threshold"),
    [
        ([0.2, 0.4, 0.8], [False, True, True], 0.3),
        ([0.2, 0.4, 0.8], [False, True, False], 0.8 + 1e-6),  # an unbounded interval is the widest
        ([0.2, 0.4, 0.8], [True, True, True], 0.2 - 1e-6),
        ([0.5, 0.5], [True, False], 0.5 - 1e-6),  # both ends are as good and as wide: the lower one
        ([0.0, 0.25, 0.5, 0.75, 1.0], [False, True, False, True, True], 0.125),  # equal widths: the lower one
    ],
)
def test_best_threshold_by_hand(scores: list[float], is_genuine: list[bool], threshold: float) -> None:
    assert best_threshold(np.array(scores), np.array(is_genuine)) == pytest.approx(threshold, abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_accuracy_uses_the_threshold_of_the_other_folds(seed: int) -> None:
    scores, is_genuine, fold = tied_scores(seed)
    accuracies = []
    for held_out in range(5):
        here = fold == held_out
        threshold = brute_threshold(scores[~here], is_genuine[~here])
        accuracies.append(np.mean((scores[here].astype(np.float64) >= threshold) == is_genuine[here]))
    outcome = verify(scores, is_genuine, fold)
    assert outcome.accuracy == pytest.approx(np.mean(accuracies), abs=1e-15)
    assert outcome.se == pytest.approx(np.std(accuracies, ddof=1) / math.sqrt(5), abs=1e-15)
    assert outcome.std == pytest.approx(np.std(accuracies), abs=1e-15)


@pytest.mark.parametrize("seed", range(10))
def test_auc_counts_a_tie_one_half(seed: int) -> None:
    scores, is_genuine, _ = tied_scores(seed)
    genuine, impostor = scores[is_genuine], scores[~is_genuine]
    wins = sum((g > i) + 0.5 * (g == i) for g in genuine for i in impostor)
    assert area_under_curve(genuine, impostor) == pytest.approx(wins / (len(genuine) * len(impostor)), abs=1e-14)
    roc = roc_curve(genuine, impostor)
    assert area_under_curve(genuine, impostor) == pytest.approx(np.trapezoid(roc.vr, roc.far), abs=1e-14)


@pytest.mark.parametrize("seed", range(10))
def test_equal_error_rate_lies_on_the_roc(seed: int) -> None:
    scores, is_genuine, _ = tied_scores(seed)
    roc = roc_curve(scores[is_genuine], scores[~is_genuine])
    eer = equal_error_rate(roc)
    # The ROC may rise straight up at a FAR, so the crossing is looked for on it and not by a function of the FAR.
    on_line = np.linspace(0.0, 1.0, 20_001)
    far = np.concatenate([a + on_line * (b - a) for a, b in itertools.pairwise(roc.far)])
    vr = np.concatenate([a + on_line * (b - a) for a, b in itertools.pairwise(roc.vr)])
    nearest = np.argmin(np.abs(far - (1.0 - vr)))
    assert eer == pytest.approx(far[nearest], abs=1e-4)


def test_equal_error_rate_by_hand() -> None:
    genuine, impostor = np.array([0.9, 0.8, 0.7, 0.3]), np.array([0.4, 0.2, 0.1, 0.0])
    assert equal_error_rate(roc_curve(genuine, impostor)) == 0.25
    assert equal_error_rate(roc_curve(impostor + 2, genuine)) == 0.0


@pytest.mark.parametrize("seed", range(10))
def test_vr_threshold_is_the_kth_largest_impostor_score(seed: int) -> None:
    scores, is_genuine, _ = tied_scores(seed, num=200)
    genuine, impostor = scores[is_genuine], scores[~is_genuine]
    for far in (0.02, 0.1, 0.5, 1.0):
        rate = verification_rate(genuine, impostor, far)
        k = math.floor(far * len(impostor) + 0.5)
        threshold = sorted(impostor.tolist(), reverse=True)[k - 1]
        assert rate.point.threshold == threshold
        assert rate.value == sum(score >= threshold for score in genuine.tolist()) / len(genuine)
        assert rate.point.num_accepted == sum(score >= threshold for score in impostor.tolist()) >= k
        assert rate.point.num_tied == impostor.tolist().count(threshold)


@pytest.mark.slow  # importing it takes longer than all tests of this file
def test_vr_agrees_with_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    is_genuine = rng.random(4000) < 0.5
    scores = rng.standard_normal(4000) + 1.5 * is_genuine
    far, vr, _ = metrics.roc_curve(is_genuine, scores, drop_intermediate=False)
    rate = verification_rate(scores[is_genuine], scores[~is_genuine], 1e-2)
    assert rate.value == vr[far == rate.point.far_realised].min()


def test_a_far_finer_than_the_data_is_refused() -> None:
    genuine, impostor = np.array([0.5, 0.9]), np.linspace(0.0, 1.0, 999)
    with pytest.raises(ValueError, match=r"VR@FAR=0.001 needs 1,000 impostor pairs or more, got 999"):
        verification_rate(genuine, impostor, 1e-3)
    assert verification_rate(genuine, np.append(impostor, 0.0), 1e-3).point.num_accepted == 1


def test_a_far_that_the_impostors_do_not_resolve_has_no_figure() -> None:
    scores = np.random.default_rng(0).random(300)
    outcome = verify(scores, np.arange(300) < 150, np.arange(300) % 10)
    assert list(outcome.figures()) == ["accuracy", "se", "std", "vr_at_far_1e-2", "eer", "auc"]


def test_k_rounds_to_the_nearest_count() -> None:
    assert [num_allowed(n, 0.01) for n in (49, 50, 149, 150, 9494)] == [0, 1, 1, 2, 95]
    with pytest.raises(ValueError, match=r"FAR 0\.01 needs 50 impostor scores or more, got 49"):
        at_far(np.zeros(49), 0.01)
    for far in (1.5, 0.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"FAR: expected a fraction above 0 and up to 1, got {far:g}"):
            at_far(np.zeros(49), far)


def test_a_threshold_above_all_impostors_accepts_none() -> None:
    point = at_threshold(np.array([0.1, 0.3], dtype=np.float32), 0.31)
    assert (point.num_accepted, point.num_tied, point.far_realised) == (0, 0, 0.0)


def test_a_threshold_is_not_rounded_to_float32() -> None:
    score = np.array([0.1], dtype=np.float32)  # 0.10000000149
    assert at_threshold(score, 0.1).num_accepted == 1
    assert at_threshold(score, 0.100000002).num_accepted == 0


def test_a_collapsed_model_verifies_at_chance() -> None:
    outcome = verify(np.ones(400), np.arange(400) % 2 == 0, np.arange(400) // 40)
    assert outcome.accuracy == 0.5
    assert outcome.auc == 0.5
    assert outcome.eer == 0.5
    rate = outcome.vr_at_far["1e-2"]
    assert (rate.value, rate.point.far_realised, rate.point.num_tied) == (1.0, 1.0, 200)


@pytest.mark.parametrize(
    ("scores", "is_genuine", "fold", "message"),
    [
        ([0.1, np.nan], [True, False], [0, 1], "score of pair 1 is not finite"),
        ([0.1, 0.2], [True, False], [0, 0], "two folds or more, got 1"),
        ([0.1, 0.2], [True, True], [0, 1], "genuine and impostor pairs, got 2 genuine of 2"),
        ([0.1, 0.2], [True], [0, 1], "2 scores, 1 genuine flags and 2 folds"),
    ],
)
def test_pairs_that_cannot_be_judged_are_refused(
    scores: list[float], is_genuine: list[bool], fold: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        verify(np.array(scores), is_genuine, fold)
