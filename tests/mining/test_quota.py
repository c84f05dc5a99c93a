"""Quota mining: what each virtual node gives, and who embeds what."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data.numbered_faces import SIDE_PX, numbered_shards
from distributed.ranks import run_ranks
from mining.test_gathered import NUM_IDENTITIES, clustered_faces, identity_of, table_of_faces
from torch import Tensor, nn

from facetrain.config import Config, DataConfig, MiningConfig, TrainConfig
from facetrain.data.shards import ShardSet
from facetrain.data.window import WindowedPlan
from facetrain.inputs import check_pools
from facetrain.mining.greedy import greedy_classes
from facetrain.mining.miner import Miner
from facetrain.mining.quota import can_fill, mine_quota_round, spread_identities
from facetrain.mining.round import MinedRound
from facetrain.world import World

IDENTITIES = np.arange(5, NUM_IDENTITIES, dtype=np.int64)
NODES, PAIRS, SEED = 4, 16, 3


def mine(
    config: MiningConfig, world: World | None = None, *, embed: Callable[[np.ndarray], Tensor] | None = None
) -> MinedRound:
    table = table_of_faces()
    faces = clustered_faces(table)
    return mine_quota_round(
        1,
        config,
        num_pairs=PAIRS,
        table=table,
        nodes=spread_identities(IDENTITIES, config.virtual_nodes, SEED),
        embed=embed or (lambda images: faces[torch.from_numpy(images)]),
        seed=SEED,
        world=world or World(),
    )


CASES = (
    MiningConfig(mode="quota", virtual_nodes=NODES, batches_per_round=5, candidates=80),
    MiningConfig(mode="quota", virtual_nodes=NODES, batches_per_round=3, random_share=0.3, hinge=True, margin=0.5),
)


def mine_cases(world: World) -> list[tuple[MinedRound, list[int]]]:
    """The rounds, and the identities whose images this rank embedded."""
    table, results = table_of_faces(), []
    faces = clustered_faces(table)
    for config in CASES:
        embedded: list[int] = []

        def embed(images: np.ndarray, embedded: list[int] = embedded) -> Tensor:
            embedded += identity_of(table, images).tolist()
            return faces[torch.from_numpy(images)]

        results.append((mine(config, world, embed=embed), embedded))
    return results


def test_lists_are_equal_for_any_number_of_ranks_and_each_embeds_its_own_nodes() -> None:
    alone = mine_cases(World())
    nodes = spread_identities(IDENTITIES, NODES, SEED)
    for world_size in (2, 4):
        for rank, results in enumerate(run_ranks(mine_cases, world_size)):
            own = np.concatenate(nodes[rank * NODES // world_size : (rank + 1) * NODES // world_size])
            for (mined, embedded), (expected, _) in zip(results, alone, strict=True):
                assert np.array_equal(mined.identities_BN, expected.identities_BN)
                assert mined.stats["mining/hardness"] == expected.stats["mining/hardness"]
                assert np.isin(embedded, own).all()


@pytest.mark.parametrize("config", CASES)
def test_each_node_fills_its_own_rows_with_distinct_identities(config: MiningConfig) -> None:
    mined = mine(config)
    nodes = spread_identities(IDENTITIES, NODES, SEED)
    for batch in mined.identities_BN:
        assert len(set(batch.tolist())) == PAIRS
        for node, rows in zip(nodes, batch.reshape(NODES, -1), strict=True):
            assert np.isin(rows, node).all()


def test_spread_is_a_random_partition_of_even_parts() -> None:
    nodes = spread_identities(IDENTITIES, NODES, SEED)
    assert sorted(np.concatenate(nodes)) == IDENTITIES.tolist()
    assert {len(node) for node in nodes} == {28, 29}
    assert all(len(np.unique(node % 20)) > 12 for node in nodes)  # of 20 clusters
    assert not np.array_equal(nodes[0], spread_identities(IDENTITIES, NODES, SEED + 1)[0])


@pytest.mark.parametrize("seed", range(3))
def test_greedy_takes_the_hardest_class_of_a_group_that_has_room(seed: int) -> None:
    anchors, positives = torch.randint(-2, 3, (2, 40, 4), generator=torch.Generator().manual_seed(seed)).float()
    groups = np.random.default_rng(seed).permutation(np.arange(40) % 5)
    found = greedy_classes(anchors, positives, 20, np.random.default_rng(seed), groups_C=groups, group_quota=4)
    assert np.bincount(groups[found.order]).tolist() == [4] * 5
    products = (anchors @ positives.T).numpy()
    for n in range(1, 20):
        selected = found.order[:n]
        full = np.flatnonzero(np.bincount(groups[selected], minlength=5) == 4)
        rest = [c for c in range(40) if c not in selected and groups[c] not in full]
        scores = {c: max(products[s, c] - products[s, s] for s in selected) for c in rest}
        assert scores[int(found.order[n])] == max(scores.values()) == found.violations[n]


def test_one_node_is_gathered_greedy_and_harder_than_many() -> None:
    hardness = [
        mine(MiningConfig(mode="quota", virtual_nodes=v, candidates_per_batch=1.0)).stats["mining/loss_mined"]
        for v in (1, 16)
    ]
    assert hardness[0] > hardness[1]


def test_nodes_that_cannot_be_shared_or_filled_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"mining\.virtual_nodes: expected a divisor of train\.global_pairs = 16 .* got 3"
    ):
        mine(MiningConfig(mode="quota", virtual_nodes=3))
    with pytest.raises(ValueError, match=r"a multiple of the 3 processes, got 4"):
        mine(CASES[0], World(world_size=3))
    with pytest.raises(ValueError, match=r"at least 8 candidates in each of 2 nodes, got 5 .*mining\.candidates = 10"):
        mine(MiningConfig(mode="quota", virtual_nodes=2, candidates=10))
    with pytest.raises(ValueError, match="mining round 1: expected finite embeddings, got NaN"):
        mine(CASES[0], embed=lambda images: torch.full((len(images), 4), torch.nan))


def mine_in_windows(world: World, folder: Path) -> dict[int, list[list[int]] | None]:
    """The lists of every round of a run, by the step before which it is mined; None where it is left out."""
    shards, mining = ShardSet.open(folder), {"mode": "quota", "virtual_nodes": 2, "candidates": 40}
    config = Config(
        data=DataConfig(
            shards="http://host/shards",
            cache_dir="cache",
            window_shards=3,
            workers=0,
            virtual_nodes=2,
            shard_px=SIDE_PX,
            image_px=SIDE_PX,
        ),
        train=TrainConfig(global_pairs=6, steps=30),
        mining=MiningConfig(**mining, warmup_steps=0, lag_steps=1, batches_per_round=3),  # type: ignore[arg-type]
    )
    kwargs = {"global_pairs": 6, "seed": 0, "virtual_nodes": 2, "window_shards": 3}
    plan = WindowedPlan(shards.table, np.arange(60), shards=shards.manifest.shards, **kwargs)  # type: ignore[arg-type]
    check_pools(plan, config)
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE_PX**2, 4))
    miner = Miner(config, shards, plan, world)
    mined = {step: miner.mine_before(step, backbone) for step in range(0, 30, 3)}
    return {step: found and found[1].identities_BN.tolist() for step, found in mined.items()}


def test_a_later_round_whose_windows_hold_too_few_is_left_out_the_same_for_any_ranks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = numbered_shards(tmp_path, np.random.default_rng(8).integers(2, 7, 60).tolist()).folder
    with caplog.at_level(logging.WARNING):
        alone = mine_in_windows(World(), folder)
    left_out = [step for step, lists in alone.items() if lists is None]
    assert left_out == [12, 15, 18, 21, 27]  # a pass takes 10 steps
    assert len(caplog.messages) == len(left_out)
    assert caplog.messages[0].startswith("mining round 4 before step 12: only 0 identities of a virtual node stay")
    assert run_ranks(mine_in_windows, 2, folder) == [alone, alone]


def test_a_node_fills_its_rows_with_as_many_identities_as_appearances_ask_for() -> None:
    free = MiningConfig(mode="quota", virtual_nodes=2, batches_per_round=3)
    once = MiningConfig(mode="quota", virtual_nodes=2, batches_per_round=3, max_appearances=1)
    assert [can_fill(free, 8, number) for number in (3, 4)] == [False, True]
    assert [can_fill(once, 8, number) for number in (3, 11, 12)] == [False, False, True]
