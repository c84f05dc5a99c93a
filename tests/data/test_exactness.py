"""The images that reach training are those of the plan, each as often as planned: any ranks, any workers, any stop."""

import numpy as np
import pytest
from numbered_faces import SIDE_PX, number_of, numbered_shards

from facetrain.config import DataConfig
from facetrain.data.loader import PairLoader
from facetrain.data.plan import Plan
from facetrain.data.reading import FaceReader
from facetrain.data.shards import ShardSet

NUM_IDENTITIES, GLOBAL_PAIRS = 23, 8
STEPS = NUM_IDENTITIES  # 23 steps of 8 pairs are 8 epochs of 23 identities


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    return numbered_shards(tmp_path_factory.mktemp("numbered"), [2 + i % 4 for i in range(NUM_IDENTITIES)])


@pytest.fixture(scope="module")
def image_of(shards) -> dict[int, int]:
    """Number that a face shows -> image."""
    reader = FaceReader(shards, config_of(0, "fork"))
    return {int(number_of(reader.face(image))): image for image in range(shards.table.num_images)}


def config_of(workers: int, start_method: str) -> DataConfig:
    return DataConfig(
        shard_px=SIDE_PX, image_px=SIDE_PX, workers=workers, prefetch=2, crop_jitter_px=3, start_method=start_method
    )


def plan_of(shards: ShardSet) -> Plan:
    return Plan(shards.table, np.arange(NUM_IDENTITIES), global_pairs=GLOBAL_PAIRS, seed=11)


def shown(shards, image_of, config, world_size, first_step=0, last_step=STEPS):
    """Labels [steps, N] and images [steps, N, 2] that all ranks together are given, in rank order."""
    labels, images = [], []
    for rank in range(world_size):
        steps = {"first_step": first_step, "last_step": last_step}
        with PairLoader(plan_of(shards), shards, config, rank=rank, world_size=world_size, **steps) as loader:
            batches = list(loader)
        assert [batch.step for batch in batches] == list(range(first_step, last_step))
        labels.append(np.stack([batch.labels_n.numpy() for batch in batches]))
        numbers_SVn = number_of(np.stack([batch.images_VnHWC.numpy() for batch in batches]))
        images.append(np.vectorize(image_of.get)(numbers_SVn).transpose(0, 2, 1))
    return np.concatenate(labels, axis=1), np.concatenate(images, axis=1)


@pytest.mark.parametrize(
    ("workers", "start_method", "world_size"),
    [
        *((workers, "fork", world_size) for workers in (0, 1, 3) for world_size in (1, 2, 4)),
        (1, "spawn", 1),
        pytest.param(3, "spawn", 2, marks=pytest.mark.slow),  # each worker imports torch
    ],
)
def test_training_is_given_the_plan_and_nothing_else(shards, image_of, workers, start_method, world_size):
    config = config_of(workers, start_method)
    stop = int(np.random.default_rng([workers, world_size]).integers(1, STEPS)) if start_method == "fork" else STEPS
    labels_SN, images_SN2 = shown(shards, image_of, config, world_size, last_step=stop)
    if stop < STEPS:  # and on as another number of ranks
        after = shown(shards, image_of, config, {1: 4, 2: 1, 4: 2}[world_size], first_step=stop)
        labels_SN = np.concatenate([labels_SN, after[0]])
        images_SN2 = np.concatenate([images_SN2, after[1]])

    plan = plan_of(shards)
    planned = [plan.step(step) for step in range(STEPS)]
    assert np.array_equal(labels_SN, [step_plan.labels_N for step_plan in planned])
    assert np.array_equal(images_SN2, [step_plan.image_idx_N2 for step_plan in planned])
    # Every identity as often as every other, once in each pass, and never an image twice in a batch.
    assert np.bincount(labels_SN.ravel()).tolist() == [STEPS * GLOBAL_PAIRS // NUM_IDENTITIES] * NUM_IDENTITIES
    passes = np.sort(labels_SN.reshape(-1, NUM_IDENTITIES), axis=1)
    assert np.array_equal(passes, np.tile(np.arange(NUM_IDENTITIES), (len(passes), 1)))
    assert all(len(np.unique(images_N2)) == 2 * GLOBAL_PAIRS for images_N2 in images_SN2)
    assert np.array_equal(np.searchsorted(shards.table.first_image, images_SN2[..., 0], side="right") - 1, labels_SN)
