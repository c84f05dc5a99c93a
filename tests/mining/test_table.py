"""Table mining, on training embeddings whose structure is known."""

import logging

import numpy as np
import pytest
import torch
from distributed.ranks import run_ranks
from torch import Tensor

from facetrain.config import MiningConfig
from facetrain.mining.best_first import NeighbourGraph, best_first_classes
from facetrain.mining.embedding_table import EmbeddingTable
from facetrain.mining.graph import build_graph
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


def rounds(world: World) -> list[tuple[list[list[int]], dict[str, float]]]:
    table = trained_table(world)
    found = []
    for config in (CONFIG, APPROXIMATE):
        mined = mine_table_round(2, 30, config, num_pairs=PAIRS, table=table, seed=3)
        assert mined is not None
        stats = {key: value for key, value in mined.stats.items() if not key.endswith("_s")}
        found.append((mined.identities_BN.tolist(), stats))
    return found


def entries_and_shards(world: World) -> tuple[list[int], list[Tensor], dict[str, Tensor]]:
    table = trained_table(world)
    rows = table.fresh_rows(30, 25)
    lookup = table.lookup(rows[::-7].copy())
    blocks = torch.cat([block for _, block in table.positive_blocks(rows)])
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


def test_graph_holds_the_nearest_classes_of_the_written_out_products() -> None:
    table = trained_table(World(), dtype=torch.float32)
    rows = table.fresh_rows(30, 30)
    graph, recall = build_graph(
        table, rows, num_neighbours=9, exact_limit=120, probes=1, generator=np.random.default_rng(0)
    )
    anchors, positives = (x.double() for x in table.own(rows))
    products = (anchors @ positives.T).numpy()
    assert recall == 1
    assert np.allclose(graph.own, np.diag(products), atol=1e-4)
    np.fill_diagonal(products, -np.inf)
    expected = np.argsort(-products, axis=1)[:, :9]
    assert np.array_equal(graph.neighbours, expected)
    assert np.allclose(graph.scores, np.take_along_axis(products, expected, axis=1), atol=1e-4)


def test_approximate_graph_states_the_share_of_true_neighbours_that_it_has() -> None:
    table = trained_table(World(), dtype=torch.float32)
    rows = table.fresh_rows(30, 30)

    def graph_of(probes: int, exact_limit: int = 1) -> tuple[NeighbourGraph, float]:
        return build_graph(
            table,
            rows,
            num_neighbours=9,
            exact_limit=exact_limit,
            probes=probes,
            generator=np.random.default_rng(0),
        )

    true = graph_of(1, exact_limit=200)[0]
    recalls = []
    for probes in (1, 4, 1000):
        graph, recall = graph_of(probes)
        hits = [np.isin(t, f).mean() for t, f in zip(true.neighbours, graph.neighbours, strict=True)]
        assert recall == pytest.approx(np.mean(hits))  # the sample is all classes here
        assert (graph.scores[:, :-1] >= graph.scores[:, 1:]).all()
        recalls.append(recall)
    assert recalls[0] < recalls[1] < recalls[2]
    assert recalls[2] > 0.99  # all clusters: what is left is the rounding to bfloat16


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


def test_broken_embeddings_are_named() -> None:
    table = EmbeddingTable(IDENTITIES, dtype=torch.float32, world=World())
    table.observe(0, torch.from_numpy(IDENTITIES), torch.full((2, 120, 4), torch.nan))
    with pytest.raises(ValueError, match="mining table: expected finite embeddings, got NaN"):
        mine_table_round(0, 1, CONFIG, num_pairs=8, table=table, seed=0)


def test_walk_goes_on_from_a_random_class_where_all_edges_lead_to_taken_ones() -> None:
    pairs = np.array([[1], [0], [3], [2]], dtype=np.int32)
    graph = NeighbourGraph(pairs, np.ones((4, 1), dtype=np.float32), np.zeros(4, dtype=np.float32))
    order = best_first_classes(graph, 4, np.random.default_rng(0), extend=None).order.tolist()
    assert sorted(order) == [0, 1, 2, 3]
    assert order[1] == pairs[order[0], 0]
