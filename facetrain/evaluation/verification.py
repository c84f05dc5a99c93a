"""Verification: are two images of one person? Ten-fold accuracy, VR@FAR, EER and AUC, all exact."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from facetrain.evaluation.threshold import AcceptRate, FloatArray, at_far, thresholds

FARS: Mapping[str, float] = {"1e-2": 1e-2, "1e-3": 1e-3}
"""False accept rates at which VR is reported, by the name they have in metric keys."""


@dataclass(frozen=True, eq=False)
class Roc:
    """VR over FAR at every distinct score, from 'nothing accepted' (0, 0) to 'all accepted' (1, 1)."""

    far: NDArray[np.float64]
    """Share of impostor pairs accepted, ascending."""
    vr: NDArray[np.float64]
    """Share of genuine pairs accepted, ascending."""


@dataclass(frozen=True, eq=False)
class Verification:
    """The outcome of a verification protocol. Rates are fractions in [0, 1]."""

    accuracy: float
    """Mean over the folds."""
    se: float
    """Standard error of that mean: sample standard deviation of the folds / sqrt(number of folds)."""
    std: float
    """Population standard deviation of the folds, which other code prints."""
    fold_accuracies: NDArray[np.float64]
    """By fold."""
    fold_thresholds: NDArray[np.float64]
    """By fold, chosen on the other folds."""
    vr_at_far: Mapping[str, AcceptRate]
    """By a name of FARS; without those that the impostor pairs are too few for."""
    eer: float
    """The rate at which false accepts and false rejects are equal."""
    auc: float
    """The area under the ROC."""
    roc: Roc
    scores: NDArray[np.float64]
    """[n], the score of each pair, in the order in which the pairs were given."""
    is_genuine: NDArray[np.bool_]
    """[n], whether a pair shows one person."""

    def right(self, fold: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which pairs are judged rightly at the threshold of their fold, given the fold of each, from 0."""
        right: NDArray[np.bool_] = (self.scores >= self.fold_thresholds[fold]) == self.is_genuine
        return right

    def figures(self) -> dict[str, float]:
        """Return the figures by their metric keys; a VR whose FAR can't be resolved has no key."""
        rates = {f"vr_at_far_{name}": rate.value for name, rate in self.vr_at_far.items()}
        return {"accuracy": self.accuracy, "se": self.se, "std": self.std, **rates, "eer": self.eer, "auc": self.auc}

    def thresholds(self) -> dict[str, float]:
        """Return the threshold of each FAR of THRESHOLD_FARS that the impostor pairs resolve."""
        return thresholds(self.scores[~self.is_genuine])


@dataclass(frozen=True)
class View1:
    """The outcome of LFW's View 1, which is there to choose models by. Rates are fractions in [0, 1]."""

    accuracy: float
    """On the test list."""
    threshold: float
    """Of highest accuracy on the training list."""
    num_pairs: int
    """Of the test list."""

    def figures(self) -> dict[str, float]:
        """Return the figures by their metric keys; the standard error is binomial."""
        se = math.sqrt(self.accuracy * (1.0 - self.accuracy) / self.num_pairs)
        return {"accuracy": self.accuracy, "se": se, "threshold": self.threshold, "pairs": self.num_pairs}


def verify_view1(
    train_scores: FloatArray, train_genuine: NDArray[np.bool_], test_scores: FloatArray, test_genuine: NDArray[np.bool_]
) -> View1:
    """Choose the threshold on one list of pairs and measure the accuracy on another."""
    threshold = best_threshold(train_scores, train_genuine)
    right = (np.asarray(test_scores, dtype=np.float64) >= threshold) == test_genuine
    return View1(accuracy=float(right.mean()), threshold=threshold, num_pairs=len(right))


def verify(scores: FloatArray, is_genuine: ArrayLike, fold: ArrayLike) -> Verification:
    """Judge pairs of images by their scores.

    Args:
        scores: [n], cosine similarities.
        is_genuine: bool [n], whether a pair shows one person.
        fold: int [n], the fold of each pair; the threshold of a fold is chosen on the others.

    Raises:
        ValueError: lengths differ, a score isn't finite, fewer than two folds, no genuine or no impostor pair.
    """
    scores = np.asarray(scores, dtype=np.float64)
    genuine_n, fold_n = np.asarray(is_genuine, dtype=bool), np.asarray(fold)
    folds = np.unique(fold_n)
    _check(scores, genuine_n, fold_n, len(folds))
    thresholds = np.array([best_threshold(scores[fold_n != f], genuine_n[fold_n != f]) for f in folds])
    accuracies = np.array(
        [
            np.mean((scores[fold_n == f] >= threshold) == genuine_n[fold_n == f])
            for f, threshold in zip(folds, thresholds, strict=True)
        ]
    )
    genuine, impostor = scores[genuine_n], scores[~genuine_n]
    roc = roc_curve(genuine, impostor)
    return Verification(
        accuracy=float(accuracies.mean()),
        se=float(accuracies.std(ddof=1)) / math.sqrt(len(folds)),
        std=float(accuracies.std()),
        fold_accuracies=accuracies,
        fold_thresholds=thresholds,
        # n impostors resolve nothing finer than 1 / n; at_far alone would round 0.5 / n up to it.
        vr_at_far={
            name: verification_rate(genuine, impostor, far) for name, far in FARS.items() if far >= 1 / len(impostor)
        },
        eer=equal_error_rate(roc),
        auc=area_under_curve(genuine, impostor),
        roc=roc,
        scores=scores,
        is_genuine=genuine_n,
    )


