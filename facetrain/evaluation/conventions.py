"""What other code prints where it differs from the exact figures, so that published numbers compare like with like."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

VR_FAR = 1e-3


@dataclass(frozen=True)
class InsightFaceFigures:
    """Verification as InsightFace's `verification.py` counts it. Rates are fractions in [0, 1]."""

    accuracy: float
    """`Accuracy-Flip`: mean over the folds, the threshold chosen on a grid."""
    std: float
    """Population standard deviation of the folds; no standard error."""
    vr: float
    """`VAL`: mean over the folds of VR at thresholds that were chosen for FAR=0.1% on the other folds."""
    vr_std: float
    """Population standard deviation of the folds."""
    far: float
    """The mean FAR that these thresholds realise."""

    def figures(self) -> dict[str, float]:
        """Return the figures by their metric keys."""
        return {
            "accuracy": self.accuracy,
            "std": self.std,
            "vr_at_far_1e-3": self.vr,
            "vr_at_far_1e-3_std": self.vr_std,
            "far_realised": self.far,
        }


def insightface_figures(
    a_nD: NDArray[np.float32], b_nD: NDArray[np.float32], is_genuine: NDArray[np.bool_], fold: NDArray[np.int64]
) -> InsightFaceFigures:
    """Judge pairs by squared distances on a grid: 0 to 4 in steps of 0.01 for accuracy and 0.001 for VR.

    A pair is accepted where its distance is below the threshold; of several best thresholds the smallest is taken.
    The threshold of a FAR is interpolated in the FARs of the grid; where these stand still (the original's
    interpolation raises an error there in today's scipy) the last threshold of the plateau counts. A FAR that the
    grid doesn't reach gives the threshold 0.

    Args:
        a_nD: unit vectors of each pair's first image.
        b_nD: of its second image.
        is_genuine: whether a pair shows one person.
        fold: the fold of each pair.

    Source: insightface, recognition/_evaluation_/verification.py, calculate_roc and calculate_val.
    """
    distances = np.square(a_nD - b_nD).sum(axis=1)
    accuracies, rates, fars = [], [], []
    grid, fine_grid = np.arange(0, 4, 0.01), np.arange(0, 4, 0.001)
    for f in np.unique(fold):
        here = fold == f
        genuine, impostor = distances[~here & is_genuine], distances[~here & ~is_genuine]
        right = _num_below(genuine, grid) + len(impostor) - _num_below(impostor, grid)
        threshold = grid[int(np.argmax(right))]
        accuracies.append(np.mean((distances[here] < threshold) == is_genuine[here]))
        far_train = _num_below(impostor, fine_grid) / max(len(impostor), 1)
        threshold = np.interp(VR_FAR, far_train, fine_grid) if far_train.max() >= VR_FAR else 0.0
        rates.append(_share_below(distances[here & is_genuine], threshold))
        fars.append(_share_below(distances[here & ~is_genuine], threshold))
    return InsightFaceFigures(
        accuracy=float(np.mean(accuracies)),
        std=float(np.std(accuracies)),
        vr=float(np.mean(rates)),
        vr_std=float(np.std(rates)),
        far=float(np.mean(fars)),
    )


def _num_below(distances: NDArray[np.float32], grid: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return how many distances are below each threshold; those are compared as float64, as numpy's `less` does."""
    return np.searchsorted(np.sort(distances.astype(np.float64)), grid, side="left")


def _share_below(distances: NDArray[np.float32], threshold: float) -> float:
    return float(np.mean(distances.astype(np.float64) < threshold)) if len(distances) else 0.0
