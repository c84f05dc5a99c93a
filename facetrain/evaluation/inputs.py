"""What an evaluation reads: image names, embeddings, lists of pairs and of people, all checked before use."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ImageKey = tuple[str, int]
"""A person's name and the number of one of their images: ("Aaron_Peirsol", 2) is Aaron_Peirsol_0002."""

_BLOCK_ROWS = 65_536

_NAME = re.compile(r"(?:.*[/\\])?(?P<person>[^/\\]+)_(?P<number>\d+)(?:\.\w+)?")


@dataclass(frozen=True, eq=False)
class FaceSet:
    """The n images of K people, each known by its person and its number."""

    names: tuple[str, ...]
    """[n], in the order in which the set was given."""
    people: tuple[str, ...]
    """[K], sorted."""
    person: NDArray[np.int64]
    """[n], the person of each image, a row of `people`."""
    place: NDArray[np.int64]
    """[n], the place of each image among its person's images by number; 0 is the lowest-numbered."""
    num_images: NDArray[np.int64]
    """[K], images of each person."""
    row_of: Mapping[ImageKey, int]
    """The row of each image."""


@dataclass(frozen=True, eq=False)
class PairList:
    """The pairs of a verification protocol, in the order of their file."""

    path: Path
    pairs: tuple[tuple[ImageKey, ImageKey], ...]
    is_genuine: NDArray[np.bool_]
    fold: NDArray[np.int64]
    """From 0."""
    num_folds: int
    pairs_per_fold: int
    """Genuine pairs in each fold, and as many impostor pairs."""

    def line_of(self, pair: int) -> str:
        """Return where a pair stands, as `file:line`."""
        return f"{self.path}:{pair + 2}"

    def missing(self, faces: FaceSet) -> list[tuple[str, str]]:
        """Return each distinct image that isn't in the set, with the first `file:line` that names it."""
        found: dict[str, str] = {}
        for pair, keys in enumerate(self.pairs):
            for key in keys:
                if key not in faces.row_of:
                    found.setdefault(image_name(key), self.line_of(pair))
        return list(found.items())

    def rows(self, faces: FaceSet) -> NDArray[np.int64]:
        """Return the rows of each pair's images in the set, int64 [n, 2].

        Raises:
            ValueError: an image isn't in the set.
        """
        for name, line in self.missing(faces)[:1]:
            raise ValueError(f"{line}: image {name} is not in the set")
        return np.array([[faces.row_of[a], faces.row_of[b]] for a, b in self.pairs])


def image_name(key: ImageKey) -> str:
    """Return the name of an image as LFW writes it, `Name_0001`."""
    return f"{key[0]}_{key[1]:04d}"


def image_key(name: str) -> ImageKey:
    """Return person and number of an image name such as `Name_0001`; folders before and a suffix behind are ignored.

    Raises:
        ValueError: it isn't an image name.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"images: expected an image name such as Name_0001, got {name!r}")
    return match["person"], int(match["number"])


def face_set(names: Sequence[str]) -> FaceSet:
    """Read image names such as `Name_0001`; folders before and a suffix behind are ignored.

    Raises:
        ValueError: no name at all, one that isn't an image name, or one that stands twice.
    """
    keys = [image_key(name) for name in names]
    row_of = {key: row for row, key in enumerate(keys)}
    if not keys:
        raise ValueError("images: expected image names such as Name_0001, got none")
    if len(row_of) < len(keys):
        twice = next(name for row, (name, key) in enumerate(zip(names, keys, strict=True)) if row_of[key] != row)
        raise ValueError(f"images: {twice} stands twice")
    people, person, num_images = np.unique([key[0] for key in keys], return_inverse=True, return_counts=True)
    # Sorted by person, then number, an image's place is its distance from where its person begins.
    order = np.lexsort((np.array([key[1] for key in keys]), person))
    place = np.empty(len(keys), dtype=np.int64)
    place[order] = np.arange(len(keys)) - np.repeat(num_images.cumsum() - num_images, num_images)
    return FaceSet(
        names=tuple(names),
        people=tuple(people.tolist()),
        person=person.astype(np.int64),
        place=place,
        num_images=num_images.astype(np.int64),
        row_of=row_of,
    )


def check_people(names: Sequence[str], identities: Sequence[str]) -> None:
    """Check that the people whom image names tell are those whom their source tells.

    Args:
        names: [n], such as `Name/Name_0001.jpg`.
        identities: [n], of the same images.

    Raises:
        ValueError: They aren't; the message names an image.
    """
    identity_of, person_of = dict[str, str](), dict[str, str]()
    for name, identity in zip(names, identities, strict=True):
        person = image_key(name)[0]
        if (identity_of.setdefault(person, identity), person_of.setdefault(identity, person)) != (identity, person):
            raise ValueError(f"images: {name}: expected a file name that tells who it is, {identity}_0001.jpg")


def unit_vectors(names: Sequence[str], embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale embeddings to unit length, so that inner products are cosine similarities.

    Args:
        names: [n], for the message of an error.
        embeddings: float [n, D].

    Returns:
        float32 [n, D].

    Raises:
        ValueError: a NaN, infinite or zero embedding; shapes that don't fit.
    """
    if embeddings.ndim != 2 or len(embeddings) != len(names):
        raise ValueError(f"embeddings: expected one row for each of {len(names):,} names, got shape {embeddings.shape}")
    embeddings = np.asarray(embeddings, dtype=np.float32)
    finite = np.isfinite(embeddings).all(axis=1)
    if not finite.all():
        raise ValueError(f"embeddings: NaN or infinite for {names[int(np.argmin(finite))]}")
    # float64 sums: squares of small float32 numbers would otherwise vanish.
    norms = np.sqrt(np.einsum("nd,nd->n", embeddings, embeddings, dtype=np.float64))
    if not norms.all():
        raise ValueError(f"embeddings: all zeros for {names[int(np.argmin(norms))]}")
    unit = np.empty_like(embeddings)
    for start in range(0, len(unit), _BLOCK_ROWS):  # float64 quotients of all at once would be twice the set again
        rows = slice(start, start + _BLOCK_ROWS)
        unit[rows] = embeddings[rows] / norms[rows, None]
    return unit


