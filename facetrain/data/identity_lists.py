"""Lists that say which identities of a source are left out, and which names mean one person."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from facetrain.data.sources import FaceSource

log = logging.getLogger(__name__)


def apply_lists(
    faces: FaceSource, *, exclude: Path | None, merge: Path | None
) -> tuple[FaceSource, list[dict[str, str]]]:
    """Merge identities, then leave out those that are excluded under any of their names.

    Args:
        faces: The source.
        exclude: A list of names, one a line; those that the source doesn't have are passed over, with a warning.
        merge: A list of names of one person, a person a line, separated by tabs, or by commas where there is no tab.
            Lines that share a name are one person, who keeps the name that is listed first.

    Returns:
        The faces that are left, and a line of rejected.jsonl for every identity that isn't.

    Raises:
        ValueError: A list can't be read, names somebody to merge whom the source doesn't have, or excludes everybody;
            the message names it, and the line.
        FileNotFoundError: There is no such list.
    """
    if not exclude and not merge:
        return faces, []
    kept_name = _merged(merge, set(faces.identities)) if merge else {}
    identities = [kept_name.get(identity, identity) for identity in faces.identities]
    listed = {kept_name.get(name, name): name for name in _lines(exclude).values()} if exclude else {}
    unknown = sorted(listed.keys() - set(identities))
    if unknown:
        log.warning(
            f"{exclude}: {len(unknown)} of {len(listed)} names are no identity of the source: {unknown[0]}, ..."
        )
    left = [image for image, identity in enumerate(identities) if identity not in listed]
    if not left:
        raise ValueError(f"{exclude}: excludes all {len(set(identities))} identities of the source")
    left_out = [
        {"identity": identity, "reason": f"excluded: {exclude} lists {listed[identity]}"}
        for identity in sorted(listed.keys() & set(identities))
    ]
    return faces.take(left, [identities[image] for image in left]), left_out


def _merged(file: Path, known: set[str]) -> Mapping[str, str]:
    """Return the name that each merged identity keeps."""
    people: dict[str, Sequence[str]] = {}
    first_line: dict[str, int] = {}
    for number, line in _lines(file).items():
        names = [name.strip() for name in line.split("\t" if "\t" in line else ",")]
        if len(names) < 2 or not all(names):
            raise ValueError(f"{file}:{number}: expected two or more names, separated by tabs or commas, got {line!r}")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"{file}:{number}: {unknown[0]!r} is no identity of the source")
        for name in names:
            first_line.setdefault(name, len(first_line))
        together = sorted({other for name in names for other in people.get(name, (name,))}, key=first_line.__getitem__)
        people |= dict.fromkeys(together, together)
    return {name: together[0] for name, together in people.items()}


def _lines(file: Path) -> dict[int, str]:
    """Return the lines of a list that aren't blank, by number."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected a text file: {error}") from None
    return {number: line.strip() for number, line in enumerate(lines, start=1) if line.strip()}
