"""Table mining, on training embeddings whose structure is known."""

import logging

import numpy as np
import pytest
import torch
from distributed.ranks import run_ranks
from torch import Tensor

from facetrain.config import MiningConfig
from facetrain.mining.approximate import approximate_graph
from facetrain.mining.embedding_table import EmbeddingTable
from facetrain.mining.greedy import greedy_classes
from facetrain.mining.round import round_generator
from facetrain.mining.table import mine_table_round
from facetrain.world import World

IDENTITIES = np.arange(5, 245, 2)  # 120 labels that aren't their rows
WIDTH, PAIRS = 8, 16
NEVER_TRAINED = IDENTITIES[-10:]


def faces(step: int) -> tuple[Tensor, Tensor]:
    """Labels [PAIRS] and embeddings [2, PAIRS, WIDTH] of a training step; label // 12 names the cluster."""
    generator = torch.Generator().manual_seed(step)
    known = torch.from_numpy(IDENTITIES[:-10])
    labels = known[torch.randperm(len(known), generator=generator)[:PAIRS]]
    centres = 3 * torch.randn(30, WIDTH, generator=torch.Generator().manual_seed(0))
    return labels, centres[labels // 12] + 0.3 * torch.randn(2, PAIRS, WIDTH, generator=generator)


def trained_table(world: World, steps: range = range(30), *, dtype: torch.dtype = torch.bfloat16) -> EmbeddingTable:
    table = EmbeddingTable(IDENTITIES, dtype=dtype, world=world, block_rows=16)
    for step in steps:
        labels, embeddings = faces(step)
        rows = slice(world.rank * PAIRS // world.world_size, (world.rank + 1) * PAIRS // world.world_size)
        table.observe(step, labels[rows], embeddings[:, rows])
    return table


def expected_entries(steps: range) -> dict[int, tuple[int, Tensor]]:
    """Label -> the step that saw it last, and its embeddings then, [2, WIDTH]."""
    entries = {}
    for step in steps:
        labels, embeddings = faces(step)
        entries.update({int(label): (step, embeddings[:, i]) for i, label in enumerate(labels)})
    return entries


CONFIG = MiningConfig(mode="table", table_neighbours=12, batches_per_round=4, table_max_age_steps=25)
APPROXIMATE = MiningConfig(
    mode="table", table_neighbours=12, batches_per_round=3, table_exact_limit=50, table_probes=4, random_share=0.1
)


CONFIGS = (CONFIG, APPROXIMATE)


def rounds(world: World) -> list[tuple[list[list[int]], dict[str, float]]]:
    table = trained_table(world)
    found = []
    for config in CONFIGS:
        mined = mine_table_round(2, 30, config, num_pairs=PAIRS, table=table, seed=3)
        assert mined is not None
        stats = {key: value for key, value in mined.stats.items() if not key.endswith("_s")}
        found.append((mined.identities_BN.tolist(), stats))
    return found


def entries_and_shards(world: World) -> tuple[list[int], list[Tensor], dict[str, Tensor]]:
    table = trained_table(world)
    rows = table.fresh_rows(30, 25)
    lookup = table.lookup(rows[::-7].copy())
    blocks = torch.cat([block[1].float() for _, block in table.embedding_blocks(rows)])
    return rows.tolist(), [*lookup, blocks], table.state()


def test_every_rank_ends_with_the_newest_embeddings_of_each_identity_whatever_the_number_of_ranks() -> None:
    newest = {label: entry for label, entry in expected_entries(range(30)).items() if entry[0] >= 5}
    labels = np.array(sorted(newest))
    expected = torch.stack([newest[label][1] for label in labels.tolist()]).bfloat16().float()
    wholes = []
    for world_size in (1, 2, 4):
        results = run_ranks(entries_and_shards, world_size)
        for rows, (anchors, positives, blocks), _ in results:
            assert np.array_equal(IDENTITIES[rows], labels)
            assert torch.equal(blocks, expected[:, 1])
            assert torch.equal(torch.stack([anchors, positives], dim=1), expected.flip(0)[::7])
        shards = [state for *_, state in results]
        assert [int(s["first_row"]) for s in shards] == np.cumsum([0] + [len(s["anchors"]) for s in shards])[
            :-1
        ].tolist()
        wholes.append({name: torch.cat([s[name] for s in shards]) for name in ("anchors", "positives", "refreshed_at")})
    for whole in wholes:
        assert all(torch.equal(whole[name], wholes[0][name]) for name in whole)


def test_lists_are_equal_for_any_number_of_ranks_exact_or_not() -> None:
    alone = rounds(World())
    for world_size in (2, 4):
        for ranks_rounds in run_ranks(rounds, world_size):
            assert ranks_rounds == alone


def test_up_to_the_limit_a_batch_is_that_of_greedy_selection() -> None:
    table = trained_table(World())
    config = MiningConfig(
        mode="table", batches_per_round=1, table_refresh_share=0, candidates_per_batch=1, table_neighbours=3
    )
    mined = mine_table_round(0, 30, config, num_pairs=40, table=table, seed=1)
    assert mined is not None
    rows = table.fresh_rows(30, 2000)
    generator = round_generator(1, 0, 1)
    generator.choice(len(rows), len(rows), replace=False)  # the part of the graph, here all of it
    found = greedy_classes(*table.own(rows), 40, generator)
    assert set(mined.identities_BN[0]) == set(IDENTITIES[rows[found.order]])
    assert mined.stats["mining/violation"] == found.mean_violation


def test_approximate_graph_states_the_share_of_true_neighbours_that_it_has() -> None:
    table = trained_table(World())
    rows = table.fresh_rows(30, 30)
    anchors, positives = (x.double() for x in table.own(rows))
    products = (anchors @ positives.T).numpy()
    own = np.diag(products).copy()
    np.fill_diagonal(products, -np.inf)
    true = np.argsort(-products, axis=1)[:, :9]
    recalls = []
    for probes in (1, 4, 1000):
        graph, recall = approximate_graph(
            table,
            rows,
            num_neighbours=9,
            probes=probes,
            similarity_cap=0.98,
            generator=np.random.default_rng(0),
        )
        hits = [np.isin(t, found).mean() for t, found in zip(true, graph.neighbours, strict=True)]
        assert recall == pytest.approx(np.mean(hits))  # the sample is all classes here
        recalls.append(recall)
        assert np.allclose(graph.own, own, atol=1e-4)
        found = graph.neighbours >= 0
        assert np.allclose(
            graph.scores[found], np.take_along_axis(products, graph.neighbours, axis=1)[found], atol=1e-4
        )
        assert (graph.scores[:, :-1] >= graph.scores[:, 1:]).all()
    assert recalls[0] < recalls[1] < recalls[2]
    assert recalls[2] == 1  # all clusters, and the table's bfloat16 is kept as it is

    cosines = products / np.linalg.norm(anchors, axis=1)[:, None] / np.linalg.norm(positives, axis=1)
    for s, neighbours in enumerate(graph.neighbours):
        expected = [c for c in neighbours.tolist() if cosines[s, c] > 0.98]
        assert sorted(graph.capped.get(s, np.empty(0)).tolist()) == sorted(expected)
    assert graph.capped


def test_one_step_alone_is_worth_what_was_seen_in_it() -> None:
    table = trained_table(World(), range(1))
    labels, _ = faces(0)
    assert sorted(IDENTITIES[table.fresh_rows(1, 1)]) == sorted(labels.tolist())
    assert len(table.fresh_rows(2, 1)) == 0


def test_batches_are_distinct_trained_identities_and_renew_what_has_no_fresh_entry() -> None:
    table = trained_table(World())
    mined = mine_table_round(0, 30, CONFIG, num_pairs=PAIRS, table=table, seed=0)
    assert mined is not None
    assert mined.identities_BN.shape == (4, PAIRS)
    assert all(len(set(batch)) == PAIRS for batch in mined.identities_BN.tolist())
    assert np.isin(mined.identities_BN, IDENTITIES).all()
    fresh = IDENTITIES[table.fresh_rows(30, 25)]
    assert not np.isin(NEVER_TRAINED, fresh).any()
    renewed = ~np.isin(mined.identities_BN, fresh)
    assert (renewed.sum(axis=1) == 4).all()  # a quarter of 16
    assert mined.stats["mining/fresh_share"] == len(fresh) / 120


def test_mined_classes_are_hard_for_one_another() -> None:
    mined = mine_table_round(0, 30, CONFIG, num_pairs=8, table=trained_table(World()), seed=0)
    assert mined is not None
    assert mined.stats["mining/loss_mined"] > 1.5 * mined.stats["mining/loss_random"]
    assert mined.stats["mining/hardness"] == mined.stats["mining/loss_mined"] - mined.stats["mining/loss_random"]


def test_too_few_fresh_entries_serve_random_classes_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "facetrain"):
        found = mine_table_round(0, 30, CONFIG, num_pairs=60, table=trained_table(World(), range(2)), seed=0)
    assert found is None
    assert (
        "0 of 120 classes have an entry of the last 25 steps, 120 are needed: random classes are served" in caplog.text
    )


def test_broken_embeddings_are_no_entries() -> None:
    table = EmbeddingTable(IDENTITIES, dtype=torch.bfloat16, world=World())
    embeddings = torch.ones(2, 120, 4)
    embeddings[0, 7, 2], embeddings[1, 9, 0] = torch.nan, torch.inf
    table.observe(0, torch.from_numpy(IDENTITIES), embeddings)
    assert sorted(set(range(120)) - set(table.fresh_rows(1, 2000).tolist())) == [7, 9]
