import numpy as np
import pytest

from facetrain.data.index import ClassTable
from facetrain.data.split import heldout_pairs, split_identities


def table_of(image_counts):
    names = tuple(f"person{i}" for i in range(len(image_counts)))
    return ClassTable(names=names, first_image=np.concatenate([[0], np.cumsum(image_counts)]).astype(np.int64))


MIXED = table_of([1, 2, 5, 3, 1, 2, 40, 2, 6, 2, 3, 2])


def test_every_identity_falls_into_one_part():
    split = split_identities(MIXED, holdout=3, exclude=["person2", "nobody", "person4"], seed=1)
    parts = [split.train, split.heldout, split.single, split.excluded]
    assert sorted(np.concatenate(parts).tolist()) == list(range(12))
    assert split.single.tolist() == [0]
    assert split.excluded.tolist() == [2, 4]
    assert split.unknown_names == ("nobody",)
    assert len(split.heldout) == 3


def test_identities_with_few_images_are_left_out_and_the_held_out_stay_who_they_are():
    split, all_of_them = (split_identities(MIXED, holdout=3, exclude=(), seed=1, min_images=m) for m in (5, 2))
    assert split.heldout.tolist() == all_of_them.heldout.tolist()
    assert set(split.train) | set(split.few) == set(all_of_them.train)
    counts = np.diff(MIXED.first_image)
    assert counts[split.train].min() >= 5 > counts[split.few].max()
    assert f"{len(split.few)} with fewer than 5 images left out" in split.describe()


def test_seed_decides_who_is_held_out():
    table = table_of([2] * 100)
    drawn = [split_identities(table, holdout=10, exclude=(), seed=s).heldout.tolist() for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_too_many_held_out_are_refused():
    with pytest.raises(ValueError, match=r"data\.holdout_identities: expected at most the 10 identities .* got 11"):
        split_identities(MIXED, holdout=11, exclude=(), seed=0)


def test_names_of_which_the_set_has_none_are_refused():
    with pytest.raises(
        ValueError, match=r"data\.exclude: the shards have none of these 2 identities, such as '0166921'"
    ):
        split_identities(MIXED, holdout=1, exclude=["0166921", "nobody"], seed=0)


def people(table, images):
    return np.searchsorted(table.first_image, images, side="right") - 1


@pytest.mark.parametrize("image_counts", [[2] * 40, [2, 3, 30] * 10, [2, 9] * 10])
def test_pairs_are_like_those_of_lfw(image_counts):
    table = table_of(image_counts)
    heldout = np.arange(len(image_counts))
    pairs = heldout_pairs(table, heldout, seed=3, max_pairs=20)
    a, b = people(table, pairs.image_a), people(table, pairs.image_b)
    assert np.array_equal(a == b, pairs.is_genuine)
    assert (pairs.image_a != pairs.image_b).all()
    unordered = np.sort(np.stack([pairs.image_a, pairs.image_b], axis=1), axis=1)
    assert len(np.unique(unordered, axis=0)) == len(unordered)
    in_fold = [set(a[pairs.fold == f]) | set(b[pairs.fold == f]) for f in range(10)]
    assert sum(len(s) for s in in_fold) == len(set().union(*in_fold))
    for fold in range(10):
        genuine = pairs.is_genuine[pairs.fold == fold]
        assert 0 < genuine.sum() == (~genuine).sum() <= 20


def test_few_images_give_all_their_genuine_pairs():
    pairs = heldout_pairs(table_of([4] * 30), np.arange(30), seed=0)
    assert pairs.is_genuine.sum() == 30 * 6


def test_people_with_many_images_do_not_dominate():
    table = table_of([2, 50] * 10)
    pairs = heldout_pairs(table, np.arange(20), seed=0, num_folds=2, max_pairs=40)
    who, counts = np.unique(people(table, pairs.image_a[pairs.is_genuine]), return_counts=True)
    assert len(who) == 20
    assert counts.max() <= 9


def test_pairs_are_the_same_for_the_same_seed():
    table = table_of([3] * 40)
    a, b, c = (heldout_pairs(table, np.arange(40), seed=s) for s in (5, 5, 6))
    assert np.array_equal(a.image_a, b.image_a)
    assert np.array_equal(a.image_b, b.image_b)
    assert not np.array_equal(a.image_a, c.image_a)


def test_too_few_held_out_for_the_folds_are_refused():
    with pytest.raises(ValueError, match=r"data\.holdout_identities: expected at least 20, .* got 19"):
        heldout_pairs(table_of([2] * 30), np.arange(19), seed=0)
