"""Table mining, for millions of identities: batches mined from the training embeddings of the last steps.

No image is embedded for it. Dims: I trained identities, F of them with a fresh entry in the table, B batches of a
round, N identities of a batch.
"""

import logging
import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facetrain.config import MiningConfig
from facetrain.losses.npair import npair_mc_rows
from facetrain.mining.best_first import NeighbourGraph, best_first_classes
from facetrain.mining.embedding_table import EmbeddingTable
from facetrain.mining.gathered import MinedRound, _generator, mean_overlap
from facetrain.mining.graph import build_graph

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _MinedBatch:
    """One batch as its rank mined it."""

    identities: NDArray[np.int64]
    rows: NDArray[np.int64]
    """Rows of the table that were mined, without those that were drawn at random."""
    mean_violation: float
    tie_share: float


def mine_table_round(
    round_index: int, step: int, config: MiningConfig, *, num_pairs: int, table: EmbeddingTable, seed: int
) -> MinedRound | None:
    """Mine the identity lists of a round's batches from the fresh entries of the table.

    All batches share one graph of the fresh classes (`build_graph`); each walks its own random part of it
    (`mining.candidates_per_batch`), greedily, along edges alone: a class that is nobody's neighbour among the K is
    found by chance only, so that this is an approximation even where the graph's rows are exact. Batch b is
    seeded by (seed, round, b) and mined by rank b mod W, then the lists are exchanged: for the same embeddings they
    are the same for any W. Every rank must call this at the same step.

    Classes without a fresh entry can't be mined, and only training refreshes them. So up to `table_refresh_share` of
    each batch is drawn from them, besides the random share.

    The stats are those of `gathered.mine_round`, but for `mining/fresh_share` (F / I), `mining/recall` of the graph,
    `mining/graph_s` in place of `mining/embed_s`, and the losses: they are those of the round's first batch.

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

    Raises:
        ValueError: An embedding isn't finite.
    """
    world, num_identities = table.world, len(table.identities)
    rows_F = table.fresh_rows(step, config.table_max_age_steps)
    fewest = min(2 * num_pairs, num_identities)
    if len(rows_F) < fewest:
        log.info(
            f"mining round {round_index}  {len(rows_F)} of {num_identities} classes have an entry of the last"
            f" {config.table_max_age_steps} steps, {fewest} are needed: random classes are served"
        )
        return None
    started_at = time.perf_counter()
    graph, recall = build_graph(
        table,
        rows_F,
        num_neighbours=config.table_neighbours,
        exact_limit=config.table_exact_limit,
        probes=config.table_probes,
        generator=_generator(seed, round_index, 0),
    )
    graphed_at = time.perf_counter()
    own = {
        b: _mine_batch(_generator(seed, round_index, 1 + b), config, num_pairs, graph, rows_F, table)
        for b in range(world.rank, config.batches_per_round, world.world_size)
    }
    mined_at = time.perf_counter()
    # Over all ranks; each ends with the batches of all. What was exchanged is the truth: no rank mines a batch again.
    batches = dict(pair for part in world.all_gather_object(own) for pair in part.items())
    exchanged_at = time.perf_counter()

    in_order = [batches[b] for b in range(config.batches_per_round)]
    identities_BN = np.stack([batch.identities for batch in in_order])
    stats = {
        "mining/round": float(round_index),
        "mining/candidates": float(len(rows_F)),
        "mining/fresh_share": len(rows_F) / num_identities,
        "mining/recall": recall,
        "mining/graph_s": graphed_at - started_at,
        "mining/greedy_s": mined_at - graphed_at,
        "mining/exchange_s": exchanged_at - mined_at,
        "mining/violation": float(np.mean([batch.mean_violation for batch in in_order])),
        "mining/tie_share": float(np.mean([batch.tie_share for batch in in_order])),
        "mining/overlap": mean_overlap(identities_BN),
    }
    generator = _generator(seed, round_index, 1 + config.batches_per_round)
    random_rows = generator.choice(rows_F, len(in_order[0].rows), replace=False)
    return MinedRound(identities_BN, stats | _hardness(table, in_order[0].rows, random_rows))


def _mine_batch(
    generator: np.random.Generator,
    config: MiningConfig,
    num_pairs: int,
    graph: NeighbourGraph,
    rows_F: NDArray[np.int64],
    table: EmbeddingTable,
) -> _MinedBatch:
    is_open_I = np.ones(len(table.identities), dtype=np.bool_)
    is_open_I[rows_F] = False
    stale = np.flatnonzero(is_open_I)
    num_refreshed = min(round(config.table_refresh_share * num_pairs), len(stale))
    num_random = min(round(config.random_share * num_pairs), num_pairs - num_refreshed - 1)
    num_mined = num_pairs - num_refreshed - num_random

    # Each batch walks a part of its own: on the whole graph, walks would end in the same few hard classes.
    size = min(len(rows_F), max(num_mined, math.ceil(config.candidates_per_batch * len(rows_F))))
    subset = np.sort(generator.choice(len(rows_F), size, replace=False))
    found = best_first_classes(
        graph, num_mined, generator, hinge=config.hinge, margin=config.margin, extend=None, subset=subset
    )
    mined = rows_F[found.order]
    refreshed = generator.choice(stale, num_refreshed, replace=False)
    is_open_I[:] = True
    is_open_I[mined] = is_open_I[refreshed] = False
    random = generator.choice(np.flatnonzero(is_open_I), num_random, replace=False)
    return _MinedBatch(
        # Shuffled, because ranks take slices of the list: random classes and late finds go to all of them.
        identities=table.identities[generator.permutation(np.concatenate([mined, refreshed, random]))],
        rows=mined,
        mean_violation=float(found.violations[1:].mean()) if num_mined > 1 else 0.0,
        tie_share=found.ties / max(1, num_mined - 1),
    )


def _hardness(table: EmbeddingTable, mined: NDArray[np.int64], random: NDArray[np.int64]) -> dict[str, float]:
    """Return the N-pair loss of mined and of random classes on the table's entries; every rank must call it."""
    loss_mined, loss_random = (_npair_loss(*table.lookup(rows)) for rows in (mined, random))
    return {
        "mining/loss_mined": loss_mined,
        "mining/loss_random": loss_random,
        "mining/hardness": loss_mined - loss_random,
    }


def _npair_loss(anchors_ND: Tensor, positives_ND: Tensor) -> float:
    labels_N = torch.arange(len(anchors_ND), device=anchors_ND.device)
    return float(npair_mc_rows(anchors_ND, positives_ND, positives_ND, labels_N, labels_N).mean())
