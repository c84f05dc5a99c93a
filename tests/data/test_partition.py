"""Shards on disks of their own: who has what is checked, and every rank reads what it has and nothing else."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from distributed.ranks import run_ranks
from numbered_faces import SIDE_PX, numbered_shards

from facetrain.config import Config, DataConfig, MiningConfig, TrainConfig
from facetrain.data.index import ClassTable
from facetrain.data.loader import PairLoader
from facetrain.data.manifest import ShardInfo
from facetrain.data.partition import Held, PartitionedPlan, agree_on_parts
from facetrain.data.shards import ShardSet
from facetrain.data.split import split_identities
from facetrain.inputs import Inputs, share_out
from facetrain.world import World

SIZES = [5, 9, 6, 13, 8, 7]
PARTS = [(0, 3), (1, 2, 4, 5)]
SHARDS = [ShardInfo(name=f"s{i}.tar", size_bytes=1, sha256="", images=3 * n, identities=n) for i, n in enumerate(SIZES)]
OWN = [np.concatenate([np.arange(sum(SIZES[:s]), sum(SIZES[: s + 1])) for s in part]) for part in PARTS]


def plan_of(parts: list[tuple[int, ...]] = PARTS, *, pairs: int = 8, seed: int = 3) -> PartitionedPlan:
    table = ClassTable(names=("",) * sum(SIZES), first_image=np.arange(0, 3 * sum(SIZES) + 1, 3))
    identities = np.arange(sum(SIZES))
    return PartitionedPlan(table, identities, global_pairs=pairs, seed=seed, shards=SHARDS, parts=parts)


def test_each_part_gives_its_rows_and_each_of_its_identities_once_in_a_pass() -> None:
    plan = plan_of()
    assert plan.steps_per_epoch == 8  # 30 identities, 4 at a time
    steps = [plan.step(step) for step in range(18 * 30)]
    for v, own in enumerate(OWN):
        drawn = np.concatenate([step_plan.labels_N[4 * v : 4 * v + 4] for step_plan in steps])
        passes = np.sort(drawn[: len(drawn) // len(own) * len(own)].reshape(-1, len(own)), axis=1)
        assert np.array_equal(passes, np.tile(own, (len(passes), 1)))
    assert all(len(np.unique(step_plan.image_idx_N2)) == 16 for step_plan in steps)
    again = plan_of()
    for step in (500, 3, 77):
        assert np.array_equal(again.step(step).labels_N, steps[step].labels_N)
    assert plan.describe() == (
        "2 parts of the shards, each read by the ranks that hold it; an identity is drawn every 4.50 to 7.50 steps"
    )


def test_nodes_that_change_places_draw_the_same() -> None:
    plan, swapped = plan_of(), plan_of(PARTS[::-1])
    for step in range(20):
        assert np.array_equal(np.roll(plan.step(step).labels_N, 4), swapped.step(step).labels_N)
    mined = np.concatenate([OWN[0][:4], OWN[1][:4]])[None]
    plan.add_mined(3, mined)
    swapped.add_mined(3, plan.pending(0)[3][None])
    assert np.array_equal(swapped.step(3).labels_N, np.roll(mined[0], 4))


def test_mined_lists_take_as_many_of_each_part() -> None:
    with pytest.raises(
        ValueError, match=r"^mined lists of steps from 5: expected 4 identities of each of 2 parts; were"
    ):
        plan_of().add_mined(5, np.concatenate([OWN[0][:5], OWN[1][:3]])[None])
    with pytest.raises(ValueError, match="name an identity twice"):
        plan_of().add_mined(5, np.repeat(OWN[0][:4], 2)[None])


def test_parts_that_cannot_give_their_share_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^train\.global_pairs: expected a multiple of the 2 parts .* got 9$"):
        plan_of(pairs=9)
    with pytest.raises(ValueError, match=r"^data\.partitioned: expected at least 20 .* got 18 in that of s0\.tar$"):
        plan_of(pairs=40)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([(0, 1), (1, 2)], r"each shard in one part, s1\.tar is on n0 and on n1, whose other shards differ$"),
        ([(0, 1, 2), (2,)], r"each shard in one part, s2\.tar is on n0 and on n1, whose"),
        ([(0,), (1,)], r"every shard of the manifest on a node, s2\.tar of 3 on none of n0, n1$"),
        ([(2,), (2,)], r"every shard of the manifest on a node, s0\.tar and 1 more of 3 on none of n0, n1$"),
        ([(0, 1), (0, 1), (2,)], r"as many ranks in each part, .* got \[2, 1\] ranks for the 2 parts, .* n0, n1, n2$"),
        ([(0, 1), (2,), (0, 1), (2,)], r"as many ranks in each part, one after another, got \[2, 2\] ranks"),
        ([(0, 1, 2), ()], r"shards of the manifest on every node, n1 has none$"),
    ],
)
def test_disks_that_do_not_make_up_the_manifest_are_named(held: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^data\.partitioned: expected {message}"):
        agree_on_parts([Held(f"n{rank}", shards) for rank, shards in enumerate(held)], SHARDS[:3])


def test_parts_are_in_the_order_of_the_ranks() -> None:
    held = [Held("a", (1, 2)), Held("a", (1, 2)), Held("b", (0,)), Held("b", (0,))]
    assert agree_on_parts(held, SHARDS[:3]) == [(1, 2), (0,)]
    assert agree_on_parts([Held("a", (0, 1, 2)), Held("b", (0, 1, 2))], SHARDS[:3]) == [(0, 1, 2)]


def config_of(folder: Path) -> Config:
    data = DataConfig(shards=str(folder), partitioned=True, shard_px=SIDE_PX, image_px=SIDE_PX, workers=0)
    return Config(data=data, train=TrainConfig(global_pairs=8), mining=MiningConfig(mode="off"))


def batches_of_a_rank(world: World, folders: list[Path]) -> tuple[list[np.ndarray], list[np.ndarray]] | str:
    """What a rank is given, from the folder of its node, whose other shards aren't there."""
    folder = folders[world.rank * len(folders) // world.world_size]
    config, shards = config_of(folder), ShardSet.open(folder, may_lack=True)
    split = split_identities(shards.table, holdout=0, exclude=(), seed=0)
    try:
        inputs = share_out(Inputs(shards=shards, split=split, plan=None, judge=None), config, world)  # type: ignore[arg-type]
    except ValueError as error:
        return str(error)
    ranks = {"rank": world.rank, "world_size": world.world_size, "first_step": 0, "last_step": 12}
    with PairLoader(inputs.plan, shards, config.data, **ranks) as loader:
        batches = list(loader)
    return [b.labels_n.numpy() for b in batches], [b.images_VnHWC.numpy() for b in batches]


@pytest.mark.slow
def test_two_nodes_read_what_they_have_whatever_the_number_of_ranks(tmp_path: Path) -> None:
    whole = numbered_shards(tmp_path, [5] * 48)
    folders = [tmp_path / "node0", tmp_path / "node1"]
    for node, folder in enumerate(folders):
        shutil.copytree(whole.folder, folder)
        for number, shard in enumerate(whole.manifest.shards):
            if number % 2 != node:
                (folder / shard.name).unlink()
    rows = {}
    for world_size in (2, 4):
        labels, images = zip(*run_ranks(batches_of_a_rank, world_size, folders), strict=True)
        rows[world_size] = np.concatenate(labels, axis=1), np.concatenate(images, axis=2)
    assert np.array_equal(rows[2][0], rows[4][0])
    assert np.array_equal(rows[2][1], rows[4][1])
    assert all(len(np.unique(labels_N)) == 8 for labels_N in rows[2][0])
    found = np.unique(rows[2][0])
    assert np.array_equal(found, np.arange(48))
    # One more shard on a node, or one less: the same line on every rank.
    first = whole.manifest.shards[0].name
    shutil.copy(whole.folder / first, folders[1])
    (on_0, on_1) = run_ranks(batches_of_a_rank, 2, folders)
    assert on_0 == on_1
    assert on_0.startswith(f"data.partitioned: expected each shard in one part, {first} is on ")
    os.unlink(folders[0] / first)
    os.unlink(folders[1] / first)
    assert run_ranks(batches_of_a_rank, 2, folders)[1].startswith(
        f"data.partitioned: expected every shard of the manifest on a node, {first} of 12 on none of"
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"window_shards": 2}, "goes with shards in a folder of each node, got data.window_shards 2"),
        ({"shards": "https://there", "cache_dir": "c"}, "goes with shards in a folder of each node, got https://there"),
        ({"holdout_identities": 20}, "expected 0 with data.partitioned"),
    ],
)
def test_settings_that_do_not_go_with_parts_are_named(data: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(partitioned=True, **data)  # type: ignore[arg-type]


def test_mining_that_reads_all_shards_is_refused() -> None:
    for mode in ("gathered", "table", "auto"):
        with pytest.raises(ValueError, match=r"mining\.mode: expected 'off' or 'quota' with data\.partitioned"):
            Config(
                data=DataConfig(partitioned=True),
                train=TrainConfig(global_pairs=8),
                mining=MiningConfig(mode=mode),  # type: ignore[arg-type]
            )
