"""The identity lists of a round together: how much they share, and how often an identity may stand in them.

Dims: B lists of a round, N identities of a list, I identities that can stand in lists.
"""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def mean_overlap(identities_BN: Ints) -> float:
    """Return the mean share of a list that another list holds too, over all pairs of lists; 0 for a single list.

    Args:
        identities_BN: B lists of N identities, none twice in a list.
    """
    num_lists, length = identities_BN.shape
    if num_lists == 1:
        return 0.0
    # An identity that stands in k lists is shared by k (k - 1) / 2 pairs of lists.
    _, in_lists = np.unique(identities_BN, return_counts=True)
    return float((in_lists * (in_lists - 1)).sum() / (num_lists * (num_lists - 1) * length))


def limit_appearances(identities_BN: Ints, most: int, identities_I: Ints, generator: np.random.Generator) -> Ints:
    """Return the lists with no identity in more than `most` of them.

    The first `most` lists that hold an identity keep it; in later ones a random identity that is still allowed, and
    isn't in the list, takes its place.

    Args:
        identities_BN: B lists of N identities, none twice in a list.
        most: 1 or more; `check_appearances` says whether there are enough identities for it.
        identities_I: all that may stand in lists.
        generator: Draws the replacements.
    """
    limited_BN = identities_BN.copy()
    times = np.zeros(identities_I.max() + 1, dtype=np.int64)
    for list_N in limited_BN:
        spent_N = times[list_N] >= most
        allowed = np.setdiff1d(identities_I[times[identities_I] < most], list_N, assume_unique=True)
        list_N[spent_N] = generator.choice(allowed, spent_N.sum(), replace=False)
        times[list_N] += 1
    return limited_BN


def appearances_needed(num_lists: int, length: int, num_identities: int) -> int:
    """Return in how many of the lists of `length`, at least, some of the identities must be allowed to stand."""
    places_before_last = (num_lists - 1) * length
    return min(num_lists, places_before_last // (num_identities - length + 1) + 1)


def check_appearances(most: int, num_lists: int, length: int, num_identities: int) -> None:
    """Check that lists of `length` can be filled with no identity in more than `most` of them.

    Raises:
        ValueError: Before the last list so many identities could be spent that fewer than `length` were left.
    """
    needed = appearances_needed(num_lists, length, num_identities)
    if most < needed:
        raise ValueError(
            f"mining.max_appearances: expected at least {needed}, so that {num_identities} trained identities fill"
            f" {num_lists} batches of {length}, got {most}"
        )
