"""How far a figure would move with other people: bootstrap over people, not over pairs or images.

A resample draws as many people as there are, with replacement. A probe counts as often as its person was drawn, an
impostor pair as often as both of its people were, taken together; thresholds are set anew by the rule of `at_far`.
Galleries stay as they are. Dims: K people of the set, R resamples.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from facetrain.evaluation.identification import ClosedSet, OpenSet
from facetrain.evaluation.inputs import PairList
from facetrain.evaluation.threshold import FloatArray, num_allowed
from facetrain.evaluation.verification import FARS, Verification

Counts = NDArray[np.int64]
Figure = Callable[[Counts], float]
"""The value of a figure in a resample, given how often each of the K people was drawn; NaN where nothing is left."""

LEVEL = 0.95
"""Coverage of the intervals."""


def resample(figures: Mapping[str, Figure], num_people: int, num_resamples: int, seed: int) -> dict[str, FloatArray]:
    """Return each figure's values in R resamples, float64 [R]; equal seeds draw equal people."""
    rng = np.random.default_rng(seed)
    values = {key: np.empty(num_resamples) for key in figures}
    for number in range(num_resamples):
        drawn_K = np.bincount(rng.integers(num_people, size=num_people), minlength=num_people)
        for key, figure in figures.items():
            values[key][number] = figure(drawn_K)
    return dict(values)


def interval(values: FloatArray) -> tuple[float, float]:
    """Return the percentile interval of resampled values; resamples that left nothing to count are left out."""
    low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def people_figures(
    verification: Verification | None,
    pairs: PairList | None,
    pair_people: Counts | None,
    closed: Mapping[str, Sequence[ClosedSet]],
    opened: Mapping[str, Sequence[OpenSet]],
    open_set_far: float,
) -> dict[str, Figure]:
    """Return the figures of an evaluation that have an interval, by `protocol/figure`.

    Args:
        verification: and its list, or None where it wasn't run.
        pairs: the pairs of it.
        pair_people: int64 [n, 2], the people of each pair.
        closed: the draws of each closed-set protocol; of several draws the figure is the mean.
        opened: the same of each open-set protocol.
        open_set_far: the FAR of DIR.
    """
    figures: dict[str, Figure] = {}
    if verification is not None and pairs is not None and pair_people is not None:
        figures["verification/accuracy"] = _accuracy(verification, pairs.fold, pair_people)
        for name in verification.vr_at_far:
            figures[f"verification/vr_at_far_{name}"] = _verification_rate(verification, pair_people, FARS[name])
    for protocol, closed_draws in closed.items():
        figures[f"{protocol}/rank1"] = _mean([_rank1(draw.ranks, draw.people) for draw in closed_draws])
    for protocol, draws in opened.items():
        # The groups of open-counts share their genuine probes and one rank-1.
        shared = protocol.partition("/")[0]
        figures[f"{shared}/rank1"] = _mean([_rank1(draw.ranks, draw.people) for draw in draws])
        figures[f"{protocol}/dir_rank1_at_far_1e-2"] = _mean([_dir(draw, open_set_far) for draw in draws])
    return figures


def pair_weights(drawn_K: Counts, pair_people: Counts, is_genuine: NDArray[np.bool_]) -> Counts:
    """Return how often each pair is in a resample: a genuine pair as its person, an impostor pair as both together."""
    first, second = drawn_K[pair_people[:, 0]], drawn_K[pair_people[:, 1]]
    return np.where(is_genuine, first, first * second)


def _accept_rate(
    genuine: FloatArray, genuine_weights: Counts, impostor: FloatArray, impostor_weights: Counts, far: float
) -> float:
    """Return the share of genuine scores accepted at a FAR where each score stands as often as its weight says.

    The threshold is that of `at_far`, but k is at least 1. Impostor scores come in descending order.
    """
    accepted = impostor_weights.cumsum()
    if accepted[-1] == 0:
        return float("nan")
    k = max(num_allowed(int(accepted[-1]), far), 1)
    return _share(genuine >= impostor[np.searchsorted(accepted, k)], genuine_weights)


def _accuracy(verification: Verification, fold: Counts, pair_people: Counts) -> Figure:
    right = verification.right(fold)
    genuine = verification.is_genuine

    def figure(drawn_K: Counts) -> float:
        # The two halves apart, since a resample needn't hold as many impostor as genuine pairs.
        weights = pair_weights(drawn_K, pair_people, genuine)
        return (_share(right[genuine], weights[genuine]) + _share(right[~genuine], weights[~genuine])) / 2

    return figure


def _verification_rate(verification: Verification, pair_people: Counts, far: float) -> Figure:
    scores, is_genuine = verification.scores, verification.is_genuine
    impostors = np.flatnonzero(~is_genuine)
    impostors = impostors[np.argsort(-scores[impostors], kind="stable")]

    def figure(drawn_K: Counts) -> float:
        weights = pair_weights(drawn_K, pair_people, is_genuine)
        return _accept_rate(scores[is_genuine], weights[is_genuine], scores[impostors], weights[impostors], far)

    return figure


def _rank1(ranks: Counts, people: Counts) -> Figure:
    return lambda drawn_K: _share(ranks <= 1, drawn_K[people])


def _dir(outcome: OpenSet, far: float) -> Figure:
    found = np.where(outcome.ranks <= 1, outcome.own_scores, -np.inf)
    descending = np.argsort(-outcome.impostor_scores, kind="stable")
    impostor, people = outcome.impostor_scores[descending], outcome.impostor_people[descending]
    return lambda drawn_K: _accept_rate(found, drawn_K[outcome.people], impostor, drawn_K[people], far)


def _mean(figures: Sequence[Figure]) -> Figure:
    return lambda drawn_K: float(np.mean([figure(drawn_K) for figure in figures]))


def _share(hits: NDArray[np.bool_], weights: Counts) -> float:
    total = int(weights.sum())
    return int(weights[hits].sum()) / total if total else float("nan")
