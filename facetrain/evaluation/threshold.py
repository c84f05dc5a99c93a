"""The one rule that turns a false accept rate into a threshold, for verification and identification alike."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32] | NDArray[np.float64]

THRESHOLD_FARS: Mapping[str, float] = {"1e-1": 1e-1, "1e-2": 1e-2, "1e-3": 1e-3}
"""False accept rates whose thresholds stand in results, by the name they have in metric keys."""
NETWORK_KEY = "network_sha256"
"""Where results of one network hold the checksum of its weights."""
OPEN_SET_PROTOCOLS = ("open-best-rowden", "open-counts/all")
"""Those whose false accepts are strangers who are taken for anybody of a gallery, as a search would; not pairs."""


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold, and what the impostor scores do at it. A score is accepted when it is >= the threshold."""

    threshold: float
    """Cosine similarity."""
    num_accepted: int
    """Impostor scores >= threshold."""
    num_tied: int
    """Impostor scores equal to the threshold; above 1, ties may have raised the realised FAR."""
    num_impostors: int
    """Impostor scores in all."""

    @property
    def far_realised(self) -> float:
        """The share of impostor scores that are accepted, in [0, 1]."""
        return self.num_accepted / self.num_impostors


@dataclass(frozen=True)
class AcceptRate:
    """The share of genuine trials that are accepted at an operating point."""

    value: float
    """In [0, 1]."""
    num_genuine: int
    """Genuine trials in all."""
    point: OperatingPoint

    @property
    def se(self) -> float:
        """The binomial standard error, sqrt(p (1 - p) / n), a fraction."""
        return math.sqrt(self.value * (1.0 - self.value) / self.num_genuine)


def num_allowed(num_impostors: int, far: float) -> int:
    """Return k: the threshold of a FAR is the k-th largest of the impostor scores.

    Source: k = floor(FAR * n + 0.5), so that k / n is the nearest to the FAR that n scores can show.
    """
    return math.floor(far * num_impostors + 0.5)


def at_far(impostor_scores: FloatArray, far: float) -> OperatingPoint:
    """Return the operating point of a false accept rate.

    Args:
        impostor_scores: [n], any order.
        far: wanted false accept rate, in (0, 1].

    Raises:
        ValueError: fewer impostor scores than the FAR needs, or a FAR outside (0, 1].
    """
    if not 0.0 < far <= 1.0:
        raise ValueError(f"FAR: expected a fraction above 0 and up to 1, got {far:g}")
    k = num_allowed(len(impostor_scores), far)
    if k < 1:
        raise ValueError(
            f"FAR {far:g} needs {math.ceil(0.5 / far):,} impostor scores or more, got {len(impostor_scores):,}"
        )
    return at_threshold(impostor_scores, float(np.partition(impostor_scores, -k)[-k]))


def at_threshold(impostor_scores: FloatArray, threshold: float) -> OperatingPoint:
    """Return the operating point of a given threshold; above all scores, its realised FAR is 0."""
    exact = np.float64(threshold)  # a Python float would be rounded to the scores' float32 before it is compared
    return OperatingPoint(
        threshold=threshold,
        num_accepted=int(np.count_nonzero(impostor_scores >= exact)),
        num_tied=int(np.count_nonzero(impostor_scores == exact)),
        num_impostors=len(impostor_scores),
    )


def thresholds(impostor_scores: FloatArray) -> dict[str, float]:
    """Return the threshold of each of THRESHOLD_FARS that the impostor scores resolve, by the FAR's name."""
    return {
        name: at_far(impostor_scores, far).threshold
        for name, far in THRESHOLD_FARS.items()
        if far >= 1 / max(len(impostor_scores), 1)
    }


def weights_of_results(file: Path) -> str:
    """Return the checksum of the weights that a results.json is of; empty where it doesn't say."""
    return str(json.loads(file.read_text(encoding="utf-8")).get(NETWORK_KEY, ""))


def threshold_from_results(file: Path, far: float, protocol: str | None = None) -> tuple[float, str]:
    """Read the threshold of a false accept rate from a results.json.

    Args:
        file: Written by an evaluation.
        far: One of THRESHOLD_FARS.
        protocol: A key of the file; null takes the first of OPEN_SET_PROTOCOLS that has one.

    Returns:
        The threshold, a cosine, and its protocol.

    Raises:
        ValueError: There is no such threshold; the message says which there are.
    """
    try:
        found: dict[str, dict[str, float]] = json.loads(file.read_text(encoding="utf-8"))["thresholds"]
        there = ", ".join(f"{name} at FAR {', '.join(rates)}" for name, rates in found.items()) or "none"
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{file}: expected the results.json of an evaluation, with thresholds: {error}") from None
    wanted = next((name for name, rate in THRESHOLD_FARS.items() if math.isclose(rate, far)), "")
    for name in [protocol] if protocol else OPEN_SET_PROTOCOLS:
        if wanted in found.get(name, {}):
            return float(found[name][wanted]), name
    raise ValueError(f"{file}: no threshold for FAR {far:g}{f' of {protocol}' if protocol else ''}; there is: {there}")
