"""Resampled figures against the same figures of people who really stand there several times."""

from pathlib import Path

import numpy as np
import pytest
from face_lists import tied_set, write_pairs
from numpy.typing import NDArray

from facetrain.evaluation.bootstrap import interval, people_figures, resample
from facetrain.evaluation.identification import OpenSet
from facetrain.evaluation.inputs import face_set
from facetrain.evaluation.lfw import Evaluation, evaluate
from facetrain.evaluation.lists import Request
from facetrain.evaluation.report import format_table
from facetrain.evaluation.verification import verification_rate


def drawn(folder: Path, **request: int) -> tuple[Evaluation, NDArray[np.int64]]:
    names, embeddings = tied_set(0, num_people=120)
    people = folder / "people.txt"
    people.write_text("\n".join(f"Person_{person}" for person in range(40) if person % 6))
    pairs = write_pairs(folder / "pairs.txt", names, per_fold=40)
    evaluation = evaluate(names, embeddings, Request(pairs=pairs, open_set_people=people, dataset="drawn", **request))
    faces = face_set(names)
    assert evaluation.pairs is not None
    return evaluation, faces.person[evaluation.pairs.rows(faces)]


def test_a_figure_of_everybody_once_is_the_figure_itself(tmp_path: Path) -> None:
    evaluation, pair_people = drawn(tmp_path, draws=3)
    figures = people_figures(
        evaluation.verification, evaluation.pairs, pair_people, evaluation.closed, evaluation.open, 1e-2
    )
    assert set(figures) == {
        *(f"verification/{key}" for key in ("accuracy", "vr_at_far_1e-2")),
        *(f"{name}/rank1" for name in ("closed-full", "open-best-rowden", "open-best-rowden-single", "open-counts")),
        *(f"{name}/dir_rank1_at_far_1e-2" for name in evaluation.open),
    }
    for key, figure in figures.items():
        *path, name = key.split("/")
        value = evaluation.results
        for part in path:
            value = value[part]
        assert figure(np.ones(120, dtype=np.int64)) == pytest.approx(value[name]), key


@pytest.mark.parametrize("seed", range(5))
def test_people_drawn_several_times_count_several_times(tmp_path: Path, seed: int) -> None:
    evaluation, pair_people = drawn(tmp_path)
    figures = people_figures(
        evaluation.verification, evaluation.pairs, pair_people, evaluation.closed, evaluation.open, 1e-2
    )
    times = np.bincount(np.random.default_rng(seed).integers(120, size=120), minlength=120)
    (closed,) = evaluation.closed["closed-full"]
    assert figures["closed-full/rank1"](times) == np.mean(np.repeat(closed.ranks, times[closed.people]) <= 1)

    (opened,) = evaluation.open["open-best-rowden"]
    genuine, impostor = times[opened.people], times[opened.impostor_people]
    repeated = OpenSet(
        np.repeat(opened.ranks, genuine),
        np.repeat(opened.own_scores, genuine),
        np.repeat(opened.impostor_scores, impostor),
        opened.gallery,
        np.repeat(opened.people, genuine),
        np.repeat(opened.impostor_people, impostor),
        np.repeat(opened.probe_rows, genuine),
        np.repeat(opened.impostor_rows, impostor),
    )
    assert figures["open-best-rowden/dir_rank1_at_far_1e-2"](times) == pytest.approx(repeated.dir_at_far(1e-2).value)

    verification = evaluation.verification
    assert verification is not None
    a, b = times[pair_people].T
    scores = np.repeat(verification.scores, np.where(verification.is_genuine, a, a * b))
    is_genuine = np.repeat(verification.is_genuine, np.where(verification.is_genuine, a, a * b))
    rate = verification_rate(scores[is_genuine], scores[~is_genuine], 1e-2)
    assert figures["verification/vr_at_far_1e-2"](times) == pytest.approx(rate.value)


def test_the_interval_of_a_share_is_that_of_its_people() -> None:
    # 400 people with one probe each, half of them right: the binomial standard error is 2.5 points.
    hits = np.arange(400) % 2
    values = resample({"share": lambda times: float(times @ hits / times.sum())}, 400, 2000, seed=0)["share"]
    low, high = interval(values)
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025), abs=0.006)


def test_probes_of_one_person_go_together() -> None:
    # The same 400 probes, but of 40 people who are right on all or none: the interval is about sqrt(10) times as wide.
    hits = np.arange(40) % 2 * 10
    values = resample({"share": lambda times: float(times @ hits / (10 * times.sum()))}, 40, 2000, seed=0)["share"]
    low, high = interval(values)
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.079, 0.5 + 1.96 * 0.079), abs=0.02)


def test_intervals_stand_beside_their_figures_and_depend_on_the_seed_alone(tmp_path: Path) -> None:
    evaluation, _ = drawn(tmp_path, bootstrap=200, seed=1)
    results = evaluation.results
    for protocol, key in [
        ("verification", "vr_at_far_1e-2"),
        ("verification", "accuracy"),
        ("closed-full", "rank1"),
        ("open-best-rowden", "rank1"),
        ("open-best-rowden", "dir_rank1_at_far_1e-2"),
    ]:
        low, high = results[protocol][f"{key}_ci95"]
        assert low <= results[protocol][key] <= high
    assert len(results["open-counts"]["all"]["dir_rank1_at_far_1e-2_ci95"]) == 2
    assert len(results["open-counts"]["rank1_ci95"]) == 2
    assert "95% intervals over people" in format_table(evaluation)
    assert drawn(tmp_path, bootstrap=200, seed=1)[0].results == results
    assert drawn(tmp_path, bootstrap=200, seed=2)[0].results != results


def test_too_few_resamples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"bootstrap: expected 0 \(off\) or 100 resamples or more, got 99"):
        Request(bootstrap=99)
