"""Gathered mining: all ranks embed a round's candidates, every rank holds them all, and each mines some batches.

Dims: I trained identities, C candidates of a round, V images of a candidate (1 or 2: anchor, positive), B batches of a
round, N identities of a batch, D embedding width.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facetrain.config import MiningConfig
from facetrain.data.index import ClassTable
from facetrain.mining.best_first import Extend, NeighbourGraph, best_first_classes
from facetrain.mining.greedy import GreedyResult, greedy_classes
from facetrain.mining.lists import check_appearances, limit_appearances
from facetrain.mining.neighbours import graph_pays, neighbour_graph, neighbours_needed
from facetrain.mining.round import (
    JudgedBatch,
    MinedRound,
    draw_candidates,
    list_stats,
    mean_hardness,
    mine_over_ranks,
    npair_loss,
    num_random_classes,
    round_generator,
    selection_figures,
    subset_size,
)
from facetrain.mining.scores import on_grid
from facetrain.world import World


@dataclass(frozen=True)
class _Candidates:
    """What the batches of a round are mined from."""

    identities_C: NDArray[np.int64]  # noqa: N815 - dims as suffixes
    anchors_CD: Tensor  # noqa: N815
    """float64, on a grid, so that a graph of all and greedy selection among some see the same scores."""
    positives_CD: Tensor | None  # noqa: N815
    """float64, on a grid; None with one image a class."""
    graph: NeighbourGraph | None
    """None where greedy selection batch by batch is faster."""
    extend: Extend | None

    def select(
        self, subset: NDArray[np.int64], num: int, rng: np.random.Generator, config: MiningConfig
    ) -> GreedyResult:
        """Select hard classes among a rising subset of the candidates; the same ones with a graph and without."""
        if self.graph is not None:
            hinge, margin = config.hinge, config.margin
            return best_first_classes(
                self.graph, num, rng, hinge=hinge, margin=margin, extend=self.extend, subset=subset
            )
        rows = torch.from_numpy(subset).to(self.anchors_CD.device)
        found = greedy_classes(
            self.anchors_CD[rows],
            None if self.positives_CD is None else self.positives_CD[rows],
            num,
            rng,
            hinge=config.hinge,
            margin=config.margin,
            similarity_cap=config.similarity_cap,
        )
        return replace(found, order=subset[found.order])


def mine_round(
    round_index: int,
    config: MiningConfig,
    *,
    num_pairs: int,
    table: ClassTable,
    identities: NDArray[np.int64],
    embed: Callable[[NDArray[np.int64]], Tensor],
    seed: int,
    world: World,
) -> MinedRound:
    """Embed fresh candidates over all ranks and mine the identity lists of the round's batches.

    Batch b is seeded by (seed, round, b) and mined by rank b mod W, then the lists are exchanged: for the same
    embeddings they are the same for any W. Every rank must call this at the same step.

    The stats, apart from the seconds, are means over the batches: `mining/violation` of the classes added for their
    score, `mining/tie_share` of classes drawn among equals, `mining/filler_share` of classes for which the similarity
    cap left no other, `mining/overlap` (share of a list found in another list, over all pairs of lists),
    `mining/loss_mined` and `mining/loss_random` (N-pair loss of the mined classes and of as many random candidates,
    on the embeddings mined from) and `mining/hardness`, the first less the second. `mining/most_appearances` is how
    many lists the most frequent identity stands in.

    Args:
        round_index: Counts the rounds of a run from 0.
        config: Candidates, batches and score.
        num_pairs: N.
        table: Which images an identity has.
        identities: int64 [I]; the trained rows of the table, each with two images or more.
        embed: Image indices -> float32 [len, D] on every rank; shards the work over the ranks and gathers.
        seed: The run's seed.
        world: The ranks that share the work.

    Raises:
        ValueError: There are fewer candidates than pairs, too few identities for `mining.max_appearances`, or an
            embedding isn't finite.
    """
    num_candidates = min(config.candidates, len(identities))
    _check_sizes(config, num_candidates, num_pairs, len(identities))
    started_at = time.perf_counter()
    rng = round_generator(seed, round_index, 0)
    identities_C, images = draw_candidates(rng, num_candidates, table, identities, config.images_per_class)
    embeddings_VCD = embed(images).unflatten(0, (config.images_per_class, num_candidates))
    # All ranks hold the same embeddings, so they all fail here, before any of them waits for lists.
    if not embeddings_VCD.isfinite().all():
        raise ValueError(f"mining round {round_index}: expected finite embeddings, got NaN or infinity")
    embedded_at = time.perf_counter()

    candidates = _prepare(identities_C, embeddings_VCD, config, num_pairs, world)
    prepared_at = time.perf_counter()
    in_order, seconds = mine_over_ranks(
        lambda b: _mine_batch(
            round_generator(seed, round_index, 1 + b), config, num_pairs, candidates, embeddings_VCD, identities
        ),
        config.batches_per_round,
        world,
    )
    lists_BN = np.stack([batch.identities for batch in in_order])
    if config.max_appearances is not None:
        rng = round_generator(seed, round_index, 1 + config.batches_per_round)
        lists_BN = limit_appearances(lists_BN, config.max_appearances, identities, rng)
    stats = {
        "mining/round": float(round_index),
        "mining/candidates": float(num_candidates),
        "mining/embed_s": embedded_at - started_at,
        "mining/graph_s": prepared_at - embedded_at,
    }
    return MinedRound(lists_BN, stats | seconds | list_stats(in_order, lists_BN) | mean_hardness(in_order))


def _check_sizes(config: MiningConfig, num_candidates: int, num_pairs: int, num_identities: int) -> None:
    if num_candidates < num_pairs:
        raise ValueError(
            f"mining.candidates: expected at least train.global_pairs = {num_pairs} classes to choose from, got"
            f" {num_candidates} (mining.candidates = {config.candidates}, {num_identities} trained identities)"
        )
    if config.max_appearances is not None:
        check_appearances(config.max_appearances, config.batches_per_round, num_pairs, num_identities)


def _prepare(
    identities_C: NDArray[np.int64], embeddings_VCD: Tensor, config: MiningConfig, num_pairs: int, world: World
) -> _Candidates:
    """Round the embeddings, and build the graph over all ranks if the batches are many enough for it."""
    C = len(identities_C)
    anchors_CD = on_grid(embeddings_VCD[0])
    positives_CD = on_grid(embeddings_VCD[1]) if config.images_per_class == 2 else None
    graph, extend = None, None
    sizes = C, subset_size(config, num_pairs, C), num_pairs - num_random_classes(config, num_pairs)
    if graph_pays(*sizes, config.batches_per_round):
        graph, extend = neighbour_graph(
            anchors_CD,
            positives_CD,
            world,
            num_neighbours=neighbours_needed(*sizes),
            similarity_cap=config.similarity_cap,
        )
    return _Candidates(identities_C, anchors_CD, positives_CD, graph, extend)


def _mine_batch(
    generator: np.random.Generator,
    config: MiningConfig,
    num_pairs: int,
    candidates: _Candidates,
    embeddings_VCD: Tensor,
    identities: NDArray[np.int64],
) -> JudgedBatch:
    C = len(candidates.identities_C)
    num_random = num_random_classes(config, num_pairs)
    num_mined = num_pairs - num_random
    # Each batch sees candidates of its own: from all of them, lists would fall into the same few hard classes.
    subset = np.sort(generator.choice(C, subset_size(config, num_pairs, C), replace=False))

    found = candidates.select(subset, num_mined, generator, config)
    mined = candidates.identities_C[found.order]
    others = np.setdiff1d(identities, mined, assume_unique=True)
    chosen = np.concatenate([mined, generator.choice(others, num_random, replace=False)])
    random_rows = generator.choice(subset, num_mined, replace=False)
    return JudgedBatch(
        # Shuffled, because ranks take slices of the list: random classes and late finds go to all of them.
        identities=generator.permutation(chosen),
        **selection_figures(found),
        loss_mined=npair_loss(embeddings_VCD, found.order),
        loss_random=npair_loss(embeddings_VCD, random_rows),
    )
