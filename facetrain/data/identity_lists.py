"""Lists that say which identities of a source are left out, and which names mean one person."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from unicodedata import normalize

from facetrain.data.sources import FaceSource

log = logging.getLogger(__name__)


def apply_lists(
    faces: FaceSource, *, exclude: Path | None, merge: Path | None
) -> tuple[FaceSource, list[dict[str, str]]]:
    """Merge identities, then leave out those that are excluded under any of their names.

    A name of a list means the identity that is called exactly so; where there is none, the one called so without
    blanks at the ends, else those whose names are the same letters in another Unicode form.

    Args:
        faces: The source.
        exclude: A list of names, one a line; those that the source doesn't have are passed over, with a warning.
        merge: A list of names of one person, a person a line, separated by tabs, or by commas where there is no tab.
            Lines that share a name are one person, who keeps the name that is listed first.

    Returns:
        The faces that are left, and a line of rejected.jsonl for every identity that isn't.

    Raises:
        ValueError: A list can't be read, names somebody to merge whom the source doesn't have, or excludes nobody or
            everybody; the message names it, and the line.
        FileNotFoundError: There is no such list.
    """
    if not exclude and not merge:
        return faces, []
    known = _KnownNames(faces.identities)
    kept_name = _merged(merge, known) if merge else {}
    identities = [kept_name.get(identity, identity) for identity in faces.identities]
    found = {name: known.find(name) for name in _lines(exclude).values()} if exclude else {}
    listed = {kept_name.get(name, name): name for names in found.values() for name in names}
    unknown = sorted(name for name, names in found.items() if not names)
    if unknown and not listed:  # names instead of numbers, for one: people of a test would be trained on
        raise ValueError(
            f"{exclude}: the source has none of these {len(unknown)} identities, such as {unknown[0]!r}; its own are"
            f" named like {faces.identities[0]!r}"
        )
    if unknown:
        log.warning(f"{exclude}: {len(unknown)} of {len(found)} names are no identity of the source: {unknown[0]}, ...")
    left = [image for image, identity in enumerate(identities) if identity not in listed]
    if not left:
        raise ValueError(f"{exclude}: excludes all {len(set(identities))} identities of the source")
    left_out = [
        {"identity": identity, "reason": f"excluded: {exclude} lists {listed[identity]}"} for identity in sorted(listed)
    ]
    return faces.take(left, [identities[image] for image in left]), left_out


def warn_of_lookalikes(faces: FaceSource) -> None:
    """Warn of identities whose names are the same letters in two Unicode forms, as those of two systems' folders."""
    alike = _KnownNames(faces.identities).lookalikes()
    if alike:
        one, other, *_ = alike[0]
        log.warning(
            f"{len(alike)} names stand in two Unicode forms, each taken for a person of its own, such as {one!a}"
            f" and {other!a}; --merge makes them one"
        )


class _KnownNames:
    """The identities of a source, found by names as people write them."""

    def __init__(self, identities: Iterable[str]) -> None:
        self._names = set(identities)
        self._by_letters = defaultdict[str, list[str]](list)
        for name in sorted(self._names):
            self._by_letters[normalize("NFC", name)].append(name)

    def find(self, name: str) -> Sequence[str]:
        """Return the identities that a name of a list means; none where the source has no such."""
        for written in (name, name.strip()):
            if written in self._names:
                return [written]
        for written in (name, name.strip()):
            if names := self._by_letters.get(normalize("NFC", written)):
                return names
        return []

    def lookalikes(self) -> list[list[str]]:
        """Return the names that are the same letters."""
        return [names for names in self._by_letters.values() if len(names) > 1]


def _merged(file: Path, known: _KnownNames) -> Mapping[str, str]:
    """Return the name that each merged identity keeps."""
    people: dict[str, Sequence[str]] = {}
    first_line: dict[str, int] = {}
    for number, line in _lines(file).items():
        listed = line.split("\t" if "\t" in line else ",")
        if len(listed) < 2 or not all(name.strip() for name in listed):
            raise ValueError(f"{file}:{number}: expected two or more names, separated by tabs or commas, got {line!r}")
        unknown = [name for name in listed if not known.find(name)]
        if unknown:
            raise ValueError(f"{file}:{number}: {unknown[0].strip()!r} is no identity of the source")
        names = [name for written in listed for name in known.find(written)]
        for name in names:
            first_line.setdefault(name, len(first_line))
        together = sorted({other for name in names for other in people.get(name, (name,))}, key=first_line.__getitem__)
        people |= dict.fromkeys(together, together)
    return {name: together[0] for name, together in people.items()}


def _lines(file: Path) -> dict[int, str]:
    """Return the lines of a list that aren't blank, by number.

    Cut at line feeds alone: names may begin and end in blanks, and hold other characters at which `splitlines` cuts.
    """
    try:
        lines = file.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected a text file: {error}") from None
    return {number: line.strip("\r\t") for number, line in enumerate(lines, start=1) if line.strip()}
