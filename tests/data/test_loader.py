import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from commands import run
from drawn_faces import augmented

from facetrain.config import DataConfig
from facetrain.data.decode import decode_face
from facetrain.data.loader import PairLoader
from facetrain.data.pack import pack
from facetrain.data.plan import Plan
from facetrain.data.shards import ShardSet

COUNTS = [2, 3, 4] * 8
SHARD_PX = 24
AUGMENTED = {"crop_jitter_px": 2, "colour_jitter": 0.2}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three shards of noise."""
    folder = tmp_path_factory.mktemp("loader")
    rng = np.random.default_rng(0)
    for person, count in enumerate(COUNTS):
        (folder / f"faces/person{person}").mkdir(parents=True)
        for k in range(count):
            pixels = rng.integers(0, 256, (SHARD_PX, SHARD_PX, 3), dtype=np.uint8)
            cv2.imwrite(str(folder / f"faces/person{person}/{k}.jpg"), pixels)
    pack([folder / "faces"], folder / "shards", image_px=SHARD_PX, images_per_shard=30, workers=1)
    return ShardSet.open(folder / "shards")


def plan_of(shards, mined=None):
    plan = Plan(shards.table, np.arange(len(COUNTS)), global_pairs=8, seed=3)
    for step, labels in (mined or {}).items():
        plan.add_mined(step, labels[None])
    return plan


def config_of(workers=0, prefetch=2, **changes):
    return DataConfig(shard_px=SHARD_PX, image_px=16, workers=workers, prefetch=prefetch, **changes)


def loader_of(plan, shards, config, first_step=0, last_step=10, rank=0, world_size=1):
    return PairLoader(
        plan, shards, config, rank=rank, world_size=world_size, first_step=first_step, last_step=last_step
    )


def batches_of(*args, **kwargs):
    with loader_of(*args, **kwargs) as loader:
        return list(loader)


def same(a, b):
    return a.step == b.step and torch.equal(a.labels_n, b.labels_n) and torch.equal(a.images_VnHWC, b.images_VnHWC)


def all_same(batches_a, batches_b):
    return all(same(a, b) for a, b in zip(batches_a, batches_b, strict=True))


def test_batch_holds_the_planned_images(shards):
    config = config_of(**AUGMENTED)
    for batch in batches_of(plan_of(shards), shards, config, last_step=4):
        step_plan = plan_of(shards).step(batch.step)
        assert batch.images_VnHWC.shape == (2, 8, 16, 16, 3)
        assert batch.images_VnHWC.dtype == torch.uint8
        assert batch.labels_n.tolist() == step_plan.labels_N.tolist()
        for pair in range(8):
            for view in range(2):
                data = shards.read(step_plan.image_idx_N2[pair, view])
                expected = augmented(data, config, int(step_plan.augment_seeds_N2[pair, view]))
                assert np.array_equal(batch.images_VnHWC[view, pair].numpy(), expected)


def test_augmentation_off_gives_the_images_of_evaluation(shards):
    config = config_of(mirror=False, colour="grey")
    (batch,) = batches_of(plan_of(shards), shards, config, last_step=1)
    for pair, images in enumerate(plan_of(shards).step(0).image_idx_N2):
        for view, image in enumerate(images):
            expected = decode_face(shards.read(image), config, "a")
            assert np.array_equal(batch.images_VnHWC[view, pair].numpy(), expected)


def test_workers_change_no_pixel(shards):
    alone = batches_of(plan_of(shards), shards, config_of(**AUGMENTED))
    assert [b.step for b in alone] == list(range(10))
    for workers in (1, 2):
        assert all_same(batches_of(plan_of(shards), shards, config_of(workers, **AUGMENTED)), alone)


def test_ranks_together_hold_the_batch_of_one_process(shards):
    whole = batches_of(plan_of(shards), shards, config_of(**AUGMENTED))
    for world_size in (2, 4):
        ranks = [
            batches_of(plan_of(shards), shards, config_of(**AUGMENTED), rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        for batch, *parts in zip(whole, *ranks, strict=True):
            assert torch.equal(batch.labels_n, torch.cat([p.labels_n for p in parts]))
            assert torch.equal(batch.images_VnHWC, torch.cat([p.images_VnHWC for p in parts], dim=1))


MINED = np.array([[0, 1, 2, 3, 4, 5, 6, 7], [0, 2, 4, 6, 8, 10, 12, 14], [1, 3, 5, 7, 9, 11, 13, 15]])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("stop", [3, 7, 8])
def test_resume_equals_the_uninterrupted_stream(shards, workers, stop):
    """Steps 7 to 9 are mined: their lists are pending at a stop at step 3, partly used at a stop at step 8."""
    plan = plan_of(shards)
    plan.add_mined(7, MINED)
    uninterrupted = batches_of(plan, shards, config_of(**AUGMENTED), last_step=14)

    stopped = plan_of(shards)
    stopped.add_mined(7, MINED)
    with loader_of(stopped, shards, config_of(workers, **AUGMENTED), last_step=14) as loader:
        before = [next(loader) for _ in range(stop)]
    resumed = plan_of(shards, stopped.pending(stop))
    after = batches_of(resumed, shards, config_of(workers, **AUGMENTED), first_step=stop, last_step=14)
    assert all_same(before + after, uninterrupted)


@pytest.mark.parametrize(("workers", "prefetch"), [(0, 2), (1, 1), (1, 4), (2, 1), (2, 2)])
def test_loader_draws_just_so_far_ahead(shards, workers, prefetch):
    """Before `next` for step s, the plan is drawn below s + workers * prefetch: lists from there on take effect."""
    first, ahead = 5, workers * prefetch
    plan = plan_of(shards)
    with loader_of(plan, shards, config_of(workers, prefetch), first, last_step=60) as loader:
        assert loader.first_undrawn_step == first
        labels = {}
        for step in range(first, first + 20):
            if step > first:
                assert loader.first_undrawn_step == step + ahead
            if step == first + 3:
                plan.add_mined(step + ahead, MINED)  # the earliest that takes effect
            if step == first + 10:
                plan.add_mined(step + ahead - 1, MINED[:1])  # one too early: drawn already where there are workers
            labels[step] = next(loader).labels_n.tolist()
            assert loader.first_undrawn_step == step + ahead + 1
        earliest, late = first + 3 + ahead, first + 9 + ahead
        assert [labels[earliest + b] for b in range(len(MINED))] == MINED.tolist()
        assert labels[late] == plan_of(shards).step(late).labels_N.tolist()


@pytest.fixture
def damaged(shards, tmp_path):
    """Return shards where the first image of step 2's second pair is overwritten, and a pattern of its place."""
    folder = shutil.copytree(shards.folder, tmp_path / "shards")
    image = int(plan_of(shards).step(2).image_idx_N2[1, 0])
    tar, _, member = shards.where(image).partition(": ")
    content = Path(tar).read_bytes()
    face = shards.read(image)
    (folder / Path(tar).name).write_bytes(content.replace(face, bytes(len(face))))
    place = rf"{re.escape(str(folder / Path(tar).name))}: {member}: image {image}"
    return ShardSet.open(folder), rf"^{place}: expected an image, got {len(face)} bytes[^\n]*$"


