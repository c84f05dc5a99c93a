"""Labeled Faces in the Wild: every protocol that can be run on a set of named embeddings, with its counts checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import getitem
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from facetrain.evaluation import protocols
from facetrain.evaluation.blufr import BlufrOutcome, blufr_figures, run_blufr
from facetrain.evaluation.bootstrap import interval, people_figures, resample
from facetrain.evaluation.conventions import InsightFaceFigures, insightface_figures
from facetrain.evaluation.distractors import DistractorScores
from facetrain.evaluation.groups import GroupFigures, group_figures
from facetrain.evaluation.identification import ClosedSet, Embeddings, OpenSet
from facetrain.evaluation.inputs import FaceSet, PairList, image_name, unit_vectors
from facetrain.evaluation.lists import LFW_PEOPLE, Lists, Request, read_lists
from facetrain.evaluation.protocols import CannotRunError
from facetrain.evaluation.threshold import num_allowed, thresholds
from facetrain.evaluation.verification import Verification, View1, verify, verify_view1

OPEN_SET_FAR = 1e-2
"""The false accept rate of every open-set figure."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The outcome of every protocol that was run. Draws of a protocol stand in one tuple."""

    dataset: str
    """Name of the set, and prefix of its metrics."""
    num_images: int
    num_people: int
    """0 where a file of pairs doesn't say who is in it."""
    embedding_dim: int
    verification: Verification | None
    """None where no list of pairs was given."""
    pairs: PairList | None
    """The pairs of verification, in the order of its scores."""
    closed: Mapping[str, tuple[ClosedSet, ...]]
    """By protocol."""
    open: Mapping[str, tuple[OpenSet, ...]]
    """By protocol; those of open-counts are `open-counts/<group of impostors>`."""
    not_run: Mapping[str, str]
    """By protocol: what it needs."""
    insightface: InsightFaceFigures | None = None
    """Verification as that code base counts it, where asked for."""
    view1: View1 | None = None
    blufr: tuple[BlufrOutcome, ...] = ()
    """By trial; empty where its trials weren't given."""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """By `protocol/figure`: the 95% interval over people, where asked for."""
    not_aligned: tuple[str, ...] | None = None
    """Images whose face wasn't found and whose centre was taken instead; None where images came aligned."""
    groups: tuple[GroupFigures, ...] = ()
    """Verification of groups of people, where attributes were given."""
    distractors: DistractorScores | None = None
    """The crowd that is in every gallery; None where there is none."""

    @property
    def results(self) -> dict[str, Any]:
        """The figures as results.json holds them: protocol -> key -> fraction or count."""
        results: dict[str, Any] = {}
        if self.verification is not None:
            results["verification"] = self.verification.figures()
        if self.insightface is not None:
            results["verification-insightface"] = self.insightface.figures()
        if self.view1 is not None:
            results["view1"] = self.view1.figures()
        results |= {name: _closed_figures(draws) for name, draws in self.closed.items()}
        for name, draws in self.open.items():
            protocol, _, group = name.partition("/")
            if group:
                results.setdefault(protocol, {"rank1": draws[0].rank1})[group] = _open_figures(draws)
            else:
                results[protocol] = _averaged([{"rank1": draw.rank1} for draw in draws]) | _open_figures(draws)
        if self.blufr:
            results["blufr"] = blufr_figures(self.blufr)
        for key, bounds in self.intervals.items():
            *path, figure = key.split("/")
            reduce(getitem, path, results)[f"{figure}_ci95"] = list(bounds)
        for people in self.groups:
            of_attribute = results.setdefault("groups", {}).setdefault(people.attribute, {})
            of_attribute[people.value] = people.figures()
        if self.not_aligned is not None:
            results["alignment"] = {"images": self.num_images, "not_found": len(self.not_aligned)}
        if self.distractors:
            results["distractors"] = self.distractors.figures()
        return results

    @property
    def thresholds(self) -> dict[str, dict[str, float]]:
        """The thresholds of some FARs, for whoever decides by them: protocol -> FAR -> score, the mean of draws."""
        found = {"verification": self.verification.thresholds()} if self.verification else {}
        for name, draws in self.open.items():
            each = [thresholds(draw.impostor_scores) for draw in draws]
            found[name] = {far: float(np.mean([one[far] for one in each])) for far in each[0]}
        return found


def metrics(evaluation: Evaluation) -> dict[str, float]:
    """Return every figure under its flat name, such as `lfw/open-best-rowden/dir_rank1_at_far_1e-2`."""
    flat: dict[str, float] = {}

    def add(prefix: str, figures: Mapping[str, Any]) -> None:
        for key, value in figures.items():
            if isinstance(value, Mapping):
                add(f"{prefix}/{key}", value)
            elif not isinstance(value, list):  # the trials of BLUFR, the ends of an interval
                flat[f"{prefix}/{key}"] = float(value)

    add(evaluation.dataset, evaluation.results)
    return flat


