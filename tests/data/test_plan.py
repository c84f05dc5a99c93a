import time

import numpy as np
import pytest

from facetrain.data.index import ClassTable
from facetrain.data.plan import Plan, StepPlan, count_draws, pairs_per_rank


def table_of(image_counts):
    names = tuple(f"person{i}" for i in range(len(image_counts)))
    return ClassTable(names=names, first_image=np.concatenate([[0], np.cumsum(image_counts)]).astype(np.int64))


def people(table, images):
    return np.searchsorted(table.first_image, images, side="right") - 1


def plan_of(num_identities, global_pairs, seed=7):
    table = table_of([2 + i % 5 for i in range(num_identities)])
    return Plan(table, np.arange(num_identities), global_pairs=global_pairs, seed=seed)


def same(a: StepPlan, b: StepPlan) -> bool:
    return (
        a.step == b.step
        and np.array_equal(a.labels_N, b.labels_N)
        and np.array_equal(a.image_idx_N2, b.image_idx_N2)
        and np.array_equal(a.augment_seeds_N2, b.augment_seeds_N2)
    )


SIZES = [(8, 8), (9, 8), (11, 8), (15, 8), (16, 8), (17, 8), (100, 7), (64, 16), (3, 2)]


@pytest.mark.parametrize(("num_identities", "global_pairs"), SIZES)
def test_stream_holds_every_identity_once_per_pass(num_identities, global_pairs):
    plan = plan_of(num_identities, global_pairs)
    passes = 6
    steps = -(-passes * num_identities // global_pairs)
    stream = np.concatenate([plan.step(s).labels_N for s in range(steps)])[: passes * num_identities]
    in_order = np.sort(stream.reshape(passes, num_identities), axis=1)
    assert np.array_equal(in_order, np.tile(np.arange(num_identities), (passes, 1)))


@pytest.mark.parametrize(("num_identities", "global_pairs"), SIZES)
def test_no_identity_and_no_image_stands_twice_in_a_batch(num_identities, global_pairs):
    plan = plan_of(num_identities, global_pairs)
    for step in range(60):
        step_plan = plan.step(step)
        assert len(np.unique(step_plan.labels_N)) == global_pairs
        assert len(np.unique(step_plan.image_idx_N2)) == 2 * global_pairs


def test_images_are_those_of_the_identity_and_all_pairs_come_up():
    plan = plan_of(5, 5)
    seen = set()
    for step in range(400):
        step_plan = plan.step(step)
        first = plan.table.first_image[step_plan.labels_N][:, None]
        end = plan.table.first_image[step_plan.labels_N + 1][:, None]
        assert ((first <= step_plan.image_idx_N2) & (step_plan.image_idx_N2 < end)).all()
        seen |= {tuple(pair) for pair in step_plan.image_idx_N2.tolist()}
    assert len(seen) == sum(c * (c - 1) for c in (2, 3, 4, 5, 6))


@pytest.mark.parametrize(("num_identities", "global_pairs"), SIZES)
def test_any_step_is_the_same_in_any_order(num_identities, global_pairs):
    plan = plan_of(num_identities, global_pairs)
    in_order = [plan.step(s) for s in range(50)]
    again = plan_of(num_identities, global_pairs)
    for step in np.random.default_rng(0).permutation(50).tolist():
        assert same(again.step(step), in_order[step])
    for step in (0, 23, 49):
        assert same(plan_of(num_identities, global_pairs).step(step), in_order[step])


def test_another_seed_gives_another_stream():
    a, b = plan_of(50, 10, seed=1).step(0), plan_of(50, 10, seed=2).step(0)
    assert not np.array_equal(a.labels_N, b.labels_N)
    assert not np.array_equal(a.augment_seeds_N2, b.augment_seeds_N2)


def test_permutations_differ_from_epoch_to_epoch():
    plan = plan_of(20, 20)
    assert not np.array_equal(plan.step(0).labels_N, plan.step(1).labels_N)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_union_of_the_ranks_is_the_plan(world_size):
    step_plan = plan_of(30, 8).step(5)
    slices = [step_plan.slice(rank, world_size) for rank in range(world_size)]
    union = StepPlan(
        5,
        np.concatenate([s.labels_N for s in slices]),
        np.concatenate([s.image_idx_N2 for s in slices]),
        np.concatenate([s.augment_seeds_N2 for s in slices]),
    )
    assert same(union, step_plan)


def test_mined_lists_make_their_batches_and_no_others():
    plan, random = plan_of(30, 4), plan_of(30, 4)
    plan.add_mined(3, np.array([[1, 2, 3, 4], [9, 8, 7, 6]]))
    assert plan.step(3).labels_N.tolist() == [1, 2, 3, 4]
    assert plan.step(4).labels_N.tolist() == [9, 8, 7, 6]
    assert all(same(plan.step(s), random.step(s)) for s in (0, 1, 2, 5, 6, 7))


def test_pending_lists_restore_the_stream_and_trained_ones_are_forgotten():
    plan = plan_of(30, 4)
    plan.add_mined(3, np.array([[1, 2, 3, 4], [9, 8, 7, 6]]))
    resumed = plan_of(30, 4)
    for step, labels in plan.pending(4).items():
        resumed.add_mined(step, labels[None])
    assert all(same(plan.step(s), resumed.step(s)) for s in range(4, 9))
    plan.forget_before(4)
    assert list(plan.pending(0)) == [4]


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([[1, 2, 2, 3]], "mined lists of steps from 5: name an identity twice in a batch"),
        ([[1, 2, 3, 29]], "mined lists of steps from 5: name an identity that isn't trained on"),
        ([[1, 2, 3, -1]], "mined lists of steps from 5: name an identity that isn't trained on"),
        ([[1, 2, 3, 30]], "mined lists of steps from 5: name an identity that isn't trained on"),
        ([[1, 2, 3]], r"mined lists: expected \[batches, 4\], got \[1, 3\]"),
    ],
)
def test_unusable_mined_lists_are_refused(lists, message):
    plan = Plan(table_of([2] * 30), np.arange(29), global_pairs=4, seed=0)
    with pytest.raises(ValueError, match=message):
        plan.add_mined(5, np.array(lists))


