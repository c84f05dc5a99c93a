"""The windowed schedule: few shards at a time, every identity alike, the same for any ranks and from any step on."""

import fcntl
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numbered_faces import SIDE_PX, numbered_shards
from shard_server import serve

from facetrain.config import Config, DataConfig, MiningConfig, TrainConfig
from facetrain.data.index import ClassTable
from facetrain.data.loader import PairLoader
from facetrain.data.manifest import ShardInfo
from facetrain.data.pack import pack
from facetrain.data.shards import ShardSet, open_shards
from facetrain.data.window import WindowedPlan
from facetrain.inputs import Inputs, open_inputs

# V, M, N and the identities of each shard.
CASES = {
    "one-shard-windows": (1, 1, 6, [7] * 6),
    "equal-shards": (2, 3, 8, [6] * 20),
    "uneven-shards": (4, 2, 16, [5, 9, 6, 13, 8, 7, 20, 6] * 4),
    "batch-of-many-blocks": (1, 2, 40, [5, 6, 7] * 20),
    "many-nodes": (8, 4, 32, list(range(8, 24)) * 8),
    "tiny-shards": (1, 3, 12, [1, 20, 25, 2, 18, 22, 19] * 3),
}


def plan_of(case: str, *, seed: int = 3, trained: float = 1.0) -> WindowedPlan:
    virtual_nodes, window_shards, global_pairs, sizes = CASES[case]
    total = sum(sizes)
    table = ClassTable(names=("",) * total, first_image=np.arange(0, 3 * total + 1, 3))
    identities = np.arange(total)
    if trained < 1:
        identities = np.sort(np.random.default_rng(0).permutation(total)[: int(trained * total)])
    shards = [ShardInfo(name=str(i), size_bytes=1, sha256="", images=3 * n, identities=n) for i, n in enumerate(sizes)]
    return WindowedPlan(
        table,
        identities,
        global_pairs=global_pairs,
        seed=seed,
        shards=shards,
        virtual_nodes=virtual_nodes,
        window_shards=window_shards,
    )


def shard_of(case: str, labels: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.cumsum(CASES[case][3]), labels, side="right")


each_case = pytest.mark.parametrize("case", CASES)


@each_case
def test_each_pass_draws_every_identity_of_a_shard_once(case: str) -> None:
    plan = plan_of(case)
    drawn: dict[int, list[int]] = {shard: [] for shard in range(len(CASES[case][3]))}
    for step in range(6 * plan.steps_per_epoch):
        labels = plan.step(step).labels_N
        for label, shard in zip(labels.tolist(), shard_of(case, labels).tolist(), strict=True):
            drawn[shard].append(label)
    for shard, size in enumerate(CASES[case][3]):
        passes = [sorted(drawn[shard][i : i + size]) for i in range(0, len(drawn[shard]) - size + 1, size)]
        assert len(passes) >= 3
        assert passes == [passes[0]] * len(passes)
        assert len(set(passes[0])) == size


@each_case
def test_no_identity_stands_twice_in_a_batch(case: str) -> None:
    for seed in range(3):
        plan = plan_of(case, seed=seed)
        for step in range(8 * plan.steps_per_epoch):
            step_plan = plan.step(step)
            assert len(np.unique(step_plan.labels_N)) == plan.global_pairs
            assert len(np.unique(step_plan.image_idx_N2)) == 2 * plan.global_pairs


