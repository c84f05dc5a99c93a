"""Labeled Faces in the Wild: every protocol that can be run on a set of named embeddings, with its counts checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrain.evaluation import protocols
from facetrain.evaluation.distractors import DistractorScores
from facetrain.evaluation.identification import ClosedSet, Embeddings, OpenSet
from facetrain.evaluation.inputs import FaceSet, PairList, face_set, read_pairs, read_people, unit_vectors
from facetrain.evaluation.protocols import CannotRunError, Mask
from facetrain.evaluation.threshold import num_allowed
from facetrain.evaluation.verification import Verification, verify

OPEN_SET_FAR = 1e-2
"""The false accept rate of every open-set figure."""

LFW_IMAGES = 13_233
LFW_PEOPLE = 5_749


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The outcome of every protocol that was run. Draws of a protocol stand in one tuple."""

    dataset: str
    """Name of the set, and prefix of its metrics."""
    num_images: int
    num_people: int
    embedding_dim: int
    verification: Verification
    pairs: PairList
    """The pairs of verification, in the order of its scores."""
    closed: Mapping[str, tuple[ClosedSet, ...]]
    """By protocol."""
    open: Mapping[str, tuple[OpenSet, ...]]
    """By protocol; those of open-counts are `open-counts/<group of impostors>`."""
    not_run: Mapping[str, str]
    """By protocol: what it needs."""
    distractors: DistractorScores | None = None
    """The crowd that is in every gallery; None where there is none."""

    @property
    def results(self) -> dict[str, Any]:
        """The figures as results.json holds them: protocol -> key -> fraction or count."""
        results: dict[str, Any] = {"verification": self.verification.figures()}
        results |= {name: _closed_figures(draws) for name, draws in self.closed.items()}
        for name, draws in self.open.items():
            protocol, _, group = name.partition("/")
            if group:
                results.setdefault(protocol, {"rank1": draws[0].rank1})[group] = _open_figures(draws)
            else:
                results[protocol] = _averaged([{"rank1": draw.rank1} for draw in draws]) | _open_figures(draws)
        if self.distractors:
            results["distractors"] = self.distractors.figures()
        return results


def metrics(evaluation: Evaluation) -> dict[str, float]:
    """Return every figure under its flat name, such as `lfw/open-best-rowden/dir_rank1_at_far_1e-2`."""
    flat: dict[str, float] = {}

    def add(prefix: str, figures: Mapping[str, Any]) -> None:
        for key, value in figures.items():
            if isinstance(value, Mapping):
                add(f"{prefix}/{key}", value)
            else:
                flat[f"{prefix}/{key}"] = float(value)

    add(evaluation.dataset, evaluation.results)
    return flat


def evaluate(
    names: Sequence[str],
    embeddings: NDArray[np.float32],
    *,
    pairs: Path,
    open_set_people: Path | None,
    draws: int = 1,
    dataset: str = "lfw",
    seed: int = 0,
    distractors: DistractorScores | None = None,
) -> Evaluation:
    """Run every protocol for which the inputs are there.

    Args:
        names: image names such as `Name_0001`; folders and suffix are ignored.
        embeddings: float32 [n, D], not zero.
        pairs: the verification protocol, a pairs.txt.
        open_set_people: the people of open-best-rowden, one a line; without it three protocols are not run.
        draws: 1 holds out the lowest-numbered image in open-best-rowden; R > 1 gives mean and std of R random choices.
        dataset: `lfw` demands the published counts of LFW; with another name they are whatever they are.
        seed: seed of the draws.
        distractors: how the images score against a crowd, which is then added to every gallery of identification.

    Raises:
        ValueError: inputs that don't fit together, by file and culprit.
    """
    if draws < 1:
        raise ValueError(f"draws: expected 1 or more, got {draws}")
    faces, pair_list, listed = _read_inputs(names, pairs, open_set_people, dataset)
    embeddings = unit_vectors(faces.names, embeddings)
    rows_n2 = pair_list.rows(faces)
    scores = np.einsum("nd,nd->n", embeddings[rows_n2[:, 0]], embeddings[rows_n2[:, 1]])
    closed, not_run = _closed_protocols(faces, embeddings, listed, is_lfw=dataset == "lfw", seed=seed)
    opened, open_not_run = _open_protocols(faces, embeddings, listed, draws, seed)
    if distractors:
        closed = {name: tuple(map(distractors.in_closed_set, outcomes)) for name, outcomes in closed.items()}
        opened = {name: tuple(map(distractors.in_open_set, outcomes)) for name, outcomes in opened.items()}
    return Evaluation(
        dataset=dataset,
        num_images=len(faces.person),
        num_people=len(faces.people),
        embedding_dim=embeddings.shape[1],
        verification=verify(scores, pair_list.is_genuine, pair_list.fold),
        pairs=pair_list,
        closed=closed,
        open=opened,
        not_run=not_run | open_not_run,
        distractors=distractors,
    )


def check_inputs(names: Sequence[str], *, pairs: Path, open_set_people: Path | None, dataset: str = "lfw") -> None:
    """Raise the ValueError that `evaluate` would, as far as names and lists tell it, before anything is embedded."""
    faces, pair_list, _ = _read_inputs(names, pairs, open_set_people, dataset)
    pair_list.rows(faces)


