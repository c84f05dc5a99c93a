"""Rounds of gathered mining, on embeddings whose structure is known."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from distributed.ranks import run_ranks
from torch import Tensor

from facetrain.config import MiningConfig
from facetrain.data.index import ClassTable
from facetrain.mining.gathered import mine_round
from facetrain.mining.neighbours import graph_pays
from facetrain.mining.round import MinedRound, MiningSchedule
from facetrain.world import World

NUM_IDENTITIES = 120
IMAGES_EACH = (2, 3, 5)


def table_of_faces() -> ClassTable:
    counts = np.resize(IMAGES_EACH, NUM_IDENTITIES)
    first_image = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return ClassTable(names=tuple(f"id{i}" for i in range(NUM_IDENTITIES)), first_image=first_image)


def identity_of(table: ClassTable, images: np.ndarray) -> np.ndarray:
    return np.searchsorted(table.first_image, images, side="right") - 1


def clustered_faces(table: ClassTable, num_clusters: int = 20) -> Tensor:
    """Embedding of every image, [images, 8]: identities lie around the centre that `identity % num_clusters` names."""
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(num_clusters, 8, generator=generator)
    own = centres[torch.arange(NUM_IDENTITIES) % num_clusters] + 0.3 * torch.randn(
        NUM_IDENTITIES, 8, generator=generator
    )
    images = torch.from_numpy(identity_of(table, np.arange(table.first_image[-1])))
    return own[images] + 0.1 * torch.randn(len(images), 8, generator=generator)


def sharded_embed(world: World, faces: Tensor) -> Callable[[np.ndarray], Tensor]:
    """Every rank looks up its slice, and the slices are gathered, as with a real backbone."""

    def embed(images: np.ndarray) -> Tensor:
        own = np.array_split(images, world.world_size)[world.rank]
        return world.all_gather_uneven(faces[torch.from_numpy(own)])

    return embed


def mine(
    config: MiningConfig, world: World | None = None, *, round_index: int = 0, num_pairs: int = 16, seed: int = 3
) -> MinedRound:
    world = world or World()
    table = table_of_faces()
    return mine_round(
        round_index,
        config,
        num_pairs=num_pairs,
        table=table,
        identities=np.arange(5, NUM_IDENTITIES, dtype=np.int64),
        embed=sharded_embed(world, clustered_faces(table)),
        seed=seed,
        world=world,
    )


CASES = (
    {"config": MiningConfig(mode="gathered", candidates=60, batches_per_round=5)},
    {"config": MiningConfig(mode="gathered", candidates=60, batches_per_round=3, random_share=0.25), "round_index": 2},
    {"config": MiningConfig(mode="gathered", batches_per_round=1, hinge=True, margin=0.5), "num_pairs": 7},
    {"config": MiningConfig(mode="gathered", images_per_class=1, max_appearances=3, batches_per_round=7)},
    {"config": MiningConfig(mode="gathered", similarity_cap=0.9, batches_per_round=6, candidates_per_batch=1.0)},
    {"config": MiningConfig(mode="gathered", similarity_cap=0.9, batches_per_round=1, hinge=True)},
)


def mine_cases(world: World) -> list[MinedRound]:
    return [mine(world=world, **case) for case in CASES]


def test_lists_are_equal_for_any_number_of_ranks() -> None:
    alone = mine_cases(World())
    for world_size in (2, 4):
        for rank_rounds in run_ranks(mine_cases, world_size):
            for mined, expected in zip(rank_rounds, alone, strict=True):
                assert np.array_equal(mined.identities_BN, expected.identities_BN)
                assert without_seconds(mined) == without_seconds(expected)


def test_some_of_these_cases_search_a_graph_and_some_do_not() -> None:
    assert [graph_pays(60, 30, 16, 5), graph_pays(115, 58, 7, 1), graph_pays(115, 115, 16, 6)] == [True, False, True]


@pytest.mark.parametrize(
    "options", [{}, {"hinge": True, "margin": 0.5}, {"images_per_class": 1}, {"similarity_cap": 0.9}]
)
def test_a_batch_is_the_same_from_a_graph_and_from_greedy_selection(options: dict[str, Any]) -> None:
    by_greedy = mine(MiningConfig(mode="gathered", batches_per_round=1, **options)).identities_BN
    by_graph = mine(MiningConfig(mode="gathered", batches_per_round=12, **options)).identities_BN
    assert [graph_pays(115, 58, 16, batches) for batches in (1, 12)] == [False, True]
    assert np.array_equal(by_greedy[0], by_graph[0])


def without_seconds(mined: MinedRound) -> dict[str, float]:
    return {key: value for key, value in mined.stats.items() if not key.endswith("_s")}


def test_no_identity_stands_twice_in_a_batch_and_all_are_trained_ones() -> None:
    for random_share in (0.0, 0.3, 0.99):
        mined = mine(MiningConfig(mode="gathered", candidates=50, batches_per_round=8, random_share=random_share))
        assert mined.identities_BN.shape == (8, 16)
        assert mined.identities_BN.dtype == np.int64
        assert mined.identities_BN.min() >= 5
        assert all(len(set(batch)) == 16 for batch in mined.identities_BN.tolist())


def test_mined_batches_are_harder_than_random_ones_on_clustered_embeddings() -> None:
    config = MiningConfig(mode="gathered", batches_per_round=16, candidates_per_batch=1.0)
    stats = mine(config, num_pairs=6).stats
    assert stats["mining/candidates"] == NUM_IDENTITIES - 5
    assert stats["mining/loss_mined"] > 2 * stats["mining/loss_random"]
    assert stats["mining/hardness"] == stats["mining/loss_mined"] - stats["mining/loss_random"]
    assert stats["mining/violation"] > -2


def test_mined_batches_hold_whole_clusters() -> None:
    mined = mine(MiningConfig(mode="gathered", batches_per_round=16))
    clusters_in_batch = np.mean([len(set(batch % 20)) for batch in mined.identities_BN])
    randomly = np.random.default_rng(0)
    clusters_at_random = np.mean([len(set(randomly.choice(115, 16, replace=False) % 20)) for _ in range(100)])
    assert clusters_in_batch < 0.8 * clusters_at_random


def test_random_share_brings_identities_that_are_no_candidates() -> None:
    config = {"mode": "gathered", "candidates": 16, "batches_per_round": 12}
    mined: Any = mine(MiningConfig(**config))  # type: ignore[arg-type]
    assert len(np.unique(mined.identities_BN)) == 16
    mixed: Any = mine(MiningConfig(**config, random_share=0.5))  # type: ignore[arg-type]
    assert len(np.unique(mixed.identities_BN)) > 60


def test_two_distinct_images_of_each_candidate_are_embedded_once() -> None:
    table, faces, asked = table_of_faces(), clustered_faces(table_of_faces()), []

    def embed(images: np.ndarray) -> Tensor:
        asked.append(images)
        return faces[torch.from_numpy(images)]

    config = MiningConfig(mode="gathered", candidates=80, batches_per_round=2)
    mine_round(
        0, config, num_pairs=8, table=table, identities=np.arange(NUM_IDENTITIES), embed=embed, seed=0, world=World()
    )
    (images,) = asked
    anchors, positives = images.reshape(2, 80)
    assert np.array_equal(identity_of(table, anchors), identity_of(table, positives))
    assert len(set(identity_of(table, anchors))) == 80
    assert (anchors != positives).all()


def test_one_image_of_each_candidate_is_embedded_if_asked() -> None:
    table, faces, asked = table_of_faces(), clustered_faces(table_of_faces()), []

    def embed(images: np.ndarray) -> Tensor:
        asked.append(images)
        return faces[torch.from_numpy(images)]

    config = MiningConfig(mode="gathered", candidates=80, batches_per_round=2, images_per_class=1)
    mined = mine_round(
        0, config, num_pairs=8, table=table, identities=np.arange(NUM_IDENTITIES), embed=embed, seed=0, world=World()
    )
    assert len(set(identity_of(table, asked[0]))) == len(asked[0]) == 80
    assert mined.stats["mining/loss_mined"] > mined.stats["mining/loss_random"]


def test_similarity_cap_keeps_clusters_apart() -> None:
    def share_of_pairs_in_a_cluster(**options: Any) -> float:
        lists = mine(MiningConfig(mode="gathered", batches_per_round=12, **options)).identities_BN % 20
        return float((lists[:, :, None] == lists[:, None]).mean())

    assert share_of_pairs_in_a_cluster(similarity_cap=0.9) < 0.9 * share_of_pairs_in_a_cluster()
    stats = mine(MiningConfig(mode="gathered", batches_per_round=3, similarity_cap=0.05), num_pairs=40).stats
    assert stats["mining/filler_share"] > 0.2


def test_an_identity_stands_in_no_more_lists_than_allowed() -> None:
    config = {"mode": "gathered", "batches_per_round": 6, "candidates_per_batch": 1.0}
    assert mine(MiningConfig(**config)).stats["mining/most_appearances"] > 2  # type: ignore[arg-type]
    limited = mine(MiningConfig(**config, max_appearances=2))  # type: ignore[arg-type]
    assert (
        limited.stats["mining/most_appearances"] == np.unique(limited.identities_BN, return_counts=True)[1].max() == 2
    )
    assert all(len(set(batch)) == 16 for batch in limited.identities_BN.tolist())
    with pytest.raises(
        ValueError, match=r"mining\.max_appearances: expected at least 2, .* fill 12 batches of 16, got 1"
    ):
        mine(MiningConfig(mode="gathered", batches_per_round=12, max_appearances=1))


def test_rounds_batches_and_seeds_differ_and_repeat() -> None:
    config = MiningConfig(mode="gathered", candidates=60, batches_per_round=4)
    first = mine(config).identities_BN
    assert np.array_equal(first, mine(config).identities_BN)
    assert len(np.unique(np.sort(first, axis=1), axis=0)) == 4
    for other in (mine(config, round_index=1), mine(config, seed=4)):
        assert not np.array_equal(first, other.identities_BN)


def test_as_many_pairs_as_identities_takes_all() -> None:
    mined = mine(MiningConfig(mode="gathered", batches_per_round=2, random_share=0.1), num_pairs=NUM_IDENTITIES - 5)
    assert (np.sort(mined.identities_BN, axis=1) == np.arange(5, NUM_IDENTITIES)).all()
    assert mined.stats["mining/overlap"] == 1


def test_too_few_candidates_and_broken_embeddings_are_named() -> None:
    with pytest.raises(ValueError, match=r"mining\.candidates: expected at least train\.global_pairs = 30 .* got 20"):
        mine(MiningConfig(mode="gathered", candidates=20), num_pairs=30)
    with pytest.raises(ValueError, match="mining round 0: expected finite embeddings, got NaN"):
        mine_round(
            0,
            MiningConfig(mode="gathered", candidates=20),
            num_pairs=10,
            table=table_of_faces(),
            identities=np.arange(NUM_IDENTITIES),
            embed=lambda images: torch.full((len(images), 4), torch.nan),
            seed=0,
            world=World(),
        )


def test_rounds_come_before_the_steps_that_they_serve() -> None:
    schedule = MiningSchedule(MiningConfig(mode="gathered", warmup_steps=10, batches_per_round=4, lag_steps=6))
    assert {step: schedule.round_at(step) for step in (0, 9, 10, 11, 14, 18)} == {
        0: None,
        9: None,
        10: 0,
        11: None,
        14: 1,
        18: 2,
    }
    assert [schedule.first_served_step(r) for r in (0, 1, 2)] == [16, 20, 24]
