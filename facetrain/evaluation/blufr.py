"""BLUFR, the benchmark of large-scale unconstrained face recognition: ten trials over most of LFW's images.

Sole importer of scipy, which reads the benchmark's .mat file. Dims: T test images of a trial, D width.

Source: Liao, Lei, Yi, Li: A benchmark study of large-scale unconstrained face recognition, IJCB 2014.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from facetrain.evaluation.identification import Embeddings, OpenSet
from facetrain.evaluation.inputs import FaceSet, image_key, image_name
from facetrain.evaluation.protocols import open_set
from facetrain.evaluation.threshold import AcceptRate, OperatingPoint, num_allowed
from facetrain.search import similarity_blocks

VR_FAR = 1e-3
DIR_FAR = 1e-2

_ROWS = 512
"""Test images whose scores with all later ones are held at a time."""
_KEYS = ("imageList", "labels", "testIndex", "galIndex", "probIndex")


@dataclass(frozen=True, eq=False)
class BlufrTrial:
    """Which images a trial takes, as rows of the set."""

    test: NDArray[np.int64]
    """Each unordered pair of these is scored once."""
    gallery: NDArray[np.int64]
    """One image a person."""
    probes: NDArray[np.int64]
    """Genuine where the person is in the gallery, impostors otherwise."""


@dataclass(frozen=True, eq=False)
class BlufrOutcome:
    """What a trial found."""

    verification: AcceptRate
    """VR@FAR=0.1% over all pairs of test images."""
    identification: OpenSet

    def figures(self) -> dict[str, float]:
        """Return the figures by their metric keys."""
        return {
            "vr_at_far_1e-3": self.verification.value,
            "dir_rank1_at_far_1e-2": self.identification.dir_at_far(DIR_FAR).value,
            "rank1": self.identification.rank1,
        }


def blufr_figures(outcomes: Sequence[BlufrOutcome]) -> dict[str, dict[str, Any]]:
    """Return each figure's mean over the trials, sample standard deviation, the benchmark's mean - std, and trials."""
    trials = [outcome.figures() for outcome in outcomes]
    summary = {}
    for key in trials[0]:
        values = [trial[key] for trial in trials]
        mean, std = float(np.mean(values)), float(np.std(values, ddof=1))
        summary[key] = {"mean": mean, "std": std, "mean_minus_std": mean - std, "trials": values}
    return summary


def read_blufr(path: Path, faces: FaceSet) -> tuple[BlufrTrial, ...]:
    """Read the trials from blufr_lfw_config.mat, whose indices count from 1 and follow its `imageList`.

    Raises:
        ValueError: not such a file, an image that isn't in the set, labels or indices that don't fit the images.
    """
    arrays = _load(path)
    row_of_index = _image_rows(path, arrays, faces)
    lists = {key: _trial_indices(path, key, arrays[key], len(row_of_index)) for key in _KEYS[2:]}
    counts = {key: len(trials) for key, trials in lists.items()}
    if len(set(counts.values())) != 1 or counts["testIndex"] < 2:
        raise ValueError(f"{path}: expected as many trials in each list, two or more, got {counts}")
    trials = []
    for number, indices in enumerate(zip(*lists.values(), strict=True), start=1):
        trial = BlufrTrial(*(row_of_index[index] for index in indices))
        if len(np.unique(faces.person[trial.gallery])) != len(trial.gallery):
            raise ValueError(f"{path}: galIndex of trial {number}: expected one image a person")
        if np.isin(trial.probes, trial.gallery).any():
            raise ValueError(f"{path}: probIndex of trial {number}: expected no image of the gallery")
        if not np.isin(faces.person[trial.probes], faces.person[trial.gallery]).any():
            raise ValueError(f"{path}: probIndex of trial {number}: expected a person of the gallery, got none")
        trials.append(trial)
    return tuple(trials)


def run_blufr(faces: FaceSet, embeddings: Embeddings, trials: Sequence[BlufrTrial]) -> tuple[BlufrOutcome, ...]:
    """Run the trials.

    Args:
        faces: all images.
        embeddings: of all images.
        trials: as `read_blufr` gives them.

    Raises:
        ValueError: a trial has too few impostor pairs or impostor probes for its FAR.
    """
    return tuple(
        BlufrOutcome(
            verification=verification_of_all_pairs(embeddings[trial.test], faces.person[trial.test], VR_FAR),
            identification=_identification(faces, embeddings, trial),
        )
        for trial in trials
    )


def verification_of_all_pairs(embeddings_TD: Embeddings, person_T: NDArray[np.int64], far: float) -> AcceptRate:
    """Return VR@FAR over every unordered pair of images, in bounded memory, exactly.

    Args:
        embeddings_TD: unit vectors.
        person_T: the person of each.
        far: false accept rate, a fraction.

    Raises:
        ValueError: no genuine pair, or the FAR is finer than 1 / number of impostor pairs.
    """
    num_genuine = sum(int(count) * (int(count) - 1) // 2 for count in np.unique_counts(person_T).counts)
    num_impostors = len(person_T) * (len(person_T) - 1) // 2 - num_genuine
    if num_genuine == 0 or far * num_impostors < 1:
        raise ValueError(
            f"VR@FAR={far:g} needs genuine pairs and {1 / far:,.0f} impostor pairs, got {num_genuine:,} and"
            f" {num_impostors:,}"
        )
    all_TD, all_T = torch.from_numpy(embeddings_TD), torch.from_numpy(person_T.astype(np.int32))
    impostors = _Highest(num_allowed(num_impostors, far))
    genuine = []
    for start in range(0, len(person_T), _ROWS):
        # Row r of a block is image start + r, column c is image start + c: pairs stand above the diagonal.
        later_TD, later_T = all_TD[start:], all_T[start:]
        for rows, scores_qT in similarity_blocks(later_TD[:_ROWS], later_TD):
            is_pair = torch.ones(scores_qT.shape, dtype=torch.bool).triu_(1 + rows.start)
            is_genuine = (later_T[:_ROWS][rows, None] == later_T) & is_pair
            genuine.append(scores_qT[is_genuine].numpy())
            impostors.add(scores_qT.masked_fill(is_genuine | ~is_pair, -torch.inf).numpy())
    point = impostors.point(num_impostors)
    return AcceptRate(float(np.mean(np.concatenate(genuine) >= point.threshold)), num_genuine, point)


class _Highest:
    """The k highest of a stream of scores and how many tie with the k-th, in memory for about 4 k scores.

    Scores above `_bound` are kept; `_bound` is the k-th highest of those seen when it was last moved, and the scores
    that equal it are only counted, so that a stream of ties takes no memory.
    """

    def __init__(self, k: int) -> None:
        self._k = k
        self._bound, self._num_at_bound = np.float32(-np.inf), 0
        self._above = np.empty(0, dtype=np.float32)

    def add(self, scores: NDArray[np.float32]) -> None:
        self._num_at_bound += int(np.count_nonzero(scores == self._bound))
        self._above = np.concatenate([self._above, scores[scores > self._bound]])
        if len(self._above) > 4 * self._k:
            self._raise_bound()

    def point(self, num_impostors: int) -> OperatingPoint:
        """Return where the k-th highest is the threshold, of as many scores as were added."""
        if len(self._above) >= self._k:
            self._raise_bound()
        return OperatingPoint(
            threshold=float(self._bound),
            num_accepted=len(self._above) + self._num_at_bound,
            num_tied=self._num_at_bound,
            num_impostors=num_impostors,
        )

    def _raise_bound(self) -> None:
        self._bound = np.partition(self._above, -self._k)[-self._k]
        self._num_at_bound = int(np.count_nonzero(self._above == self._bound))
        self._above = self._above[self._above > self._bound]


def _identification(faces: FaceSet, embeddings: Embeddings, trial: BlufrTrial) -> OpenSet:
    gallery, probes = np.zeros((2, len(faces.person)), dtype=bool)
    gallery[trial.gallery], probes[trial.probes] = True, True
    enrolled = np.isin(faces.person, faces.person[trial.gallery])
    return open_set(faces, embeddings, gallery, probes & enrolled, [probes & ~enrolled])[0]


def _load(path: Path) -> dict[str, Any]:
    from scipy.io import loadmat

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such .mat file")
    try:
        arrays: dict[str, Any] = loadmat(path)
    except NotImplementedError:
        raise ValueError(f"{path}: expected a .mat file up to version 7, got version 7.3 (HDF5)") from None
    except Exception as error:  # loadmat raises what its parser stumbles over: ValueError, TypeError, zlib.error, ...
        raise ValueError(f"{path}: not a readable .mat file: {error}") from None
    missing = [key for key in _KEYS if key not in arrays]
    if missing:
        raise ValueError(f"{path}: expected BLUFR's lists {', '.join(_KEYS)}; {missing[0]} is missing")
    return arrays


def _image_rows(path: Path, arrays: dict[str, Any], faces: FaceSet) -> NDArray[np.int64]:
    """Return the set's row of each image of the file's `imageList`; its labels must tell the same people apart."""
    try:
        keys = [image_key(str(cell.item())) for cell in arrays["imageList"].ravel()]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: imageList: expected image names: {error}") from None
    for key, count in Counter(keys).items():
        if key not in faces.row_of or count > 1:
            fault = f"stands {count} times" if count > 1 else "is not in the set"
            raise ValueError(f"{path}: imageList: image {image_name(key)} {fault}")
    rows = np.array([faces.row_of[key] for key in keys], dtype=np.int64)
    labels = arrays["labels"].ravel()
    if len(labels) != len(rows):
        raise ValueError(f"{path}: expected a label for each of {len(rows):,} images, got {len(labels):,}")
    people = faces.person[rows]
    num_pairs = len(np.unique(np.stack([labels.astype(np.int64), people]), axis=1).T)
    if not num_pairs == len(np.unique(labels)) == len(np.unique(people)):
        raise ValueError(f"{path}: labels: expected one label for each person of imageList, and one person a label")
    return rows


def _trial_indices(path: Path, key: str, cells: Any, num_images: int) -> list[NDArray[np.int64]]:
    """Return a list's indices, from 0, of each trial."""
    trials = []
    for number, cell in enumerate(cells.ravel(), start=1):
        index = np.asarray(cell).ravel()
        inside = index.dtype.kind in "ui" and len(index) and index.min() >= 1 and index.max() <= num_images
        if not inside or len(np.unique(index)) != len(index):
            raise ValueError(f"{path}: {key} of trial {number}: expected different indices from 1 to {num_images:,}")
        trials.append(index.astype(np.int64) - 1)
    return trials