def _read_inputs(
    names: Sequence[str], pairs: Path, open_set_people: Path | None, dataset: str
) -> tuple[FaceSet, PairList, Mask | None]:
    faces = face_set(names)
    pair_list = read_pairs(pairs)
    if dataset == "lfw":
        _check_lfw(faces, pair_list)
    if open_set_people is None:
        return faces, pair_list, None
    listed = read_people(open_set_people, faces)
    if dataset == "lfw":
        num_images = int(faces.num_images[listed].sum())
        counts = {"people": (int(listed.sum()), 596), "images": (num_images, 3739)}
        _expect(f"{open_set_people}: open-best-rowden", counts)
    return faces, pair_list, listed


def _closed_protocols(
    faces: FaceSet, embeddings: Embeddings, listed: Mask | None, *, is_lfw: bool, seed: int
) -> tuple[dict[str, tuple[ClosedSet, ...]], dict[str, str]]:
    closed: dict[str, tuple[ClosedSet, ...]] = {}
    not_run = {"closed-best-rowden": "needs list files of its gallery and its probes"}
    try:
        closed["closed-full"] = (protocols.closed_full(faces, embeddings),)
    except CannotRunError as reason:
        not_run["closed-full"] = str(reason)
    if not is_lfw:
        not_run["closed-surrogate"] = f"needs the {LFW_PEOPLE:,} people of LFW"
    elif listed is None:
        not_run["closed-surrogate"] = "needs the list of open-set people"
    else:
        closed["closed-surrogate"] = protocols.closed_surrogate(faces, embeddings, listed, seed)
    return closed, not_run


def _open_protocols(
    faces: FaceSet, embeddings: Embeddings, listed: Mask | None, draws: int, seed: int
) -> tuple[dict[str, tuple[OpenSet, ...]], dict[str, str]]:
    outcomes: dict[str, tuple[OpenSet, ...]] = {}
    not_run: dict[str, str] = {}
    if listed is None:
        not_run |= dict.fromkeys(("open-best-rowden", "open-best-rowden-single"), "needs the list of open-set people")
    else:
        outcomes["open-best-rowden"] = protocols.open_best_rowden(faces, embeddings, listed, draws, seed)
        outcomes["open-best-rowden-single"] = (protocols.open_best_rowden_single(faces, embeddings, listed),)
    try:
        outcomes |= {
            f"open-counts/{group}": (outcome,) for group, outcome in protocols.open_counts(faces, embeddings).items()
        }
    except CannotRunError as reason:
        not_run["open-counts"] = str(reason)
    for name, (first, *_) in list(outcomes.items()):
        num_impostors = len(first.impostor_scores)
        if num_allowed(num_impostors, OPEN_SET_FAR) < 1:
            not_run[name] = f"needs more impostor probes for a FAR of {OPEN_SET_FAR:.0%} than {num_impostors}"
            del outcomes[name]
    return outcomes, not_run


def _closed_figures(draws: Sequence[ClosedSet]) -> dict[str, float]:
    figures = _averaged([draw.figures() for draw in draws])
    if len(draws) > 1:
        figures["draws"] = len(draws)
    return figures | {"gallery": draws[0].gallery, "probes": len(draws[0].ranks)}


def _open_figures(draws: Sequence[OpenSet]) -> dict[str, float]:
    figures = _averaged([draw.figures(OPEN_SET_FAR) for draw in draws])
    if len(draws) > 1:
        figures["draws"] = len(draws)
    counts = {"gallery": draws[0].gallery, "probes": len(draws[0].ranks), "impostors": len(draws[0].impostor_scores)}
    return figures | counts


def _averaged(draws: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return one draw as it is, and of several each figure's mean beside its sample standard deviation."""
    if len(draws) == 1:
        return dict(draws[0])
    figures: dict[str, float] = {}
    for key in draws[0]:
        values = [draw[key] for draw in draws]
        figures |= {key: float(np.mean(values)), f"{key}_std": float(np.std(values, ddof=1))}
    return figures


def _check_lfw(faces: FaceSet, pair_list: PairList) -> None:
    """Compare the counts with those of LFW, which every published figure rests on."""
    missing = pair_list.missing(faces)
    if missing and len(faces.person) < LFW_IMAGES:
        name, line = missing[0]
        num_missing = LFW_IMAGES - len(faces.person)
        raise ValueError(f"lfw: {num_missing:,} of {LFW_IMAGES:,} images are missing, {name} ({line}) for example")
    by_count = [int(np.count_nonzero(group)) for group in _groups_by_count(faces.num_images)]
    _expect(
        "lfw",
        {
            "images": (len(faces.person), LFW_IMAGES),
            "people": (len(faces.people), LFW_PEOPLE),
            "people with four or more images": (by_count[0], 610),
            "people with two or three images": (by_count[1], 1070),
            "people with one image": (by_count[2], 4069),
        },
    )
    images = {key for pair in pair_list.pairs for key in pair}
    _expect(
        f"{pair_list.path}: View 2 of LFW",
        {
            "folds": (pair_list.num_folds, 10),
            "genuine pairs in each fold": (pair_list.pairs_per_fold, 300),
            "distinct images": (len(images), 7701),
        },
    )


def _groups_by_count(num_images: NDArray[np.int64]) -> tuple[Mask, Mask, Mask]:
    return num_images >= 4, (num_images == 2) | (num_images == 3), num_images == 1


def _expect(what: str, counts: Mapping[str, tuple[int, int]]) -> None:
    for name, (got, expected) in counts.items():
        if got != expected:
            raise ValueError(f"{what}: expected {expected:,} {name}, got {got:,}")