def best_threshold(scores: FloatArray, is_genuine: NDArray[np.bool_]) -> float:
    """Return the threshold of highest accuracy, found exactly by sorting.

    Every cut between neighbouring distinct scores, below the lowest and above the highest is tried; among the best
    ones the widest interval wins, the lower one if equal, and gives its midpoint. The two outer intervals are
    unbounded, hence the widest; they give the lowest score - 1e-6 and the highest score + 1e-6.

    Args:
        scores: [n], n >= 1.
        is_genuine: bool [n].
    """
    distinct, place = np.unique(np.asarray(scores, dtype=np.float64), return_inverse=True)
    num_genuine = np.bincount(place, weights=is_genuine)
    num_impostors = np.bincount(place, weights=~is_genuine)
    # Cut c accepts distinct[c:], so what is right is the genuine from c on and the impostors before c.
    right = np.append(num_genuine[::-1].cumsum()[::-1], 0.0) + np.append(0.0, num_impostors.cumsum())
    width = np.diff(distinct, prepend=-np.inf, append=np.inf)
    cut = int(np.argmax(np.where(right == right.max(), width, -1.0)))
    if cut == 0:
        return float(distinct[0] - 1e-6)
    if cut == len(distinct):
        return float(distinct[-1] + 1e-6)
    return float((distinct[cut - 1] + distinct[cut]) / 2.0)


def verification_rate(genuine: FloatArray, impostor: FloatArray, far: float) -> AcceptRate:
    """Return VR@FAR: the share of genuine scores that are accepted where impostors are accepted at the rate `far`.

    Raises:
        ValueError: the FAR is finer than 1 / number of impostor scores.
    """
    if far < 1 / len(impostor):
        raise ValueError(f"VR@FAR={far:g} needs {math.ceil(1 / far):,} impostor pairs or more, got {len(impostor):,}")
    point = at_far(impostor, far)
    return AcceptRate(float(np.mean(genuine >= point.threshold)), len(genuine), point)


def roc_curve(genuine: FloatArray, impostor: FloatArray) -> Roc:
    """Return VR over FAR with the threshold at each distinct score, and one point where nothing is accepted."""
    thresholds = np.unique(np.concatenate([genuine, impostor]))[::-1]
    return Roc(
        far=np.append(0.0, _share_accepted(impostor, thresholds)),
        vr=np.append(0.0, _share_accepted(genuine, thresholds)),
    )


def equal_error_rate(roc: Roc) -> float:
    """Return the rate at which the ROC, joined by straight lines, has FAR = 1 - VR."""
    excess = roc.far + roc.vr - 1.0  # from -1 to 1, never falling
    after = int(np.argmax(excess >= 0.0))
    step = excess[after - 1] / (excess[after - 1] - excess[after])
    return float(roc.far[after - 1] + step * (roc.far[after] - roc.far[after - 1]))


def area_under_curve(genuine: FloatArray, impostor: FloatArray) -> float:
    """Return the chance that a genuine score is above an impostor score; a tie counts one half.

    Source: the Mann-Whitney statistic, which is the area under the ROC joined by straight lines.
    """
    ascending = np.sort(impostor)
    below = np.searchsorted(ascending, genuine, side="left")
    not_above = np.searchsorted(ascending, genuine, side="right")
    return float((below + not_above).mean() / (2.0 * len(impostor)))


def _share_accepted(scores: FloatArray, thresholds: FloatArray) -> NDArray[np.float64]:
    return 1.0 - np.searchsorted(np.sort(scores), thresholds, side="left") / len(scores)


def _check(scores: FloatArray, genuine_n: NDArray[np.bool_], fold_n: NDArray[np.int64], num_folds: int) -> None:
    if not len(scores) == len(genuine_n) == len(fold_n):
        raise ValueError(f"pairs: {len(scores)} scores, {len(genuine_n)} genuine flags and {len(fold_n)} folds")
    if not np.isfinite(scores).all():
        raise ValueError(f"pairs: the score of pair {int(np.argmin(np.isfinite(scores)))} is not finite")
    if num_folds < 2:
        raise ValueError(f"pairs: expected two folds or more, got {num_folds}")
    if genuine_n.all() or not genuine_n.any():
        raise ValueError(
            f"pairs: expected genuine and impostor pairs, got {int(genuine_n.sum())} genuine of {len(scores)}"
        )
