"""Verification of groups of people apart, at the thresholds of the whole set."""

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from facetrain.evaluation.inputs import FaceSet, PairList
from facetrain.evaluation.verification import Verification

Groups = Mapping[str, Mapping[str, str]]
"""Attribute -> person -> value."""


@dataclass(frozen=True)
class GroupFigures:
    """How the pairs of one group fare."""

    attribute: str
    value: str
    people: int
    """People of the set who are in the group."""
    genuine: int
    """Genuine pairs of its people."""
    impostors: int
    """Impostor pairs of two of its people."""
    accepted: Mapping[str, tuple[int, int]]
    """By a FAR of the whole set, such as `1e-2`: genuine and impostor pairs accepted at its threshold."""

    def figures(self) -> dict[str, float]:
        """Return counts and rates by their keys; a rate of no pairs has none."""
        figures: dict[str, float] = {"people": self.people, "genuine": self.genuine, "impostors": self.impostors}
        for far, (genuine, impostors) in self.accepted.items():
            if self.genuine:
                figures[f"vr_at_far_{far}"] = genuine / self.genuine
            if self.impostors:
                figures[f"far_at_far_{far}"] = impostors / self.impostors
        return figures


def read_groups(path: Path, faces: FaceSet) -> Groups:
    """Read a CSV with the column `person` and a column for each attribute; an empty cell says nothing.

    Raises:
        ValueError: Not such a CSV, a person who stands twice, or nobody of the set in it; by line.
    """
    groups: dict[str, dict[str, str]] = {}
    seen: set[str] = set()
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, strict=True)
            head = [word.strip() for word in next(rows, [])]
            if "person" not in head or len(set(head)) < max(len(head), 2):
                raise ValueError(f"{path}:1: expected a header of person and attributes, each once, got {head}")
            for words in filter(None, rows):
                if len(words) != len(head):
                    raise ValueError(f"{path}:{rows.line_num}: expected {len(head)} columns, got {len(words)}")
                values = dict(zip(head, map(str.strip, words), strict=True))
                person = values.pop("person")
                if person in seen:
                    raise ValueError(f"{path}:{rows.line_num}: person {person!r} stands twice")
                seen.add(person)
                for attribute, value in values.items():
                    if value:
                        groups.setdefault(attribute, {})[person] = value
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: expected a CSV in UTF-8: {error}") from None
    if not seen & set(faces.people):
        raise ValueError(f"{path}: expected people of the set, such as {faces.people[0]}, got none of them")
    return groups


def group_figures(outcome: Verification, pairs: PairList, groups: Groups, faces: FaceSet) -> tuple[GroupFigures, ...]:
    """Return the figures of each value of each attribute, at the whole set's thresholds.

    Args:
        outcome: Of all pairs.
        pairs: In the order of its scores.
        groups: Who is in which.
        faces: The set.
    """
    return tuple(
        _figures(outcome, pairs, attribute, value, {p for p in faces.people if of_person.get(p) == value})
        for attribute, of_person in groups.items()
        for value in sorted({of_person[person] for person in faces.people if person in of_person})
    )


def _figures(outcome: Verification, pairs: PairList, attribute: str, value: str, members: set[str]) -> GroupFigures:
    is_within = np.array([a[0] in members and b[0] in members for a, b in pairs.pairs])
    genuine, impostor = is_within & outcome.is_genuine, is_within & ~outcome.is_genuine
    accepted = {}
    for far, rate in outcome.vr_at_far.items():
        is_accepted = outcome.scores >= rate.point.threshold
        accepted[far] = int((is_accepted & genuine).sum()), int((is_accepted & impostor).sum())
    return GroupFigures(attribute, value, len(members), int(genuine.sum()), int(impostor.sum()), accepted)


def group_rows(groups: tuple[GroupFigures, ...]) -> Iterator[list[str]]:
    """Yield the rows of a table, the head first: group, people, and for each FAR what is accepted, with counts."""
    fars = list(groups[0].accepted)
    yield ["group", "people", *(f"{kind} at FAR={far}" for far in fars for kind in ("genuine", "impostors"))]
    for group in groups:
        cells = [
            f"{100 * accepted / total:.2f}% of {total:,}" if total else "no pair"
            for far in fars
            for accepted, total in zip(group.accepted[far], (group.genuine, group.impostors), strict=True)
        ]
        yield [f"{group.attribute}: {group.value}", f"{group.people:,}", *cells]
