"""Who is trained on, who is held out, and the pairs that the held-out people are judged by.

Dims: P pairs, M people of a fold.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from facetrain.data.index import ClassTable

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class IdentitySplit:
    """Rows of the class table, ascending and disjoint; excluded identities are in none of them."""

    train: Ints
    """Identities that are trained on; each has `min_images` or more."""
    heldout: Ints
    """Identities that are never trained on; each has two or more images."""
    single: Ints
    """Identities with one image, which can't make a pair and are left out."""
    excluded: Ints
    """Identities that were named and are left out."""
    few: Ints
    """Identities with two or more images, but fewer than training takes, which are left out."""
    min_images: int
    """Images that training takes of an identity at least."""
    unknown_names: tuple[str, ...]
    """Names that were to be excluded and aren't in the set."""

    def describe(self) -> str:
        """Return the counts in words, for the log."""
        few = f", {len(self.few)} with fewer than {self.min_images} images" if self.min_images > 2 else ""
        return (
            f"{len(self.train)} identities are trained on, {len(self.heldout)} held out,"
            f" {len(self.single)} with a single image{few} left out, {len(self.excluded)} excluded"
        )


@dataclass(frozen=True)
class HeldoutPairs:
    """Verification pairs like LFW's: folds share no person, and each has as many genuine as impostor pairs."""

    image_a: Ints
    """Global image numbers, [P]."""
    image_b: Ints
    """Global image numbers, [P]; never the image beside it."""
    is_genuine: npt.NDArray[np.bool_]
    """Whether the two images show one person, [P]."""
    fold: Ints
    """Fold of each pair, from 0, ascending, [P]."""


def split_identities(
    table: ClassTable, *, holdout: int, exclude: Sequence[str], seed: int, min_images: int = 2
) -> IdentitySplit:
    """Divide the identities of the shards.

    Args:
        table: The identities and images of the shards.
        holdout: Identities to hold out, drawn by the seed among those with two or more images.
        exclude: Names of identities to leave out; names that the set doesn't have are returned, for the log.
        seed: 0 or more.
        min_images: Images of an identity that is trained on, 2 or more; those held out don't depend on it.

    Raises:
        ValueError: Fewer identities than `holdout` have two or more images, or the set has none of the names.
    """
    wanted = set(exclude)
    is_excluded, unknown = np.zeros(table.num_identities, dtype=np.bool_), wanted
    if wanted:  # names of millions of identities are decoded only where one is asked for
        is_excluded = np.fromiter((name in wanted for name in table.names), np.bool_, table.num_identities)
        unknown = wanted.difference(table.names)
    if wanted and unknown == wanted:  # numbers instead of names, for one: people of a test would be trained on
        raise ValueError(
            f"data.exclude: the shards have none of these {len(wanted)} identities, such as {exclude[0]!r}; theirs are"
            f" named like {table.names[0]!r}; expected [] where they were left out before"
        )
    num_images = np.diff(table.first_image)
    usable = np.flatnonzero(~is_excluded & (num_images >= 2))
    if holdout > len(usable):
        raise ValueError(
            f"data.holdout_identities: expected at most the {len(usable)} identities with two or more images,"
            f" got {holdout}"
        )
    heldout = np.sort(np.random.default_rng([seed, _HOLDOUT]).choice(usable, holdout, replace=False))
    rest = np.setdiff1d(usable, heldout, assume_unique=True)
    return IdentitySplit(
        train=rest[num_images[rest] >= min_images],
        heldout=heldout,
        single=np.flatnonzero(~is_excluded & (num_images == 1)),
        excluded=np.flatnonzero(is_excluded),
        few=rest[num_images[rest] < min_images],
        min_images=min_images,
        unknown_names=tuple(name for name in exclude if name in unknown),
    )


def heldout_pairs(
    table: ClassTable, heldout: Ints, seed: int, *, num_folds: int = 10, max_pairs: int = 300
) -> HeldoutPairs:
    """Draw the verification pairs of the held-out identities.

    Args:
        table: The identities and images of the shards.
        heldout: Rows of the table, each with two or more images.
        seed: 0 or more; decides folds and pairs.
        num_folds: Folds; people are dealt to them at random.
        max_pairs: Genuine pairs of a fold, and as many impostor pairs; fewer where the fold has no more.

    Raises:
        ValueError: Fewer than two held-out identities for a fold.
    """
    if len(heldout) < 2 * num_folds:
        raise ValueError(
            f"data.holdout_identities: expected at least {2 * num_folds}, two for each of {num_folds} folds of pairs,"
            f" got {len(heldout)}"
        )
    rng = np.random.default_rng([seed, _PAIRS])
    pairs, is_genuine, folds = [], [], []
    for fold, people_M in enumerate(np.array_split(rng.permutation(heldout), num_folds)):
        genuine = _genuine_pairs(table, people_M, max_pairs, rng)
        impostor = _impostor_pairs(table, people_M, len(genuine), rng)
        genuine = genuine[: len(impostor)]
        pairs += [genuine, impostor]
        is_genuine += [True] * len(genuine) + [False] * len(impostor)
        folds += [fold] * (len(genuine) + len(impostor))
    image_a, image_b = np.concatenate(pairs).T
    return HeldoutPairs(image_a, image_b, np.array(is_genuine), np.array(folds, dtype=np.int64))


def _genuine_pairs(table: ClassTable, people_M: Ints, max_pairs: int, rng: np.random.Generator) -> Ints:
    """Draw distinct pairs, [P, 2]: one of each person, then a second of each, and so on, so that nobody dominates."""
    drawn, rounds = [], []
    for person in people_M:
        first, count = table.first_image[person], int(np.diff(table.first_image[person : person + 2])[0])
        num_pairs = count * (count - 1) // 2
        number = rng.choice(num_pairs, min(num_pairs, max_pairs), replace=False)
        # Pair number p of a person is (i, j), i < j, in the order 01, 02, 12, 03, 13, 23 ...: p = j (j - 1) / 2 + i.
        j = ((1 + np.sqrt(1 + 8 * number)) // 2).astype(np.int64)
        drawn.append(first + np.stack([number - j * (j - 1) // 2, j], axis=1))
        rounds.append(np.arange(len(number)))
    by_round = np.argsort(np.concatenate(rounds), kind="stable")[:max_pairs]
    return np.concatenate(drawn)[by_round]


def _impostor_pairs(table: ClassTable, people_M: Ints, max_pairs: int, rng: np.random.Generator) -> Ints:
    """Draw distinct pairs of images, [P, 2]: two different people, then one image of each."""
    counts_M = table.first_image[people_M + 1] - table.first_image[people_M]
    num_pairs = min(max_pairs, (int(counts_M.sum()) ** 2 - int((counts_M**2).sum())) // 2)
    pairs: dict[tuple[int, int], None] = {}
    while len(pairs) < num_pairs:
        a, b = np.sort(rng.choice(len(people_M), 2, replace=False))
        image_a, image_b = (table.first_image[people_M[p]] + rng.integers(counts_M[p]) for p in (a, b))
        pairs[int(image_a), int(image_b)] = None
    return np.array(list(pairs), dtype=np.int64).reshape(-1, 2)


# Streams of random numbers, apart from those that others draw from the same seed.
_HOLDOUT, _PAIRS = 3, 4
