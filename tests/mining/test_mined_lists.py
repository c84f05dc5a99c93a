"""The lists of a round together."""

import numpy as np
import pytest

from facetrain.mining.lists import check_appearances, limit_appearances, mean_overlap


def test_overlap_is_the_mean_over_pairs_of_lists() -> None:
    assert mean_overlap(np.array([[1, 2, 3, 4], [3, 4, 5, 6], [4, 7, 8, 9]])) == pytest.approx((2 + 1 + 1) / 3 / 4)
    assert mean_overlap(np.array([[1, 2]])) == 0


@pytest.mark.parametrize("most", [1, 2, 3])
def test_no_identity_stands_in_more_lists_than_allowed(most: int) -> None:
    rng = np.random.default_rng(most)
    identities = np.arange(100, 160)
    lists = np.stack([rng.permutation(identities[:14])[:10] for _ in range(5)])  # nearly the same ones every time
    limited = limit_appearances(lists, most, identities, rng)
    assert np.unique(limited, return_counts=True)[1].max() == most
    assert all(len(set(one)) == 10 for one in limited.tolist())
    assert np.isin(limited, identities).all()
    assert np.array_equal(limited[:most], lists[:most])  # the first lists that hold an identity keep it
    kept = limited == lists
    for b in range(5):
        for k in np.flatnonzero(~kept[b]):
            assert (limited[:b] == lists[b, k]).sum() == most


def test_lists_within_the_limit_stay() -> None:
    lists = np.arange(12).reshape(3, 4)
    assert np.array_equal(limit_appearances(lists, 1, np.arange(12), np.random.default_rng(0)), lists)


def test_the_least_limit_that_can_be_kept_is_named() -> None:
    check_appearances(2, 5, 10, 30)
    with pytest.raises(ValueError, match=r"mining\.max_appearances: expected at least 2, so that 30 trained .* got 1"):
        check_appearances(1, 5, 10, 30)
    limited = limit_appearances(np.tile(np.arange(10), (5, 1)), 2, np.arange(30), np.random.default_rng(0))
    assert np.unique(limited, return_counts=True)[1].max() == 2
    with pytest.raises(ValueError, match="expected at least 5,"):
        check_appearances(4, 5, 10, 10)  # each of 10 identities stands in each of 5 lists
