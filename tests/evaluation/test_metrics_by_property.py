"""Every metric against an independent count, on scores in which nearly everything ties."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from facetrain.evaluation.blufr import verification_of_all_pairs
from facetrain.evaluation.conventions import insightface_figures
from facetrain.evaluation.identification import OpenSet, best_scores, rank_probes
from facetrain.evaluation.threshold import at_far, at_threshold
from facetrain.evaluation.verification import (
    area_under_curve,
    best_threshold,
    equal_error_rate,
    roc_curve,
    verification_rate,
    verify,
    verify_view1,
)

SCORES = st.integers(-3, 3).map(lambda step: np.float32(step / 3))
EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)


def scores(min_size: int = 1, max_size: int = 25) -> st.SearchStrategy[NDArray[np.float32]]:
    return st.lists(SCORES, min_size=min_size, max_size=max_size).map(lambda values: np.array(values, np.float32))


def faces(num_people: int) -> st.SearchStrategy[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Unit vectors with entries of -/+ 0.5, whose products are exact, and everybody among their people."""
    image = st.tuples(st.lists(st.sampled_from([-0.5, 0.5]), min_size=4, max_size=4), st.integers(0, num_people - 1))
    return st.lists(image, min_size=num_people, max_size=30).map(
        lambda images: (
            np.array([vector for vector, _ in images], np.float32),
            np.array([*range(num_people), *(person for _, person in images[num_people:])]),
        )
    )


def is_accepted(score: Any, threshold: float) -> bool:
    return float(score) >= threshold


def brute_cut(values: list[float], genuine: list[bool]) -> float:
    ends = sorted(set(values))
    cuts = [(ends[0] - 1e-6, math.inf), *(((a + b) / 2, b - a) for a, b in itertools.pairwise(ends))]
    cuts.append((ends[-1] + 1e-6, math.inf))
    right = [sum((v >= cut) == g for v, g in zip(values, genuine, strict=True)) for cut, _ in cuts]
    best = [(cut, width) for (cut, width), hits in zip(cuts, right, strict=True) if hits == max(right)]
    return min(cut for cut, width in best if width == max(width for _, width in best))


@EXAMPLES
@given(scores(), st.sampled_from([0.01, 0.1, 0.2, 0.5, 1.0]), scores())
def test_vr_at_far_is_a_count_at_the_kth_score(
    impostor: NDArray[np.float32], far: float, genuine: NDArray[np.float32]
) -> None:
    if far < 1 / len(impostor):
        with pytest.raises(ValueError, match=r"needs [\d,]+ impostor pairs or more"):
            verification_rate(genuine, impostor, far)
        return
    k = math.floor(far * len(impostor) + 0.5)
    threshold = sorted(map(float, impostor), reverse=True)[k - 1]
    rate = verification_rate(genuine, impostor, far)
    assert rate.value == sum(is_accepted(score, threshold) for score in genuine) / len(genuine)
    assert rate.point.threshold == threshold
    assert rate.point.num_accepted == sum(is_accepted(score, threshold) for score in impostor)
    assert rate.point.num_tied == sum(float(score) == threshold for score in impostor)


@EXAMPLES
@given(scores(), st.floats(-2, 2))
def test_an_explicit_threshold_accepts_what_is_not_below_it(impostor: NDArray[np.float32], threshold: float) -> None:
    point = at_threshold(impostor, threshold)
    assert point.num_accepted == sum(is_accepted(score, threshold) for score in impostor)
    assert at_threshold(impostor, float(impostor.max()) + 1e-9).far_realised == 0.0


@EXAMPLES
@given(st.lists(st.tuples(SCORES, st.booleans(), st.integers(0, 2)), min_size=6, max_size=40))
def test_accuracy_auc_and_eer_are_counts(pairs: list[tuple[np.float32, bool, int]]) -> None:
    values = [float(score) for score, _, _ in pairs]
    genuine, fold = [flag for _, flag, _ in pairs], [number % 3 for number in range(len(pairs))]
    if all(genuine) or not any(genuine):
        with pytest.raises(ValueError, match="expected genuine and impostor pairs"):
            verify(np.array(values), genuine, fold)
        return
    accuracies = []
    for held_out in range(3):
        rest = [i for i in range(len(pairs)) if fold[i] != held_out]
        cut = brute_cut([values[i] for i in rest], [genuine[i] for i in rest])
        assert best_threshold(np.array([values[i] for i in rest]), np.array([genuine[i] for i in rest])) == cut
        here = [i for i in range(len(pairs)) if fold[i] == held_out]
        accuracies.append(sum((values[i] >= cut) == genuine[i] for i in here) / len(here))
    outcome = verify(np.array(values), genuine, fold)
    assert outcome.accuracy == pytest.approx(np.mean(accuracies), abs=1e-12)
    own = [v for v, g in zip(values, genuine, strict=True) if g]
    other = [v for v, g in zip(values, genuine, strict=True) if not g]
    wins = sum((a > b) + 0.5 * (a == b) for a in own for b in other)
    assert area_under_curve(np.array(own), np.array(other)) == pytest.approx(wins / (len(own) * len(other)), abs=1e-12)
    # The line FAR = 1 - VR lies between the last point of the ROC below it and the first on or above it.
    points = [(0.0, 0.0)]
    for cut in sorted(set(values), reverse=True):
        points.append((sum(v >= cut for v in other) / len(other), sum(v >= cut for v in own) / len(own)))
    before, after = next((p, q) for p, q in itertools.pairwise(points) if q[0] + q[1] >= 1 - 1e-12)
    eer = equal_error_rate(roc_curve(np.array(own), np.array(other)))
    assert before[0] - 1e-12 <= eer <= after[0] + 1e-12
    assert 1 - after[1] - 1e-12 <= eer <= 1 - before[1] + 1e-12


