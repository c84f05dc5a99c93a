"""The identification protocols: which images of a set are gallery, genuine probes and impostor probes.

In every function `embeddings` is float32 [n, D], unit vectors in the order of `faces`. `FaceSet.place` is an image's
place among its person's images, so that 0 picks everybody's lowest-numbered image.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from facetrain.evaluation.identification import (
    ClosedSet,
    Embeddings,
    OpenSet,
    best_scores,
    rank_probes,
    rank_probes_in_draws,
)
from facetrain.evaluation.inputs import FaceSet

Mask = NDArray[np.bool_]

SURROGATE_PEOPLE = 4249
"""People in the gallery of closed-surrogate, as many as in the published closed set."""
SURROGATE_DRAWS = 10
"""Draws of its gallery, unless more or fewer are asked for."""


class CannotRunError(Exception):
    """A set of images lacks what a protocol is made of; the message says what it needs."""


def closed_full(faces: FaceSet, embeddings: Embeddings) -> ClosedSet:
    """Everybody's lowest-numbered image is the gallery, all other images are probes."""
    return closed_set(faces, embeddings, faces.place == 0, faces.place > 0)


def closed_surrogate(
    faces: FaceSet, embeddings: Embeddings, listed: Mask, num_draws: int, seed: int
) -> tuple[ClosedSet, ...]:
    """Stand in for the published closed set, whose list of people isn't public.

    The gallery holds the lowest-numbered image of the listed people and of as many others, drawn anew for each draw,
    as make 4,249; the listed people's other images are probes.

    Args:
        faces: all images of LFW.
        embeddings: of all images.
        listed: bool [K], the people of the open set.
        num_draws: of the others.
        seed: the draws' seed.
    """
    others = np.flatnonzero(~listed)
    drawn_RK = np.repeat(listed[None], num_draws, axis=0)
    for draw, drawn in enumerate(drawn_RK):
        rng = np.random.default_rng([seed, draw])
        drawn[rng.choice(others, SURROGATE_PEOPLE - int(listed.sum()), replace=False)] = True
    gallery, probes = faces.place == 0, listed[faces.person] & (faces.place > 0)
    ranks_RP, own_scores_P = rank_probes_in_draws(
        embeddings[probes], faces.person[probes], embeddings[gallery], faces.person[gallery], drawn_RK
    )
    people, probe_rows = faces.person[probes], np.flatnonzero(probes)
    return tuple(ClosedSet(ranks, SURROGATE_PEOPLE, people, own_scores_P, probe_rows) for ranks in ranks_RP)


def open_best_rowden(
    faces: FaceSet, embeddings: Embeddings, listed: Mask, num_draws: int, seed: int
) -> tuple[OpenSet, ...]:
    """Hold out one image of each listed person as a probe; everybody else is an impostor.

    Args:
        faces: all images.
        embeddings: of all images.
        listed: bool [K], the known people; their other images are the gallery.
        num_draws: 1 holds out the lowest-numbered images; R > 1 repeats with R random choices.
        seed: the draws' seed.
    """
    held_out = [np.zeros(len(faces.people), dtype=np.int64)]
    if num_draws > 1:
        held_out = [np.random.default_rng([seed, draw]).integers(faces.num_images) for draw in range(num_draws)]
    known = listed[faces.person]
    outcomes = []
    for place_K in held_out:
        is_probe = faces.place == place_K[faces.person]
        outcomes.append(open_set(faces, embeddings, known & ~is_probe, known & is_probe, [~known])[0])
    return tuple(outcomes)


def open_best_rowden_single(faces: FaceSet, embeddings: Embeddings, listed: Mask) -> OpenSet:
    """As open_best_rowden with one gallery image each, the lowest-numbered; the next one is the probe."""
    known = listed[faces.person]
    return open_set(faces, embeddings, known & (faces.place == 0), known & (faces.place == 1), [~known])[0]


def open_counts(faces: FaceSet, embeddings: Embeddings) -> dict[str, OpenSet]:
    """Known are the people with four or more images: three in the gallery, the others are genuine probes.

    Returns:
        The outcome for each group of impostors: known-unknown (people with two or three images), unknown-unknown
        (people with one) and all (both).

    Source: after Guenther et al. 2017.
    """
    count = faces.num_images[faces.person]
    known = count >= 4
    groups = {"known-unknown": (count == 2) | (count == 3), "unknown-unknown": count == 1, "all": ~known}
    outcomes = open_set(faces, embeddings, known & (faces.place < 3), known & (faces.place >= 3), list(groups.values()))
    return dict(zip(groups, outcomes, strict=True))


def closed_set(faces: FaceSet, embeddings: Embeddings, gallery: Mask, probes: Mask) -> ClosedSet:
    """Search for each probe in the gallery; both are bool [n], and every probe's person is in the gallery.

    Raises:
        CannotRunError: there is no probe.
    """
    if not probes.any():
        raise CannotRunError("needs people with two or more images")
    ranks, own_scores = _rank(faces, embeddings, gallery, probes)
    return ClosedSet(ranks, int(gallery.sum()), faces.person[probes], own_scores, probe_rows=np.flatnonzero(probes))


def open_set(
    faces: FaceSet, embeddings: Embeddings, gallery: Mask, genuine: Mask, impostors: Sequence[Mask]
) -> list[OpenSet]:
    """Return one outcome for each group of impostors; the genuine probes are searched once.

    Raises:
        CannotRunError: there is no genuine probe.
    """
    if not genuine.any():
        raise CannotRunError("needs people with enough images for a gallery and a genuine probe")
    ranks, own_scores = _rank(faces, embeddings, gallery, genuine)
    best = np.full(len(faces.person), np.nan, dtype=np.float32)
    anybody = np.logical_or.reduce(impostors)
    best[anybody] = best_scores(embeddings[anybody], embeddings[gallery])
    return [
        OpenSet(
            ranks=ranks,
            own_scores=own_scores,
            impostor_scores=best[group],
            gallery=int(gallery.sum()),
            people=faces.person[genuine],
            impostor_people=faces.person[group],
            probe_rows=np.flatnonzero(genuine),
            impostor_rows=np.flatnonzero(group),
        )
        for group in impostors
    ]


def _rank(
    faces: FaceSet, embeddings: Embeddings, gallery: Mask, probes: Mask
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    return rank_probes(embeddings[probes], faces.person[probes], embeddings[gallery], faces.person[gallery])
