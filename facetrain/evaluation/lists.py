"""Which protocols to run, and the lists that define them, read and checked against the images that are there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from facetrain.evaluation.blufr import BlufrTrial, read_blufr
from facetrain.evaluation.groups import Groups, read_groups
from facetrain.evaluation.inputs import (
    FaceSet,
    PairList,
    face_set,
    read_development_pairs,
    read_images,
    read_pairs,
    read_people,
)
from facetrain.evaluation.protocols import Mask

LFW_IMAGES = 13_233
LFW_PEOPLE = 5_749


@dataclass(frozen=True, kw_only=True)
class Request:
    """Which protocols to run, by the files that define them, and how. What is None is not run."""

    pairs: Path | None = None
    """Verification: a pairs.txt."""
    view1: tuple[Path, Path] | None = None
    """View 1 of LFW: pairsDevTrain.txt and pairsDevTest.txt."""
    open_set_people: Path | None = None
    """The people of open-best-rowden, one a line."""
    closed_lists: tuple[Path, Path] | None = None
    """Gallery and probes of closed-best-rowden, one image name a line."""
    blufr: Path | None = None
    """The trials of BLUFR, blufr_lfw_config.mat."""
    groups: Path | None = None
    """Attributes of people, a CSV, for verification of groups apart."""
    draws: int = 1
    """Random choices in open-best-rowden and closed-surrogate, for mean and std; 1 holds out the lowest-numbered images
    in open-best-rowden, and draws the others of closed-surrogate ten times."""
    bootstrap: int = 0
    """Resamples of people for 95% intervals; 0 leaves them out."""
    convention: Literal["exact", "insightface"] = "exact"
    """insightface adds what that code base prints to verification."""
    dataset: str = "lfw"
    """Name of the set; `lfw` demands the published counts of LFW, with another name they are whatever they are."""
    seed: int = 0
    """Seed of the draws and of the resamples."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        if self.draws < 1:
            raise ValueError(f"draws: expected 1 or more, got {self.draws}")
        if self.groups and not self.pairs:
            raise ValueError(f"groups: {self.groups} goes with a list of pairs")
        if self.bootstrap < 0 or 0 < self.bootstrap < 100:
            raise ValueError(f"bootstrap: expected 0 (off) or 100 resamples or more, got {self.bootstrap}")


@dataclass(frozen=True, eq=False)
class Lists:
    """The images and the lists of a request."""

    faces: FaceSet
    pairs: PairList | None
    view1: tuple[PairList, PairList] | None
    listed: Mask | None
    """bool [K], the people of open-best-rowden."""
    closed: tuple[Mask, Mask] | None
    """bool [n] each, gallery and probes of closed-best-rowden."""
    blufr: tuple[BlufrTrial, ...] | None
    groups: Groups | None


def read_lists(names: Sequence[str], request: Request) -> Lists:
    """Read the lists of a request for the images of these names, and check all that can be known without embeddings.

    Raises:
        ValueError: names or lists that can't be used or don't fit together, by file and culprit.
    """
    faces = face_set(names)
    is_lfw = request.dataset == "lfw"
    pairs = read_pairs(request.pairs) if request.pairs else None
    if is_lfw:
        _check_lfw(faces, pairs)
    if pairs is not None and pairs.num_folds < 2:
        raise ValueError(f"{pairs.path}: expected two folds or more, each judged by the others, got {pairs.num_folds}")
    view1 = None
    if request.view1:
        view1 = read_development_pairs(request.view1[0]), read_development_pairs(request.view1[1])
    for pair_list in (pairs, *(view1 or ())):
        if pair_list is not None:
            pair_list.rows(faces)
    return Lists(
        faces=faces,
        pairs=pairs,
        view1=view1,
        listed=_read_listed(request.open_set_people, faces, is_lfw=is_lfw) if request.open_set_people else None,
        closed=_read_closed(*request.closed_lists, faces, is_lfw=is_lfw) if request.closed_lists else None,
        blufr=_read_blufr(request.blufr, faces, is_lfw=is_lfw) if request.blufr else None,
        groups=read_groups(request.groups, faces) if request.groups else None,
    )


def _read_listed(path: Path, faces: FaceSet, *, is_lfw: bool) -> Mask:
    listed = read_people(path, faces)
    if is_lfw:
        num_images = int(faces.num_images[listed].sum())
        _expect(f"{path}: open-best-rowden", {"people": (int(listed.sum()), 596), "images": (num_images, 3739)})
    return listed


def _read_closed(gallery_file: Path, probes_file: Path, faces: FaceSet, *, is_lfw: bool) -> tuple[Mask, Mask]:
    gallery, probes = read_images(gallery_file, faces), read_images(probes_file, faces)
    if (gallery & probes).any():
        name = faces.names[int(np.argmax(gallery & probes))]
        raise ValueError(f"{probes_file}: expected no image of {gallery_file}, got {name}")
    unknown = probes & ~np.isin(faces.person, faces.person[gallery])
    if unknown.any():
        person = faces.people[faces.person[int(np.argmax(unknown))]]
        raise ValueError(f"{probes_file}: expected people of {gallery_file} alone, got {person}")
    if is_lfw:
        people, of_probes = np.unique(faces.person[gallery]), np.unique(faces.person[probes])
        counts = {"images": (int(gallery.sum()), 4249), "people": (len(people), 4249)}
        _expect(f"{gallery_file}: gallery of closed-best-rowden", counts)
        counts = {"images": (int(probes.sum()), 3143), "people": (len(of_probes), 596)}
        _expect(f"{probes_file}: probes of closed-best-rowden", counts)
    return gallery, probes


def _read_blufr(path: Path, faces: FaceSet, *, is_lfw: bool) -> tuple[BlufrTrial, ...]:
    trials = read_blufr(path, faces)
    if is_lfw:
        _expect(f"{path}: BLUFR", {"trials": (len(trials), 10)})
        for number, trial in enumerate(trials, start=1):
            _expect(f"{path}: trial {number} of BLUFR", {"gallery images": (len(trial.gallery), 1000)})
    return trials


def _check_lfw(faces: FaceSet, pair_list: PairList | None) -> None:
    """Compare the counts with those of LFW, which every published figure rests on."""
    missing = pair_list.missing(faces) if pair_list else []
    if missing and len(faces.person) < LFW_IMAGES:
        name, line = missing[0]
        num_missing = LFW_IMAGES - len(faces.person)
        raise ValueError(f"lfw: {num_missing:,} of {LFW_IMAGES:,} images are missing, {name} ({line}) for example")
    by_count = [
        int(np.count_nonzero(group))
        for group in (faces.num_images >= 4, np.isin(faces.num_images, (2, 3)), faces.num_images == 1)
    ]
    _expect(
        "lfw",
        {
            "images (--dataset NAME for another set)": (len(faces.person), LFW_IMAGES),
            "people": (len(faces.people), LFW_PEOPLE),
            "people with four or more images": (by_count[0], 610),
            "people with two or three images": (by_count[1], 1070),
            "people with one image": (by_count[2], 4069),
        },
    )
    if pair_list is not None:
        _expect(
            f"{pair_list.path}: View 2 of LFW",
            {
                "folds": (pair_list.num_folds, 10),
                "genuine pairs in each fold": (pair_list.pairs_per_fold, 300),
                "distinct images": (len({key for pair in pair_list.pairs for key in pair}), 7701),
            },
        )


def _expect(what: str, counts: Mapping[str, tuple[int, int]]) -> None:
    for name, (got, expected) in counts.items():
        if got != expected:
            raise ValueError(f"{what}: expected {expected:,} {name}, got {got:,}")
