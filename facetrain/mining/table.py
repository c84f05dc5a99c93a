"""Table mining, for millions of identities: batches mined from the training embeddings of the last steps.

No image is embedded for it. Dims: I trained identities, F of them with a fresh entry in the table, B batches of a
round, N identities of a batch, D embedding width.
"""

import logging
import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from facetrain.config import MiningConfig
from facetrain.mining.approximate import approximate_graph
from facetrain.mining.best_first import Extend, NeighbourGraph, best_first_classes
from facetrain.mining.embedding_table import EmbeddingTable
from facetrain.mining.lists import limit_appearances
from facetrain.mining.neighbours import neighbour_graph, neighbours_needed
from facetrain.mining.round import (
    MinedBatch,
    MinedRound,
    hardness_stats,
    list_stats,
    mine_over_ranks,
    npair_loss,
    num_random_classes,
    round_generator,
    selection_figures,
    subset_size,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _TableBatch(MinedBatch):
    """A batch, and which rows of the table were mined for it, int64, without those that were drawn at random."""

    rows: NDArray[np.int64]


def mine_table_round(
    round_index: int, step: int, config: MiningConfig, *, num_pairs: int, table: EmbeddingTable, seed: int
) -> MinedRound | None:
    """Mine the identity lists of a round's batches from the fresh entries of the table.

    All batches share one graph of the fresh classes; each takes greedily from its own random part of it
    (`mining.candidates_per_batch`). Up to `mining.table_exact_limit` classes that is the selection of
    `greedy_classes`, exactly. Beyond, the graph is approximate, and so is the walk: where all its edges lead to classes
    that are taken it goes on from a random one. Batch b is seeded by (seed, round, b) and mined by rank b mod W, then
    the lists are exchanged: for the same embeddings they are the same for any W. Every rank must call this at the same
    step.

    Classes without a fresh entry can't be mined, and only training refreshes them. So up to
    `mining.table_refresh_share` of each batch is drawn from them, besides the random share.

    The stats are those of `gathered.mine_round`, but for `mining/fresh_share` (F / I), `mining/recall` of the graph,
    no `mining/embed_s`, and the losses: they are those of the round's first batch.

    Args:
        round_index: Counts the rounds of a run from 0.
        step: The step that is trained next.
        config: Age, graph, batches and score.
        num_pairs: N.
        table: The embeddings, and the ranks that share it.
        seed: The run's seed.

    Returns:
        None, and a line in the log, if fewer than 2 N classes (or fewer than all, if there are less) have a fresh
        entry. The plan's random batches then fill the table.
    """
    num_identities = len(table.identities)
    rows_F = table.fresh_rows(step, config.table_max_age_steps)
    fewest = min(2 * num_pairs, num_identities)
    if len(rows_F) < fewest:
        log.info(
            f"mining round {round_index}  {len(rows_F)} of {num_identities} classes have an entry of the last"
            f" {config.table_max_age_steps} steps, {fewest} are needed: random classes are served"
        )
        return None
    started_at = time.perf_counter()
    graph, extend, recall = _graph(table, rows_F, config, num_pairs, round_generator(seed, round_index, 0))
    graph_s = time.perf_counter() - started_at
    batches, seconds = mine_over_ranks(
        lambda b: _mine_batch(
            round_generator(seed, round_index, 1 + b), config, num_pairs, graph, extend, rows_F, table.identities
        ),
        config.batches_per_round,
        table.world,
    )
    lists_BN = np.stack([batch.identities for batch in batches])
    generator = round_generator(seed, round_index, 1 + config.batches_per_round)
    if config.max_appearances is not None:
        lists_BN = limit_appearances(lists_BN, config.max_appearances, table.identities, generator)
    stats = {
        "mining/round": float(round_index),
        "mining/candidates": float(len(rows_F)),
        "mining/fresh_share": len(rows_F) / num_identities,
        "mining/recall": recall,
        "mining/graph_s": graph_s,
    }
    mined = batches[0].rows
    losses = (_npair_loss(table, rows) for rows in (mined, generator.choice(rows_F, len(mined), replace=False)))
    return MinedRound(lists_BN, stats | seconds | list_stats(batches, lists_BN) | hardness_stats(*losses))


def _graph(
    table: EmbeddingTable,
    rows_F: NDArray[np.int64],
    config: MiningConfig,
    num_pairs: int,
    generator: np.random.Generator,
) -> tuple[NeighbourGraph, Extend | None, float]:
    """Return the graph over rows of the table, what extends its rows if it is exact, and its recall."""
    cap = config.similarity_cap
    if len(rows_F) > config.table_exact_limit:
        graph, recall = approximate_graph(
            table,
            rows_F,
            num_neighbours=config.table_neighbours,
            probes=config.table_probes,
            similarity_cap=cap,
            generator=generator,
        )
        return graph, None, recall
    anchors_FD, positives_FD = table.lookup(rows_F)  # over all ranks, each of which then has all
    subset = subset_size(config, num_pairs, len(rows_F))
    num_neighbours = neighbours_needed(len(rows_F), subset, min(num_pairs, subset))
    exact = neighbour_graph(anchors_FD, positives_FD, table.world, num_neighbours=num_neighbours, similarity_cap=cap)
    return *exact, 1.0


def _mine_batch(
    generator: np.random.Generator,
    config: MiningConfig,
    num_pairs: int,
    graph: NeighbourGraph,
    extend: Extend | None,
    rows_F: NDArray[np.int64],
    identities: NDArray[np.int64],
) -> _TableBatch:
    is_open_I = np.ones(len(identities), dtype=np.bool_)
    is_open_I[rows_F] = False
    stale = np.flatnonzero(is_open_I)
    num_refreshed = min(round(config.table_refresh_share * num_pairs), len(stale))
    num_random = num_random_classes(config, num_pairs - num_refreshed)
    num_mined = num_pairs - num_refreshed - num_random

    # Each batch walks a part of its own: on the whole graph, walks would end in the same few hard classes.
    size = subset_size(config, num_mined, len(rows_F))
    subset = np.sort(generator.choice(len(rows_F), size, replace=False))
    found = best_first_classes(
        graph, num_mined, generator, hinge=config.hinge, margin=config.margin, extend=extend, subset=subset
    )
    mined = rows_F[found.order]
    refreshed = generator.choice(stale, num_refreshed, replace=False)
    is_open_I[:] = True
    is_open_I[mined] = is_open_I[refreshed] = False
    random = generator.choice(np.flatnonzero(is_open_I), num_random, replace=False)
    return _TableBatch(
        # Shuffled, because ranks take slices of the list: random classes and late finds go to all of them.
        identities=identities[generator.permutation(np.concatenate([mined, refreshed, random]))],
        **selection_figures(found),
        rows=mined,
    )


def _npair_loss(table: EmbeddingTable, rows: NDArray[np.int64]) -> float:
    """Return the N-pair loss of some classes on the table's entries; every rank must call it."""
    return npair_loss(torch.stack(table.lookup(rows)), np.arange(len(rows)))