@each_case
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_rank_needs_the_shards_of_its_window_and_no_others(case: str, world_size: int) -> None:
    virtual_nodes, window_shards, global_pairs, sizes = CASES[case]
    if global_pairs % world_size:
        world_size = 3
    plan = plan_of(case)
    nodes_of_a_rank = max(1, virtual_nodes // world_size)
    reach = {"batch-of-many-blocks": 8, "tiny-shards": 2}.get(case, 1)  # blocks of a batch, beyond the first
    ever: list[set[int]] = [set() for _ in range(world_size)]
    for step in range(3 * plan.steps_per_epoch):
        for rank in range(world_size):
            needed = plan.shards_between(step, step, rank, world_size)
            labels = plan.step(step).slice(rank, world_size).labels_N
            assert set(shard_of(case, labels).tolist()) <= needed
            assert len(needed) <= nodes_of_a_rank * (window_shards + reach + 1)
            assert needed <= plan.shards_between(max(0, step - 2), step + 1, rank, world_size)
            ever[rank] |= needed
    if world_size <= virtual_nodes:
        assert sum(map(len, ever)) == len(sizes)  # each shard belongs to one rank for good
    assert set.union(*ever) == set(range(len(sizes)))


@each_case
def test_any_step_is_the_same_in_any_order(case: str) -> None:
    in_order = [plan_of(case).step(step) for step in (0, 40, 97)]
    again = plan_of(case)
    for step in np.random.default_rng(0).permutation(100).tolist():
        again.step(step)
    for step_plan in in_order:
        found = again.step(step_plan.step)
        assert np.array_equal(found.labels_N, step_plan.labels_N)
        assert np.array_equal(found.image_idx_N2, step_plan.image_idx_N2)
        assert np.array_equal(found.augment_seeds_N2, step_plan.augment_seeds_N2)


def test_only_identities_that_are_trained_on_are_drawn() -> None:
    plan = plan_of("many-nodes", trained=0.8)
    drawn = np.concatenate([plan.step(step).labels_N for step in range(2 * plan.steps_per_epoch)])
    assert set(drawn.tolist()) == set(plan.identities_I.tolist())


def test_shares_are_nearly_equal_and_said() -> None:
    plan = plan_of("uneven-shards")
    counts = np.bincount(np.concatenate([plan.step(step).labels_N for step in range(10 * plan.steps_per_epoch)]))
    assert counts.max() / counts.min() < 1.25
    assert plan.describe() == (
        "4 virtual nodes with 8 to 8 shards each, 2 in a window; an identity is drawn every 18.50 to 18.50 steps"
    )


@pytest.mark.parametrize(
    ("virtual_nodes", "window_shards", "sizes", "message"),
    [
        (1, 4, [3] * 20, "clearly less than half of the 20 shards of a virtual node, for its 8 pairs .*, got 4; fewer"),
        (1, 4, [8] * 7, "clearly less than half of the 7 shards of a virtual node"),
        (4, 2, [8] * 8, "clearly less than half of the 2 shards of a virtual node, for its 2 pairs"),
        (4, 2, [8] * 3, "clearly less than half of the 1 shards|0 shards"),
    ],
)
def test_windows_that_do_not_fit_are_refused(virtual_nodes, window_shards, sizes, message, monkeypatch) -> None:
    monkeypatch.setitem(CASES, "bad", (virtual_nodes, window_shards, 8, sizes))
    with pytest.raises(ValueError, match=rf"^data\.window_shards: expected {message}"):
        plan_of("bad")


@pytest.mark.parametrize(
    ("data", "mining", "message"),
    [
        ({"virtual_nodes": 3}, "off", r"data\.virtual_nodes: expected a divisor of train\.global_pairs = 8, got 3"),
        ({}, "gathered", r"mining\.mode: expected 'off' or 'quota' with data\.window_shards"),
        ({"holdout_identities": 20}, "off", r"data\.holdout_identities: expected 0 with data\.window_shards"),
    ],
)
def test_settings_that_need_all_shards_are_refused(data: dict, mining: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(
            data=DataConfig(window_shards=2, **data),
            train=TrainConfig(global_pairs=8),
            mining=MiningConfig(mode=mining, candidates=8),  # type: ignore[arg-type]
        )


@each_case
def test_what_may_be_mined_stays_in_the_window_from_the_round_to_its_last_batch(case: str) -> None:
    virtual_nodes, _, _, sizes = CASES[case]
    plan = plan_of(case)
    found = 0
    for step in range(0, 2 * plan.steps_per_epoch, 3):
        pools = plan.pools(step, step + 1)
        assert len(pools) == virtual_nodes
        held = [plan.shards_between(s, s, v, virtual_nodes) for v in range(virtual_nodes) for s in (step, step + 1)]
        for v, pool in enumerate(pools):
            shards = set(shard_of(case, pool).tolist())
            assert shards <= held[2 * v] & held[2 * v + 1]
            assert len(pool) == sum(sizes[shard] for shard in shards)
            assert np.array_equal(pool, np.unique(pool))
            found += len(pool)
    assert found or case in ("one-shard-windows", "batch-of-many-blocks")
    assert len(plan.pools(0, 10 * plan.steps_per_epoch)[0]) == 0


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_room_is_what_the_ranks_of_a_machine_need_at_once(world_size: int) -> None:
    plan = plan_of("many-nodes")
    shards = [ShardInfo(name="", size_bytes=10 + i, sha256="", images=3, identities=1) for i in range(128)]
    most = 0
    for step in range(plan.steps_per_epoch):
        needed = set().union(*(plan.shards_between(max(0, step - 3), step, r, 4) for r in range(world_size)))
        most = max(most, sum(10 + shard for shard in needed))
    assert plan.room_bytes(shards, range(world_size), 4, 3) == most


def test_a_cache_without_room_for_the_windows_is_refused_at_the_start(synthetic: Path, tmp_path: Path) -> None:
    manifest = pack([synthetic / "faces" / "train"], tmp_path / "shards", images_per_shard=8, workers=1)
    data = {"window_shards": 2, "virtual_nodes": 2, "workers": 1, "prefetch": 1, "image_px": 32}

    def opened(**changes: object) -> Inputs:
        mining = MiningConfig(**{"mode": "off"} | {k: v for k, v in changes.items() if k not in ("cache_bytes",)})
        cache_bytes = changes.get("cache_bytes", manifest.size_bytes)
        with serve(tmp_path / "shards") as server:
            config = Config(
                data=DataConfig(shards=server.url, cache_dir=str(tmp_path / "cache"), cache_bytes=cache_bytes, **data),
                train=TrainConfig(global_pairs=8, steps=100),
                mining=mining,
            )
            return open_inputs(config, world_size=1)

    room = opened().plan.room_bytes(manifest.shards, range(1), 1, 1)
    assert opened(cache_bytes=room).plan.pairs_per_node == 4
    message = (
        rf"^data\.cache_bytes: expected at least the {room} bytes of the windows of ranks 0 to 0 on this machine, got"
    )
    with pytest.raises(ValueError, match=message):
        opened(cache_bytes=room - 1)
    quota = {"mode": "quota", "virtual_nodes": 2, "candidates": 8, "warmup_steps": 0, "lag_steps": 1}
    with pytest.raises(
        ValueError, match=r"^mining\.batches_per_round: expected rounds during which .* got 0 from step 0 "
    ):
        opened(**quota, batches_per_round=10)


def bytes_in(cache: Path) -> int:
    """Size of the cached shards, at a moment in which none comes or goes."""
    with open(cache / ".lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sum(path.stat().st_size for path in cache.glob("*.tar"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_rank_fetches_each_of_its_shards_about_once_in_a_pass(tmp_path: Path, workers: int) -> None:
    """Twelve shards over HTTP, six of them this rank's, through a cache of five: the images are those of the folder."""
    folder = numbered_shards(tmp_path, [5] * 48).folder  # four identities a shard
    local = ShardSet.open(folder)
    assert len(local.manifest.shards) == 12
    max_bytes = 5 * max(shard.size_bytes for shard in local.manifest.shards)

    def plan() -> WindowedPlan:
        shards = local.manifest.shards
        kwargs = {"global_pairs": 4, "seed": 0, "shards": shards, "virtual_nodes": 2, "window_shards": 2}
        return WindowedPlan(local.table, np.arange(48), **kwargs)

    def batches(shards: ShardSet, config: DataConfig) -> list[bytes]:
        found = []
        kwargs = {"rank": 1, "world_size": 2, "first_step": 0, "last_step": 3 * plan().steps_per_epoch}
        with PairLoader(plan(), shards, config, **kwargs) as loader:
            for batch in loader:
                found.append(batch.images_VnHWC.numpy().tobytes())
                assert bytes_in(tmp_path / "cache") <= max_bytes
        return found

    with serve(folder) as server:
        config = DataConfig(
            shards=server.url,
            cache_dir=str(tmp_path / "cache"),
            cache_bytes=max_bytes,
            window_shards=2,
            virtual_nodes=2,
            shard_px=SIDE_PX,
            image_px=SIDE_PX,
            workers=workers,
            prefetch=1,
        )
        remote = open_shards(config)
        assert not [name for name in server.names() if name.endswith(".tar")]
        assert batches(remote, config) == batches(local, config)
        counts = Counter(name for name in server.names() if name.endswith(".tar"))
    own = plan().shards_between(0, 1000, 1, 2)
    assert set(counts) == {local.manifest.shards[shard].name for shard in own}
    assert len(own) == 6
    assert max(counts.values()) <= 4  # three passes, and the beginning of the next