def test_a_mined_identity_with_one_image_is_named():
    plan = Plan(table_of([2, 3, 1, 4, 2]), np.array([0, 1, 3, 4]), global_pairs=2, seed=0)
    with pytest.raises(ValueError, match="mined lists of steps from 5: name 'person2', which has one image; expected"):
        plan.add_mined(5, np.array([[0, 1], [3, 2]]))


@pytest.mark.parametrize("images_per_identity", [4, 6])
def test_an_identity_gives_k_different_images_to_a_batch(images_per_identity):
    table, of_each = table_of([6, 7, 12, 6, 9, 30, 6, 6, 8, 6, 11]), images_per_identity // 2
    plan = Plan(table, np.arange(11), global_pairs=12, seed=1, images_per_identity=images_per_identity)
    drawn = np.zeros(11, dtype=np.int64)
    for step in range(11):
        step_plan = plan.step(step)
        rows = step_plan.labels_N.reshape(-1, of_each)
        assert (rows == rows[:, :1]).all()
        assert len(np.unique(rows)) == len(rows) == 12 // of_each == plan.identities_per_batch
        assert len(np.unique(step_plan.image_idx_N2)) == 24
        assert (people(table, step_plan.image_idx_N2) == step_plan.labels_N[:, None]).all()
        count_draws(drawn, step_plan)
        by_rank = [step_plan.slice(rank, 4) for rank in range(4)]
        assert np.array_equal(np.concatenate([part.image_idx_N2 for part in by_rank]), step_plan.image_idx_N2)
    assert (drawn == plan.identities_per_batch).all()  # each once in a pass
    again = Plan(table, np.arange(11), global_pairs=12, seed=1, images_per_identity=images_per_identity)
    assert same(again.step(7), plan.step(7))


def test_all_images_of_an_identity_are_drawn_alike():
    plan = Plan(table_of([5, 9]), np.arange(2), global_pairs=4, seed=0, images_per_identity=4)
    counts = sum(np.bincount(plan.step(step).image_idx_N2.ravel(), minlength=14) for step in range(2000))
    assert abs(counts[:5] / 2000 - 4 / 5).max() < 0.05
    assert abs(counts[5:] / 2000 - 4 / 9).max() < 0.05


def test_too_few_identities_with_k_images_are_refused():
    message = (
        r"train\.images_per_identity: 12 identities with 4 images each make train\.global_pairs = 24 pairs, but only 11"
    )
    with pytest.raises(ValueError, match=message):
        Plan(table_of([4] * 11), np.arange(11), global_pairs=24, seed=0, images_per_identity=4)


def test_more_pairs_than_identities_is_refused():
    with pytest.raises(ValueError, match=r"train\.global_pairs: expected at most the 9 identities .* got 10"):
        plan_of(9, 10)


def test_uneven_world_size_is_refused():
    assert pairs_per_rank(12, 3) == 4
    with pytest.raises(ValueError, match=r"train\.global_pairs: expected a multiple of the 5 processes, got 12"):
        pairs_per_rank(12, 5)


def test_steps_per_epoch_rounds_up():
    assert plan_of(16, 8).steps_per_epoch == 2
    assert plan_of(17, 8).steps_per_epoch == 3


def test_draws_are_counted_by_identity():
    plan = plan_of(10, 5)
    draws = np.zeros(10, dtype=np.int64)
    for step in range(4):
        count_draws(draws, plan.step(step))
    assert draws.tolist() == [2] * 10


def test_large_batch_of_two_million_identities_is_planned_in_milliseconds():
    table = ClassTable(names=("",) * 2_000_000, first_image=np.arange(0, 40_000_001, 20, dtype=np.int64))
    plan = Plan(table, np.arange(2_000_000), global_pairs=4096, seed=0)
    plan.step(0)
    started_at = time.process_time()
    for step in range(1, 21):
        plan.step(step)
    assert (time.process_time() - started_at) / 20 < 0.005
