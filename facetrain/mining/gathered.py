"""Gathered mining: all ranks embed a round's candidates, every rank holds them all, and each mines some batches.

Dims: I trained identities, C candidates of a round, B batches of a round, N identities of a batch, D embedding width.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facetrain.config import MiningConfig
from facetrain.data.index import ClassTable
from facetrain.losses.npair import npair_mc_rows
from facetrain.mining.greedy import greedy_classes
from facetrain.world import World

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
class _MinedBatch:
    """One batch as its rank mined it."""

    identities: NDArray[np.int64]
    mean_violation: float
    tie_share: float
    loss_mined: float
    loss_random: float


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

    The stats, apart from the seconds, are means over the batches: `mining/violation` of the added classes,
    `mining/tie_share` of classes drawn among equals, `mining/overlap` (share of a list found in another list, over
    all pairs of lists), `mining/loss_mined` and `mining/loss_random` (N-pair loss of the mined classes and of as many
    random candidates, on the embeddings mined from) and `mining/hardness`, the first less the second.

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
        ValueError: There are fewer candidates than pairs, or an embedding isn't finite.
    """
    num_candidates = min(config.candidates, len(identities))
    if num_candidates < num_pairs:
        raise ValueError(
            f"mining.candidates: expected at least train.global_pairs = {num_pairs} classes to choose from, got"
            f" {num_candidates} (mining.candidates = {config.candidates}, {len(identities)} trained identities)"
        )
    started_at = time.perf_counter()
    candidates_C, images_2C = _draw_candidates(_generator(seed, round_index, 0), num_candidates, table, identities)
    embeddings_2CD = embed(images_2C)
    # All ranks hold the same embeddings, so they all fail here, before any of them waits for lists.
    if not embeddings_2CD.isfinite().all():
        raise ValueError(f"mining round {round_index}: expected finite embeddings, got NaN or infinity")
    embedded_at = time.perf_counter()

    own = {
        b: _mine_batch(
            _generator(seed, round_index, 1 + b), config, num_pairs, candidates_C, embeddings_2CD, identities
        )
        for b in range(world.rank, config.batches_per_round, world.world_size)
    }
    mined_at = time.perf_counter()
    # Over all ranks; each ends with the batches of all. What was exchanged is the truth: no rank mines a batch again.
    batches = dict(pair for part in world.all_gather_object(own) for pair in part.items())
    exchanged_at = time.perf_counter()

    in_order = [batches[b] for b in range(config.batches_per_round)]
    stats = {
        "mining/round": float(round_index),
        "mining/candidates": float(num_candidates),
        "mining/embed_s": embedded_at - started_at,
        "mining/greedy_s": mined_at - embedded_at,
        "mining/exchange_s": exchanged_at - mined_at,
    }
    return MinedRound(np.stack([batch.identities for batch in in_order]), stats | _hardness_stats(in_order))


def _generator(seed: int, round_index: int, part: int) -> np.random.Generator:
    """Return the random numbers of a part of a round: 0 draws the candidates, 1 + b mines batch b."""
    return np.random.default_rng((seed, _MINING_STREAM, round_index, part))


def _draw_candidates(
    generator: np.random.Generator, num: int, table: ClassTable, identities: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw identities, int64 [C], and two distinct images of each, int64 [2C]: all first ones, then all second ones."""
    candidates_C = generator.choice(identities, num, replace=False)
    first_C = table.first_image[candidates_C]
    count_C = table.first_image[candidates_C + 1] - first_C
    assert count_C.min() >= 2, "identities with one image are left out of training"
    anchor_C = generator.integers(count_C)
    positive_C = generator.integers(count_C - 1)
    positive_C += positive_C >= anchor_C  # uniform over the other images
    return candidates_C, np.concatenate([first_C + anchor_C, first_C + positive_C])


def _mine_batch(
    generator: np.random.Generator,
    config: MiningConfig,
    num_pairs: int,
    candidates_C: NDArray[np.int64],
    embeddings_2CD: Tensor,
    identities: NDArray[np.int64],
) -> _MinedBatch:
    num_candidates = len(candidates_C)
    num_random = min(round(config.random_share * num_pairs), num_pairs - 1)
    num_mined = num_pairs - num_random
    # Each batch sees candidates of its own: from all of them, lists would fall into the same few hard classes.
    size = min(num_candidates, max(num_pairs, math.ceil(config.candidates_per_batch * num_candidates)))
    subset = generator.choice(num_candidates, size, replace=False)
    subset_on_device = torch.from_numpy(subset).to(embeddings_2CD.device)
    anchors_CD, positives_CD = embeddings_2CD.reshape(2, num_candidates, -1)[:, subset_on_device]

    found = greedy_classes(anchors_CD, positives_CD, num_mined, generator, hinge=config.hinge, margin=config.margin)
    mined = candidates_C[subset[found.order]]
    others = np.setdiff1d(identities, mined, assume_unique=True)
    chosen = np.concatenate([mined, generator.choice(others, num_random, replace=False)])
    random_rows = generator.choice(size, num_mined, replace=False)
    return _MinedBatch(
        # Shuffled, because ranks take slices of the list: random classes and late finds go to all of them.
        identities=generator.permutation(chosen),
        mean_violation=float(found.violations[1:].mean()) if num_mined > 1 else 0.0,
        tie_share=found.ties / max(1, num_mined - 1),
        loss_mined=_npair_loss(anchors_CD, positives_CD, found.order),
        loss_random=_npair_loss(anchors_CD, positives_CD, random_rows),
    )


@torch.no_grad()
def _npair_loss(anchors_CD: Tensor, positives_CD: Tensor, rows: NDArray[np.int64]) -> float:
    rows_N = torch.from_numpy(rows).to(anchors_CD.device)
    anchors_ND, positives_ND = anchors_CD[rows_N], positives_CD[rows_N]
    return float(npair_mc_rows(anchors_ND, positives_ND, positives_ND, rows_N, rows_N).mean())


def _hardness_stats(batches: list[_MinedBatch]) -> dict[str, float]:
    loss_mined = float(np.mean([batch.loss_mined for batch in batches]))
    loss_random = float(np.mean([batch.loss_random for batch in batches]))
    return {
        "mining/violation": float(np.mean([batch.mean_violation for batch in batches])),
        "mining/tie_share": float(np.mean([batch.tie_share for batch in batches])),
        "mining/overlap": mean_overlap(np.stack([batch.identities for batch in batches])),
        "mining/loss_mined": loss_mined,
        "mining/loss_random": loss_random,
        "mining/hardness": loss_mined - loss_random,
    }


def mean_overlap(identities_BN: NDArray[np.int64]) -> float:
    """Return the mean share of a list that another list holds too, over all pairs of lists; 0 for a single list.

    Args:
        identities_BN: int64; B lists of N identities, none twice in a list.
    """
    num_lists, length = identities_BN.shape
    if num_lists == 1:
        return 0.0
    # An identity that stands in k lists is shared by k (k - 1) / 2 pairs of lists.
    _, in_lists = np.unique(identities_BN, return_counts=True)
    return float((in_lists * (in_lists - 1)).sum() / (num_lists * (num_lists - 1) * length))
