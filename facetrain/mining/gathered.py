"""Gathered mining: all ranks embed a round's candidates, every rank holds them all, and each mines some batches.

Dims: I trained identities, C candidates of a round, V images of a candidate (1 or 2: anchor, positive), B batches of a
round, N identities of a batch, D embedding width.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facetrain.config import MiningConfig
from facetrain.data.index import ClassTable
from facetrain.losses.npair import npair_mc_rows
from facetrain.mining.best_first import Extend, NeighbourGraph, best_first_classes
from facetrain.mining.greedy import GreedyResult, greedy_classes
from facetrain.mining.lists import check_appearances, limit_appearances, mean_overlap
from facetrain.mining.neighbours import graph_pays, neighbour_graph, neighbours_needed
from facetrain.mining.scores import on_grid
from facetrain.world import World

GATHERED_LIMIT = 100_000
"""Trained identities up to which mode 'auto' takes gathered mining without further words."""

_MINING_STREAM = 0x6D696E65
"""Keeps the random numbers of mining apart from those that the plan draws from the same seed."""


@dataclass(frozen=True)
class MinedRound:
    """The identity lists of one round's batches, the same on every rank."""

    identities_BN: NDArray[np.int64]  # noqa: N815 - dims as suffixes
    """int64; rows of the class table, none twice in a batch."""

    stats: dict[str, float]
    """Metrics of the round: sizes, seconds, and how hard the lists are; see `mine_round`."""


@dataclass(frozen=True)
class MiningSchedule:
    """When rounds take place and which steps they serve; a function of the config alone."""

    config: MiningConfig

    def round_at(self, step: int) -> int | None:
        """Return the round to mine just before `step`, or None."""
        round_index, rest = divmod(step - self.config.warmup_steps, self.config.batches_per_round)
        return round_index if round_index >= 0 and rest == 0 else None

    def first_served_step(self, round_index: int) -> int:
        """Return the step whose batch is the first list of the round; its other lists follow step by step."""
        mined_before = self.config.warmup_steps + round_index * self.config.batches_per_round
        return mined_before + self.config.lag_steps


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


@dataclass(frozen=True)
class _MinedBatch:
    """One batch as its rank mined it."""

    identities: NDArray[np.int64]
    mean_violation: float
    tie_share: float
    filler_share: float
    loss_mined: float
    loss_random: float


def choose_mode(config: MiningConfig, num_identities: int) -> tuple[str, str]:
    """Return the mode that mining runs in and the reason in one line, for the log."""
    if config.mode != "auto":
        return config.mode, "mining.mode asks for it"
    held = min(config.candidates, num_identities)
    if num_identities <= GATHERED_LIMIT:
        return "gathered", f"{num_identities} identities: every rank can hold the embeddings of {held} candidates"
    return "gathered", (
        f"{num_identities} identities are more than gathered mining is made for ({GATHERED_LIMIT}), but mode 'table'"
        f" doesn't exist yet: each round sees {held} of them"
    )


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
    rng = _generator(seed, round_index, 0)
    identities_C, images = _draw_candidates(rng, num_candidates, table, identities, config.images_per_class)
    embeddings_VCD = embed(images).unflatten(0, (config.images_per_class, num_candidates))
    # All ranks hold the same embeddings, so they all fail here, before any of them waits for lists.
    if not embeddings_VCD.isfinite().all():
        raise ValueError(f"mining round {round_index}: expected finite embeddings, got NaN or infinity")
    embedded_at = time.perf_counter()

    candidates = _prepare(identities_C, embeddings_VCD, config, num_pairs, world)
    prepared_at = time.perf_counter()
    own = {
        b: _mine_batch(_generator(seed, round_index, 1 + b), config, num_pairs, candidates, embeddings_VCD, identities)
        for b in range(world.rank, config.batches_per_round, world.world_size)
    }
    mined_at = time.perf_counter()
    # Over all ranks; each ends with the batches of all. What was exchanged is the truth: no rank mines a batch again.
    batches = dict(pair for part in world.all_gather_object(own) for pair in part.items())
    exchanged_at = time.perf_counter()

    in_order = [batches[b] for b in range(config.batches_per_round)]
    lists_BN = np.stack([batch.identities for batch in in_order])
    if config.max_appearances is not None:
        rng = _generator(seed, round_index, 1 + config.batches_per_round)
        lists_BN = limit_appearances(lists_BN, config.max_appearances, identities, rng)
    stats = {
        "mining/round": float(round_index),
        "mining/candidates": float(num_candidates),
        "mining/embed_s": embedded_at - started_at,
        "mining/graph_s": prepared_at - embedded_at,
        "mining/search_s": mined_at - prepared_at,
        "mining/exchange_s": exchanged_at - mined_at,
        "mining/overlap": mean_overlap(lists_BN),
        "mining/most_appearances": float(np.unique(lists_BN, return_counts=True)[1].max()),
    }
    return MinedRound(lists_BN, stats | _hardness_stats(in_order))