def read_pairs(path: Path) -> PairList:
    """Read a pairs.txt: folds and pairs per fold, then for each fold its genuine and its impostor lines.

    Raises:
        ValueError: a malformed line, by its number.
    """
    lines = _lines(path)
    head = lines[0].split() if lines else []
    if len(head) != 2 or not all(word.isdecimal() and int(word) > 0 for word in head):
        raise ValueError(f"{path}:1: expected the number of folds and of pairs in each, got {' '.join(head)!r}")
    return _pair_list(path, lines, *map(int, head))


def read_development_pairs(path: Path) -> PairList:
    """Read a list of View 1, pairsDevTrain.txt or pairsDevTest.txt: one fold, whose size stands in the first line.

    Raises:
        ValueError: a malformed line, by its number.
    """
    lines = _lines(path)
    head = lines[0].strip() if lines else ""
    if not head.isdecimal() or int(head) < 1:
        raise ValueError(f"{path}:1: expected the number of genuine pairs, got {head!r}")
    return _pair_list(path, lines, 1, int(head))


def read_images(path: Path, faces: FaceSet) -> NDArray[np.bool_]:
    """Read a list of images, one name a line.

    Returns:
        bool [n], which of the set's images are listed.

    Raises:
        ValueError: an image that stands twice or isn't in the set; an empty list.
    """
    listed = np.zeros(len(faces.names), dtype=bool)
    for number, line in enumerate(_lines(path), start=1):
        try:
            row = faces.row_of.get(image_key(line.strip()))
        except ValueError:
            raise ValueError(f"{path}:{number}: expected an image name such as Name_0001, got {line!r}") from None
        if row is None:
            raise ValueError(f"{path}:{number}: image {line.strip()} is not in the set")
        if listed[row]:
            raise ValueError(f"{path}:{number}: image {line.strip()} stands twice")
        listed[row] = True
    if not listed.any():
        raise ValueError(f"{path}: expected image names, one a line, got an empty file")
    return listed


def read_people(path: Path, faces: FaceSet) -> NDArray[np.bool_]:
    """Read a list of people, one a line, each with at least two images in the set.

    Returns:
        bool [K], which of the set's people are listed.

    Raises:
        ValueError: a person who stands twice, isn't in the set, or has one image; an empty list.
    """
    listed = np.zeros(len(faces.people), dtype=bool)
    row_of = {person: row for row, person in enumerate(faces.people)}
    for number, line in enumerate(_lines(path), start=1):
        person = line.strip()
        if person not in row_of:
            raise ValueError(f"{path}:{number}: person {person!r} is not in the set")
        if listed[row_of[person]]:
            raise ValueError(f"{path}:{number}: person {person!r} stands twice")
        if faces.num_images[row_of[person]] < 2:
            raise ValueError(f"{path}:{number}: person {person!r} has one image in the set, expected two or more")
        listed[row_of[person]] = True
    if not listed.any():
        raise ValueError(f"{path}: expected names of people, one a line, got an empty file")
    return listed


def _pair_list(path: Path, lines: Sequence[str], num_folds: int, pairs_per_fold: int) -> PairList:
    num_pairs = 2 * num_folds * pairs_per_fold
    if len(lines) - 1 != num_pairs:
        raise ValueError(f"{path}: expected {num_pairs:,} pairs after the first line, got {len(lines) - 1:,}")
    fold, within = np.divmod(np.arange(num_pairs), 2 * pairs_per_fold)
    is_genuine = within < pairs_per_fold
    pairs = tuple(
        _pair(line, bool(genuine), f"{path}:{number}")
        for number, (line, genuine) in enumerate(zip(lines[1:], is_genuine, strict=True), start=2)
    )
    return PairList(path, pairs, is_genuine, fold, num_folds, pairs_per_fold)


def _pair(line: str, genuine: bool, where: str) -> tuple[ImageKey, ImageKey]:
    num_words = 3 if genuine else 4
    words = [word.strip() for word in line.split("\t")]  # between tabs, names may hold blanks
    if len(words) != num_words:
        words = line.split()
    numbers = words[1:3] if genuine else words[1::2]
    if len(words) != num_words or not all(word.isdecimal() for word in numbers):
        expected = "a genuine pair, 'name i j'" if genuine else "an impostor pair, 'name1 i name2 j'"
        raise ValueError(f"{where}: expected {expected}, got {line.strip()!r}")
    first = (words[0], int(numbers[0]))
    second = (words[0] if genuine else words[2], int(numbers[1]))
    if first == second or (not genuine and first[0] == second[0]):
        expected = "two images" if genuine else "two people"
        raise ValueError(f"{where}: expected {expected}, got {line.strip()!r}")
    return first, second


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a text file: {error}") from None