@EXAMPLES
@given(faces(4), faces(4))
def test_a_rank_counts_the_people_who_score_as_well(
    gallery: tuple[NDArray[np.float32], NDArray[np.int64]], probes: tuple[NDArray[np.float32], NDArray[np.int64]]
) -> None:
    ranks, own = rank_probes(*probes, *gallery)
    anybody = best_scores(probes[0], gallery[0])
    for number, (probe, person) in enumerate(zip(*probes, strict=True)):
        best = {p: max(float(f @ probe) for f, q in zip(*gallery, strict=True) if q == p) for p in range(4)}
        assert own[number] == best[person]
        assert ranks[number] == 1 + sum(best[p] >= best[person] for p in best if p != person)
        assert anybody[number] == max(best.values())


@EXAMPLES
@given(st.lists(st.tuples(st.integers(1, 3), SCORES), min_size=1, max_size=20), scores(), st.integers(1, 3))
def test_dir_is_a_count_of_probes_found(
    genuine: list[tuple[int, np.float32]], impostor: NDArray[np.float32], rank: int
) -> None:
    ranks, own = np.array([r for r, _ in genuine]), np.array([s for _, s in genuine], np.float32)
    people, strangers = np.arange(len(genuine)), np.arange(len(impostor))
    outcome = OpenSet(ranks, own, impostor, 5, people, strangers, people, strangers)
    for far in (0.02, 0.1, 0.3, 1.0):
        k = math.floor(far * len(impostor) + 0.5)
        if k < 1:
            with pytest.raises(ValueError, match="impostor scores or more"):
                outcome.dir_at_far(far, rank)
            continue
        threshold = sorted(map(float, impostor), reverse=True)[k - 1]
        found = sum(r <= rank and is_accepted(s, threshold) for r, s in genuine)
        assert outcome.dir_at_far(far, rank).value == found / len(genuine)
    above = outcome.dir_at_threshold(float(impostor.max()) + 0.1, rank)
    assert above.point.far_realised == 0.0
    assert above.value == sum(r <= rank and float(s) >= float(impostor.max()) + 0.1 for r, s in genuine) / len(genuine)


@EXAMPLES
@given(scores(max_size=1), scores())
def test_one_impostor_shows_a_far_of_one_half_and_no_less(
    impostor: NDArray[np.float32], genuine: NDArray[np.float32]
) -> None:
    assert at_far(impostor, 0.5).threshold == impostor[0]
    with pytest.raises(ValueError, match="needs 2 impostor scores or more, got 1"):
        at_far(impostor, 0.3)
    with pytest.raises(ValueError, match="needs 2 impostor pairs or more, got 1"):
        verification_rate(genuine, impostor, 0.5)
    assert verification_rate(genuine, impostor, 1.0).point.num_accepted == 1


@EXAMPLES
@given(faces(3), st.sampled_from([0.1, 0.3, 1.0]))
def test_vr_over_all_pairs_is_that_of_the_listed_pairs(
    images: tuple[NDArray[np.float32], NDArray[np.int64]], far: float
) -> None:
    pairs = list(itertools.combinations(range(len(images[1])), 2))
    genuine = np.array([images[0][i] @ images[0][j] for i, j in pairs if images[1][i] == images[1][j]], np.float32)
    impostor = np.array([images[0][i] @ images[0][j] for i, j in pairs if images[1][i] != images[1][j]], np.float32)
    if not len(genuine) or far * len(impostor) < 1:
        with pytest.raises(ValueError, match="needs genuine pairs and"):
            verification_of_all_pairs(*images, far)
        return
    assert verification_of_all_pairs(*images, far) == verification_rate(genuine, impostor, far)


@EXAMPLES
@given(
    st.lists(st.tuples(SCORES, st.booleans()), min_size=1, max_size=20),
    st.lists(st.tuples(SCORES, st.booleans()), min_size=1, max_size=20),
)
def test_view_1_measures_one_list_at_the_threshold_of_the_other(
    train: list[tuple[np.float32, bool]], test: list[tuple[np.float32, bool]]
) -> None:
    cut = brute_cut([float(score) for score, _ in train], [genuine for _, genuine in train])
    right = sum((float(score) >= cut) == genuine for score, genuine in test)
    lists = [(np.array([s for s, _ in pairs]), np.array([g for _, g in pairs])) for pairs in (train, test)]
    outcome = verify_view1(*lists[0], *lists[1])
    assert (outcome.threshold, outcome.accuracy) == (cut, right / len(test))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(faces(4), st.randoms(use_true_random=False))
def test_insightface_figures_are_those_of_its_loops(
    images: tuple[NDArray[np.float32], NDArray[np.int64]], random: Any
) -> None:
    rows = [(random.randrange(len(images[1])), random.randrange(len(images[1]))) for _ in range(24)]
    a, b = (images[0][[pair[side] for pair in rows]] for side in (0, 1))
    genuine = np.array([images[1][i] == images[1][j] for i, j in rows])
    fold = np.arange(24) // 6
    distances = np.sum(np.square(np.subtract(a, b)), 1)
    accuracies, grid = [], np.arange(0, 4, 0.01)
    for k in range(4):
        rest, here = fold != k, fold == k
        train = [np.mean(np.less(distances[rest], cut) == genuine[rest]) for cut in grid]
        accuracies.append(np.mean(np.less(distances[here], grid[np.argmax(train)]) == genuine[here]))
    figures = insightface_figures(a, b, genuine, fold)
    assert figures.accuracy == pytest.approx(np.mean(accuracies))
    assert figures.std == pytest.approx(np.std(accuracies))