def evaluate(
    names: Sequence[str],
    embeddings: NDArray[np.float32],
    request: Request,
    distractors: DistractorScores | None = None,
) -> Evaluation:
    """Run every protocol for which the inputs are there.

    Args:
        names: image names such as `Name_0001`; folders and suffix are ignored.
        embeddings: float32 [n, D], not zero.
        request: the protocols.
        distractors: how the images score against a crowd, which is then added to every gallery but BLUFR's.

    Raises:
        ValueError: inputs that don't fit together, by file and culprit.
    """
    lists = read_lists(names, request)
    faces, embeddings = lists.faces, unit_vectors(lists.faces.names, embeddings)
    closed, not_run = _closed_protocols(lists, embeddings, request)
    opened, open_not_run = _open_protocols(lists, embeddings, request)
    if distractors:
        closed = {name: tuple(map(distractors.in_closed_set, draws)) for name, draws in closed.items()}
        opened = {name: tuple(map(distractors.in_open_set, draws)) for name, draws in opened.items()}
    verification, pair_people, insightface = None, None, None
    if lists.pairs is None:
        not_run["verification"] = "needs a list of pairs"
    else:
        rows_n2 = lists.pairs.rows(faces)
        pair_people = faces.person[rows_n2]
        verification, insightface = _verify(embeddings, rows_n2, lists.pairs, request.convention)
    groups: tuple[GroupFigures, ...] = ()
    if verification and lists.pairs and lists.groups:
        groups = group_figures(verification, lists.pairs, lists.groups, faces)
    intervals = {}
    if request.bootstrap:
        figures = people_figures(verification, lists.pairs, pair_people, closed, opened, OPEN_SET_FAR)
        values = resample(figures, len(faces.people), request.bootstrap, request.seed)
        intervals = {key: interval(value) for key, value in values.items()}
    return Evaluation(
        dataset=request.dataset,
        num_images=len(faces.person),
        num_people=len(faces.people),
        embedding_dim=embeddings.shape[1],
        verification=verification,
        pairs=lists.pairs,
        closed=closed,
        open=opened,
        not_run=not_run | open_not_run,
        insightface=insightface,
        view1=_view1(embeddings, *lists.view1, faces) if lists.view1 else None,
        blufr=run_blufr(faces, embeddings, lists.blufr) if lists.blufr else (),
        intervals=intervals,
        groups=groups,
        distractors=distractors,
    )


def evaluate_pairs(
    pairs: PairList,
    embeddings: NDArray[np.float32],
    *,
    dataset: str,
    convention: Literal["exact", "insightface"] = "exact",
) -> Evaluation:
    """Run verification alone, on pairs of images of unknown people.

    Args:
        pairs: n pairs.
        embeddings: float32 [2n, D], the two images of each pair in turn.
        dataset: name of the set.
        convention: as in `Request`.

    Raises:
        ValueError: an embedding that is zero or not finite, or pairs that can't be judged.
    """
    names = [image_name(key) for pair in pairs.pairs for key in pair]
    rows_n2 = np.arange(len(names)).reshape(-1, 2)
    embeddings = unit_vectors(names, embeddings)
    try:
        verification, insightface = _verify(embeddings, rows_n2, pairs, convention)
    except ValueError as error:
        raise ValueError(f"{pairs.path}: {error}") from None
    return Evaluation(
        dataset=dataset,
        num_images=len(names),
        num_people=0,
        embedding_dim=embeddings.shape[1],
        verification=verification,
        pairs=pairs,
        closed={},
        open={},
        not_run={},
        insightface=insightface,
    )


def _verify(
    embeddings: Embeddings, rows_n2: NDArray[np.int64], pairs: PairList, convention: str
) -> tuple[Verification, InsightFaceFigures | None]:
    a, b = embeddings[rows_n2[:, 0]], embeddings[rows_n2[:, 1]]
    verification = verify(np.einsum("nd,nd->n", a, b), pairs.is_genuine, pairs.fold)
    if convention == "exact":
        return verification, None
    return verification, insightface_figures(a, b, pairs.is_genuine, pairs.fold)


def _view1(embeddings: Embeddings, train: PairList, test: PairList, faces: FaceSet) -> View1:
    def scores(pairs: PairList) -> NDArray[np.float32]:
        rows_n2 = pairs.rows(faces)
        scores_n: NDArray[np.float32] = np.einsum("nd,nd->n", embeddings[rows_n2[:, 0]], embeddings[rows_n2[:, 1]])
        return scores_n

    return verify_view1(scores(train), train.is_genuine, scores(test), test.is_genuine)


def _closed_protocols(
    lists: Lists, embeddings: Embeddings, request: Request
) -> tuple[dict[str, tuple[ClosedSet, ...]], dict[str, str]]:
    faces, listed = lists.faces, lists.listed
    closed: dict[str, tuple[ClosedSet, ...]] = {}
    not_run: dict[str, str] = {}
    if lists.closed is None:
        not_run["closed-best-rowden"] = "needs list files of its gallery and its probes"
    else:
        closed["closed-best-rowden"] = (protocols.closed_set(faces, embeddings, *lists.closed),)
    try:
        closed["closed-full"] = (protocols.closed_full(faces, embeddings),)
    except CannotRunError as reason:
        not_run["closed-full"] = str(reason)
    if request.dataset != "lfw":
        not_run["closed-surrogate"] = f"needs the {LFW_PEOPLE:,} people of LFW"
    elif listed is None:
        not_run["closed-surrogate"] = "needs the list of open-set people"
    else:
        draws = request.draws if request.draws > 1 else protocols.SURROGATE_DRAWS
        closed["closed-surrogate"] = protocols.closed_surrogate(faces, embeddings, listed, draws, request.seed)
    return closed, not_run


def _open_protocols(
    lists: Lists, embeddings: Embeddings, request: Request
) -> tuple[dict[str, tuple[OpenSet, ...]], dict[str, str]]:
    faces, listed = lists.faces, lists.listed
    outcomes: dict[str, tuple[OpenSet, ...]] = {}
    not_run: dict[str, str] = {}
    if listed is None:
        not_run |= dict.fromkeys(("open-best-rowden", "open-best-rowden-single"), "needs the list of open-set people")
    else:
        draws, seed = request.draws, request.seed
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