@pytest.mark.parametrize("workers", [0, 2])
def test_image_that_is_none_is_named_in_one_line(damaged, workers):
    damaged_shards, message = damaged
    loader = loader_of(plan_of(damaged_shards), damaged_shards, config_of(workers))
    assert [next(loader).step, next(loader).step] == [0, 1]
    with pytest.raises(ValueError, match=message):
        next(loader)
    assert not multiprocessing.active_children()


def test_shard_that_shrinks_while_it_is_read_is_named(damaged):
    damaged_shards, _ = damaged
    for tar in damaged_shards.folder.glob("*.tar"):
        os.truncate(tar, 600)
    loader = loader_of(plan_of(damaged_shards), damaged_shards, config_of(1))
    with pytest.raises(ValueError, match=r"^[^\n]*shard-\d{6}\.tar: truncated: [^\n]*$"):
        next(loader)


_NEXT_OF_LOADER = """
import sys
from pathlib import Path
import numpy as np
from facetrain.config import DataConfig
from facetrain.data.loader import PairLoader
from facetrain.data.plan import Plan
from facetrain.data.shards import ShardSet
shards = ShardSet.open(Path(sys.argv[1]))
plan = Plan(shards.table, np.arange(24), global_pairs=8, seed=0)
loader = PairLoader(plan, shards, DataConfig(image_px=16), rank=0, world_size=1, first_step=0, last_step=10)
try:
    next(loader)
except ValueError as error:
    print(error)
"""


def test_too_little_shared_memory_is_named(shards):
    small = 'mount -t tmpfs -o size=32k none /dev/shm && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", small, "sh"]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("a small file system can't be mounted")
    done = run(*command, sys.executable, "-c", _NEXT_OF_LOADER, str(shards.folder))
    assert re.fullmatch(
        r"data\.prefetch: expected 61440 bytes of shared memory for 5 batches \(data\.workers = 1, data\.prefetch = 4\)"
        r": .*No space left on device.*; fewer need less, and a container has as much as its --shm-size\n",
        done.stdout,
    ), done


def test_close_leaves_no_worker(shards):
    loader = loader_of(plan_of(shards), shards, config_of(2), last_step=1000)
    next(loader)
    assert len(multiprocessing.active_children()) == 2
    loader.close()
    assert not multiprocessing.active_children()
    with pytest.raises(StopIteration):
        next(loader)


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_outlive_the_signal_that_ends_a_job(shards, start_method, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # numpy's threads in a spawned worker, to which it may go too
    with loader_of(plan_of(shards), shards, config_of(1, start_method=start_method), last_step=30) as loader:
        next(loader)
        (worker,) = multiprocessing.active_children()
        # Not from this process, whose word they obey.
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
        assert [b.step for b in loader] == list(range(1, 30))


def test_worker_of_a_loader_that_was_never_closed_ends_with_the_program(shards):
    loader = loader_of(plan_of(shards), shards, config_of(1), last_step=1000)
    next(loader)
    (worker,) = multiprocessing.active_children()
    worker.terminate()  # as multiprocessing does at exit
    worker.join(timeout=10)
    assert worker.exitcode == 0
    loader.close()


def test_loader_leaves_the_global_generator_alone(shards):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches_of(plan_of(shards), shards, config_of(1), last_step=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_wait_is_measured(shards):
    with loader_of(plan_of(shards), shards, config_of(0)) as loader:
        next(loader)
        assert loader.wait_s > 0


def test_uneven_world_size_is_refused_before_any_worker_starts(shards):
    with pytest.raises(ValueError, match=r"train\.global_pairs: expected a multiple of the 3 processes, got 8"):
        loader_of(plan_of(shards), shards, config_of(1), world_size=3)
