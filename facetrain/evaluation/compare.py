"""Is one of two embeddings better? Differences with their intervals, paired tests, and the people behind them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from facetrain.evaluation.bootstrap import interval, people_figures, resample
from facetrain.evaluation.inputs import FaceSet
from facetrain.evaluation.lfw import OPEN_SET_FAR, Evaluation, evaluate, metrics
from facetrain.evaluation.lists import Request, read_lists
from facetrain.evaluation.report import aligned, write_results
from facetrain.evaluation.threshold import FloatArray

NUM_FLIPS = 10_000
"""Random sign flips of a paired test."""
MAX_EXACT_UNITS = 13
"""Up to this many people or folds that differ, all sign flips are tried."""
_NUM_NAMED = 5


@dataclass(frozen=True)
class Difference:
    """How a figure differs between two embeddings. Figures are fractions in [0, 1]."""

    figure: str
    """Such as `closed-full/rank1`."""
    a: float
    b: float
    low: float
    """Lower end of the 95% interval of b - a, by bootstrap over people."""
    high: float
    p_value: float
    """Of the paired test, two-sided: the chance of such a difference if A and B were the same on every unit."""
    unit: str
    """What the test flips: people, or folds, whose people are different."""
    more_in_b: Mapping[str, float]
    """By person or fold: trials that B gets right beyond those of A; a mean over draws."""
    more_in_a: Mapping[str, float]
    """The other way round."""


def compare(
    names: Sequence[str], a: NDArray[np.float32], b: NDArray[np.float32], request: Request
) -> tuple[Difference, ...]:
    """Run the protocols on two embeddings of the same images and compare every figure that has an interval.

    Both are resampled with the same people. The test flips the sign of each person's difference in the number of
    trials that are right (of each fold's for accuracy), each embedding at its own threshold.

    Args:
        names: image names.
        a: float32 [n, D].
        b: float32 [n, D'].
        request: the protocols; `bootstrap` is the number of resamples, at least 100.

    Raises:
        ValueError: as `evaluate`, saying whether A or B has the fault.
    """
    once = replace(request, bootstrap=0)  # both sides are resampled here, with the same people
    faces = read_lists(names, once).faces
    sides = []
    for name, embeddings in (("A", a), ("B", b)):
        try:
            sides.append(_side(evaluate(names, embeddings, once), faces, request))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    rng = np.random.default_rng(request.seed)
    return tuple(_difference(figure, sides[0], sides[1], faces.people, rng) for figure in sides[0].resampled)


def sign_flip_p_value(differences: NDArray[np.float64], rng: np.random.Generator) -> float:
    """Return how often random signs give a sum as far from 0 as the differences' own, two-sided.

    Exact for up to MAX_EXACT_UNITS differences that aren't 0; beyond, of NUM_FLIPS draws, and then never below
    1 / (NUM_FLIPS + 1), since the observed signs count as one draw.
    """
    nonzero = differences[differences != 0]
    observed = abs(nonzero.sum()) - 1e-9  # sums of means over draws round differently
    if len(nonzero) <= MAX_EXACT_UNITS:
        signs = 1 - 2 * (np.arange(2 ** len(nonzero))[:, None] >> np.arange(len(nonzero)) & 1)
        return float(np.mean(np.abs(signs @ nonzero) >= observed))
    extreme = 0
    for _ in range(NUM_FLIPS // 100):
        signs = rng.choice([-1.0, 1.0], (100, len(nonzero)))
        extreme += int(np.count_nonzero(np.abs(signs @ nonzero) >= observed))
    return (extreme + 1) / (NUM_FLIPS + 1)


def format_comparison(differences: Sequence[Difference], name_a: str, name_b: str) -> str:
    """Return the comparison as aligned text."""
    rows = [["figure", "A", "B", "B - A", "95% interval", "p", "differ"]]
    for d in differences:
        rows.append(
            [
                f"  {d.figure}",
                f"{100 * d.a:.2f}%",
                f"{100 * d.b:.2f}%",
                f"{100 * (d.b - d.a):+.2f}",
                f"{100 * d.low:+.2f} to {100 * d.high:+.2f}",
                f"{d.p_value:.4f}",
                f"{len(d.more_in_a) + len(d.more_in_b)} {d.unit}",
            ]
        )
    lines = [f"A: {name_a}", f"B: {name_b}", "", *aligned(rows)]
    lines.append("  intervals: bootstrap over people; p: sign flips of the people's or folds' differences, two-sided")
    people = [d for d in differences if d.unit == "people" and (d.more_in_a or d.more_in_b)]
    for d in people:
        lines += ["", f"{d.figure}: {_sentence('A', d.more_in_a)}; {_sentence('B', d.more_in_b)}"]
    return "\n".join(lines) + "\n"


def write_comparison(differences: Sequence[Difference], out: Path) -> None:
    """Write `compare.json` into the folder, made if missing: every difference, with all people behind it."""
    write_results({d.figure: asdict(d) for d in differences}, out, name="compare.json")


@dataclass(frozen=True)
class _Side:
    """One of the two embeddings, by figure."""

    values: Mapping[str, float]
    resampled: Mapping[str, FloatArray]
    right: Mapping[str, NDArray[np.float64]]
    """Trials that are right, by fold for accuracy, else by person."""


def _side(evaluation: Evaluation, faces: FaceSet, request: Request) -> _Side:
    pair_people = faces.person[evaluation.pairs.rows(faces)] if evaluation.pairs else None
    figures = people_figures(
        evaluation.verification, evaluation.pairs, pair_people, evaluation.closed, evaluation.open, OPEN_SET_FAR
    )
    values = metrics(evaluation)
    return _Side(
        values={figure: values[f"{request.dataset}/{figure}"] for figure in figures},
        resampled=resample(figures, len(faces.people), request.bootstrap, request.seed),
        right=_right_by_unit(evaluation, faces),
    )


def _difference(figure: str, a: _Side, b: _Side, people: Sequence[str], rng: np.random.Generator) -> Difference:
    more = b.right[figure] - a.right[figure]
    by_fold = figure == "verification/accuracy"
    units = [f"fold {fold + 1}" for fold in range(len(more))] if by_fold else people
    low, high = interval(b.resampled[figure] - a.resampled[figure])
    return Difference(
        figure=figure,
        a=a.values[figure],
        b=b.values[figure],
        low=low,
        high=high,
        p_value=sign_flip_p_value(more, rng),
        unit="folds" if by_fold else "people",
        more_in_b=_named(units, more),
        more_in_a=_named(units, -more),
    )


def _right_by_unit(evaluation: Evaluation, faces: FaceSet) -> dict[str, NDArray[np.float64]]:
    """Return for each figure how many trials are right, by fold for accuracy, else by person; means over draws."""
    right: dict[str, NDArray[np.float64]] = {}
    num_people = len(faces.people)

    def by_person(people: NDArray[np.int64], hits: NDArray[np.bool_]) -> NDArray[np.float64]:
        return np.bincount(people[hits], minlength=num_people).astype(np.float64)

    verification, pairs = evaluation.verification, evaluation.pairs
    if verification is not None and pairs is not None:
        is_right = verification.right(pairs.fold)
        right["verification/accuracy"] = np.bincount(pairs.fold[is_right], minlength=pairs.num_folds).astype(np.float64)
        first = faces.person[pairs.rows(faces)[:, 0]]
        for name, rate in verification.vr_at_far.items():
            accepted = verification.is_genuine & (verification.scores >= rate.point.threshold)
            right[f"verification/vr_at_far_{name}"] = by_person(first, accepted)
    for protocol, closed in evaluation.closed.items():
        right[f"{protocol}/rank1"] = np.mean([by_person(draw.people, draw.ranks <= 1) for draw in closed], axis=0)
    for protocol, draws in evaluation.open.items():
        shared = protocol.partition("/")[0]
        right[f"{shared}/rank1"] = np.mean([by_person(draw.people, draw.ranks <= 1) for draw in draws], axis=0)
        found = [draw.found(draw.dir_at_far(OPEN_SET_FAR).point.threshold) for draw in draws]
        counts = [by_person(draw.people, hits) for draw, hits in zip(draws, found, strict=True)]
        right[f"{protocol}/dir_rank1_at_far_1e-2"] = np.mean(counts, axis=0)
    return right


def _named(units: Sequence[str], more: NDArray[np.float64]) -> dict[str, float]:
    """Return the units with more than 0, most first."""
    order = np.argsort(-more, kind="stable")
    return {units[unit]: float(more[unit]) for unit in order if more[unit] > 0}


def _sentence(side: str, more: Mapping[str, float]) -> str:
    if not more:
        return f"{side} is right on nobody more often"
    named = ", ".join(f"{person} {count:+g}" for person, count in list(more.items())[:_NUM_NAMED])
    return f"{side} is right more often on {len(more)}: {named}{', ...' if len(more) > _NUM_NAMED else ''}"
