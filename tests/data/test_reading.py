"""What stands in for an image that can't be decoded."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numbered_faces import SIDE_PX, damage, number_of, numbered_shards

from facetrain.config import DataConfig
from facetrain.data.augment import Augmentation
from facetrain.data.loader import PairLoader
from facetrain.data.plan import Plan
from facetrain.data.reading import FaceReader
from facetrain.data.shards import ShardSet

COUNTS = [2, 3, 4, 5] * 4


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    return numbered_shards(tmp_path, COUNTS)


def config_of(**changes: object) -> DataConfig:
    settings = {"on_bad_image": "skip", "mirror": False, "workers": 0} | changes
    return DataConfig(shard_px=SIDE_PX, image_px=SIDE_PX, **settings)  # type: ignore[arg-type]


def of_identity(shards: ShardSet, count: int) -> list[int]:
    """The images of the first identity with so many."""
    label = np.diff(shards.table.first_image).tolist().index(count)
    return list(range(*shards.table.first_image[label : label + 2].tolist()))


def numbers(shards: ShardSet) -> list[int]:
    """The number that each image of the shards shows."""
    reader = FaceReader(shards, config_of())
    return [int(number_of(reader.face(image))) for image in range(shards.table.num_images)]


def pair_of(reader: FaceReader, images: Sequence[int]) -> tuple[np.ndarray, list[str]]:
    out = np.empty((2, SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    changes = (Augmentation(mirrored=True), Augmentation())
    return out, reader.pairs(np.array([images]), changes, out[:, None])


def test_the_next_image_of_the_identity_stands_in(shards: ShardSet) -> None:
    shows = numbers(shards)
    a, b, c, d = of_identity(shards, 4)
    reader = FaceReader(damage(shards, [a, c]), config_of())
    assert number_of(reader.face(a)) == shows[b]
    assert number_of(reader.face(c)) == shows[d]
    for asked, shown in (((a, b), (d, b)), ((a, d), (b, d)), ((a, c), (b, d)), ((c, a), (d, b)), ((c, d), (b, d))):
        faces, replaced = pair_of(reader, asked)
        assert number_of(faces).tolist() == [shows[image] for image in shown]
        places = [shards.where(image) for image in asked if image in (a, c)]
        assert [line.partition(": image")[0] for line in replaced] == places
        assert all(line.endswith(" stands in") for line in replaced)


def test_a_pair_without_a_third_image_shows_one_twice(shards: ShardSet) -> None:
    shows = numbers(shards)
    a, b = of_identity(shards, 2)
    reader = FaceReader(damage(shards, [a]), config_of())
    for asked in ((a, b), (b, a)):
        faces, replaced = pair_of(reader, asked)
        assert number_of(faces).tolist() == [shows[b]] * 2
        assert len(replaced) == 1


def test_an_identity_without_a_readable_image_is_named(shards: ShardSet) -> None:
    images = of_identity(shards, 3)
    damaged = damage(shards, images)
    reader = FaceReader(damaged, config_of())
    for read in (lambda: reader.face(images[1]), lambda: pair_of(reader, images[:2])):
        with pytest.raises(
            ValueError, match=r"^[^\n]*\.tar: \d+_\d+\.jpg: image \d+: .*; nor can any other image of it"
        ):
            read()
    with pytest.raises(ValueError, match=r"can't be decoded$"):
        FaceReader(damaged, config_of(on_bad_image="error")).face(images[0])


def test_a_shard_that_is_cut_off_ends_the_run_all_the_same(shards: ShardSet) -> None:
    for tar in shards.folder.glob("*.tar"):
        os.truncate(tar, 600)
    with pytest.raises(ValueError, match=r"shard-\d{6}\.tar: truncated"):
        FaceReader(shards, config_of()).face(0)


def test_ranks_and_workers_replace_the_same(shards: ShardSet) -> None:
    """Every fourth image is damaged: labels stay those of the plan, and W and workers change nothing."""
    bad = [image for image in range(0, shards.table.num_images, 4)]
    damaged = damage(shards, bad)
    plan = Plan(damaged.table, np.arange(len(COUNTS)), global_pairs=8, seed=5)
    asked = np.concatenate([plan.step(step).image_idx_N2 for step in range(6)])
    found = {}
    for world_size, workers in ((1, 0), (2, 0), (4, 0), (1, 2), (2, 1)):
        steps, replaced = {step: ([], []) for step in range(6)}, 0
        for rank in range(world_size):
            config = config_of(workers=workers, crop_jitter_px=2)
            kwargs = {"rank": rank, "world_size": world_size, "first_step": 0, "last_step": 6}
            with PairLoader(plan, damaged, config, **kwargs) as loader:
                for batch in loader:
                    steps[batch.step][0].append(batch.labels_n.numpy())
                    steps[batch.step][1].append(batch.images_VnHWC.numpy())
                    replaced += len(batch.replaced)
        assert replaced == np.isin(asked, bad).sum() > 0
        for step, (labels, _) in steps.items():
            assert np.concatenate(labels).tolist() == plan.step(step).labels_N.tolist()
        found[world_size, workers] = b"".join(np.concatenate(faces, axis=1).tobytes() for _, faces in steps.values())
    assert len(set(found.values())) == 1