def _check_sizes(config: MiningConfig, num_candidates: int, num_pairs: int, num_identities: int) -> None:
    if num_candidates < num_pairs:
        raise ValueError(
            f"mining.candidates: expected at least train.global_pairs = {num_pairs} classes to choose from, got"
            f" {num_candidates} (mining.candidates = {config.candidates}, {num_identities} trained identities)"
        )
    if config.max_appearances is not None:
        check_appearances(config.max_appearances, config.batches_per_round, num_pairs, num_identities)


def _generator(seed: int, round_index: int, part: int) -> np.random.Generator:
    """Return the random numbers of a part of a round: 0 draws the candidates, 1 + b mines batch b, 1 + B limits."""
    return np.random.default_rng((seed, _MINING_STREAM, round_index, part))


def _draw_candidates(
    generator: np.random.Generator,
    num: int,
    table: ClassTable,
    identities: NDArray[np.int64],
    images_per_class: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw identities, int64 [C], and one or two distinct images of each: all first ones, then all second ones."""
    identities_C = generator.choice(identities, num, replace=False)
    first_C = table.first_image[identities_C]
    count_C = table.first_image[identities_C + 1] - first_C
    assert count_C.min() >= 2, "identities with one image are left out of training"
    anchor_C = generator.integers(count_C)
    if images_per_class == 1:
        return identities_C, first_C + anchor_C
    positive_C = generator.integers(count_C - 1)
    positive_C += positive_C >= anchor_C  # uniform over the other images
    return identities_C, np.concatenate([first_C + anchor_C, first_C + positive_C])


def _prepare(
    identities_C: NDArray[np.int64], embeddings_VCD: Tensor, config: MiningConfig, num_pairs: int, world: World
) -> _Candidates:
    """Round the embeddings, and build the graph over all ranks if the batches are many enough for it."""
    C = len(identities_C)
    anchors_CD = on_grid(embeddings_VCD[0])
    positives_CD = on_grid(embeddings_VCD[1]) if config.images_per_class == 2 else None
    graph, extend = None, None
    sizes = C, _subset_size(config, num_pairs, C), num_pairs - _num_random(config, num_pairs)
    if graph_pays(*sizes, config.batches_per_round):
        graph, extend = neighbour_graph(
            anchors_CD,
            positives_CD,
            world,
            num_neighbours=neighbours_needed(*sizes),
            similarity_cap=config.similarity_cap,
        )
    return _Candidates(identities_C, anchors_CD, positives_CD, graph, extend)


def _num_random(config: MiningConfig, num_pairs: int) -> int:
    return min(round(config.random_share * num_pairs), num_pairs - 1)


def _subset_size(config: MiningConfig, num_pairs: int, num_candidates: int) -> int:
    return min(num_candidates, max(num_pairs, math.ceil(config.candidates_per_batch * num_candidates)))


def _mine_batch(
    generator: np.random.Generator,
    config: MiningConfig,
    num_pairs: int,
    candidates: _Candidates,
    embeddings_VCD: Tensor,
    identities: NDArray[np.int64],
) -> _MinedBatch:
    C = len(candidates.identities_C)
    num_random = _num_random(config, num_pairs)
    num_mined = num_pairs - num_random
    # Each batch sees candidates of its own: from all of them, lists would fall into the same few hard classes.
    subset = np.sort(generator.choice(C, _subset_size(config, num_pairs, C), replace=False))

    found = candidates.select(subset, num_mined, generator, config)
    mined = candidates.identities_C[found.order]
    others = np.setdiff1d(identities, mined, assume_unique=True)
    chosen = np.concatenate([mined, generator.choice(others, num_random, replace=False)])
    random_rows = generator.choice(subset, num_mined, replace=False)
    return _MinedBatch(
        # Shuffled, because ranks take slices of the list: random classes and late finds go to all of them.
        identities=generator.permutation(chosen),
        mean_violation=found.mean_violation,
        tie_share=found.ties / max(1, num_mined - 1),
        filler_share=found.fillers / max(1, num_mined - 1),
        loss_mined=_npair_loss(embeddings_VCD, found.order),
        loss_random=_npair_loss(embeddings_VCD, random_rows),
    )


@torch.no_grad()
def _npair_loss(embeddings_VCD: Tensor, rows: NDArray[np.int64]) -> float:
    rows_N = torch.from_numpy(rows).to(embeddings_VCD.device)
    anchors_ND, positives_ND = embeddings_VCD[0, rows_N], embeddings_VCD[-1, rows_N]
    return float(npair_mc_rows(anchors_ND, positives_ND, positives_ND, rows_N, rows_N).mean())


def _hardness_stats(batches: list[_MinedBatch]) -> dict[str, float]:
    loss_mined = float(np.mean([batch.loss_mined for batch in batches]))
    loss_random = float(np.mean([batch.loss_random for batch in batches]))
    return {
        "mining/violation": float(np.mean([batch.mean_violation for batch in batches])),
        "mining/tie_share": float(np.mean([batch.tie_share for batch in batches])),
        "mining/filler_share": float(np.mean([batch.filler_share for batch in batches])),
        "mining/loss_mined": loss_mined,
        "mining/loss_random": loss_random,
        "mining/hardness": loss_mined - loss_random,
    }
