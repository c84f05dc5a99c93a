"""Ranks, CMC and DIR against plain loops over all people, on scores with many ties."""

import numpy as np
import pytest
from numpy.typing import NDArray

from facetrain.evaluation.identification import ClosedSet, OpenSet, best_scores, rank_probes, rank_probes_in_draws


def corners(rng: np.random.Generator, num: int) -> NDArray[np.float32]:
    """Unit vectors whose inner products are exact."""
    return (rng.choice([-1, 1], (num, 4)) / 2).astype(np.float32)


def brute_rank(
    probe: NDArray[np.float32], person: int, gallery: NDArray[np.float32], people: NDArray[np.int64]
) -> tuple[int, float]:
    best = {int(p): max(float(probe @ face) for face in gallery[people == p]) for p in set(people.tolist())}
    return 1 + sum(score >= best[person] for other, score in best.items() if other != person), best[person]


def open_set(seed: int, num_impostors: int = 150) -> OpenSet:
    rng = np.random.default_rng(seed)
    return OpenSet(
        ranks=rng.integers(1, 4, 80),
        own_scores=(rng.integers(0, 12, 80) / np.float32(11)).astype(np.float32),
        impostor_scores=(rng.integers(-2, 11, num_impostors) / np.float32(11)).astype(np.float32),
        gallery=30,
        people=np.arange(80),
        impostor_people=np.arange(num_impostors),
        probe_rows=np.arange(80),
        impostor_rows=np.arange(80, 80 + num_impostors),
    )


def closed_set(ranks: list[int], gallery: int) -> ClosedSet:
    scores = np.zeros(len(ranks), dtype=np.float32)
    probes = np.arange(len(ranks))
    return ClosedSet(np.array(ranks), gallery, people=probes, own_scores=scores, probe_rows=probes)


@pytest.mark.parametrize("seed", range(20))
def test_rank_is_one_more_than_the_others_who_score_as_well(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gallery, people = corners(rng, 40), rng.integers(0, 12, 40) * 3
    probes, own = corners(rng, 30), rng.choice(people, 30)
    ranks, scores = rank_probes(probes, own, gallery, people)
    expected = [brute_rank(probe, int(person), gallery, people) for probe, person in zip(probes, own, strict=True)]
    assert list(zip(ranks.tolist(), scores.tolist(), strict=True)) == expected


@pytest.mark.parametrize("seed", range(5))
def test_ranks_in_draws_equal_ranks_in_each_smaller_gallery(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gallery, people = corners(rng, 40), np.append(np.arange(15), rng.integers(0, 15, 25))
    probes, own = corners(rng, 30), rng.integers(0, 5, 30)
    drawn = rng.random((4, 15)) < 0.5
    drawn[:, :5] = True
    ranks, scores = rank_probes_in_draws(probes, own, gallery, people, drawn)
    for draw, chosen in enumerate(drawn):
        inside = chosen[people]
        expected_ranks, expected_scores = rank_probes(probes, own, gallery[inside], people[inside])
        assert np.array_equal(ranks[draw], expected_ranks)
        assert np.array_equal(scores, expected_scores)


def test_ranks_are_of_people_and_not_of_images() -> None:
    gallery = np.array([[1, 0], [1, 0], [0.6, 0.8]], dtype=np.float32)
    ranks, _ = rank_probes(np.array([[0.8, 0.6]], dtype=np.float32), np.array([1]), gallery, np.array([0, 0, 1]))
    assert ranks.tolist() == [1]
    ranks, _ = rank_probes(np.array([[1, 0]], dtype=np.float32), np.array([1]), gallery, np.array([0, 0, 1]))
    assert ranks.tolist() == [2]


@pytest.mark.parametrize("width", [4, 357, 512])
def test_a_collapsed_model_has_rank1_zero(width: int) -> None:
    face = np.random.default_rng(0).standard_normal(width)
    faces = np.tile((face / np.linalg.norm(face)).astype(np.float32), (1481, 1))
    ranks, _ = rank_probes(faces[:3], np.arange(3), faces, np.arange(1481))
    assert ranks.tolist() == [1481] * 3
    assert closed_set(ranks.tolist(), gallery=1481).rank_rate(1) == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_best_score_is_the_maximum_over_the_gallery(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probes, gallery = corners(rng, 100), corners(rng, 7)
    assert np.array_equal(best_scores(probes, gallery), (probes @ gallery.T).max(axis=1))


def test_cmc_counts_ranks() -> None:
    outcome = closed_set([1, 1, 3, 9], gallery=9)
    assert outcome.cmc(5).tolist() == [0.5, 0.5, 0.75, 0.75, 0.75]
    assert outcome.figures() == {"rank1": 0.5, "rank5": 0.75}


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("far", [0.01, 0.05, 0.5, 1.0])
def test_dir_counts_found_probes_at_the_kth_largest_impostor_score(seed: int, far: float) -> None:
    outcome = open_set(seed)
    threshold = sorted(outcome.impostor_scores.tolist(), reverse=True)[int(far * 150 + 0.5) - 1]
    found = [
        rank <= 1 and score >= threshold
        for rank, score in zip(outcome.ranks.tolist(), outcome.own_scores.tolist(), strict=True)
    ]
    rate = outcome.dir_at_far(far)
    assert rate.value == sum(found) / 80
    assert rate.point.threshold == threshold
    assert rate.point.num_tied == outcome.impostor_scores.tolist().count(threshold)
    assert rate.se == pytest.approx((rate.value * (1 - rate.value) / 80) ** 0.5)


@pytest.mark.parametrize("seed", range(5))
def test_dir_curve_passes_through_every_threshold(seed: int) -> None:
    outcome = open_set(seed)
    points = list(zip(*outcome.dir_curve(rank=2), strict=True))
    thresholds = sorted(set(outcome.impostor_scores.tolist()), reverse=True)
    rates = [outcome.dir_at_threshold(threshold, rank=2) for threshold in thresholds]
    assert points == [(rate.point.far_realised, rate.value) for rate in rates]


def test_a_threshold_above_all_impostors_has_far_zero() -> None:
    outcome = open_set(0)
    rate = outcome.dir_at_threshold(10.5 / 11)
    assert rate.point.far_realised == 0.0
    assert rate.value == np.mean((outcome.ranks == 1) & (outcome.own_scores == 1.0))
    assert outcome.dir_at_threshold(2.0).value == 0.0


def test_one_impostor_resolves_far_one_half_and_no_finer() -> None:
    outcome = open_set(0, num_impostors=1)
    assert outcome.dir_at_far(0.5).point.threshold == outcome.impostor_scores[0]
    with pytest.raises(ValueError, match=r"FAR 0\.01 needs 50 impostor scores or more, got 1"):
        outcome.dir_at_far(0.01)
