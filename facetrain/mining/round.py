"""What the rounds of all mining modes share: when they take place, what a batch is drawn from, and what they report.

Dims: C candidates of a round, V images of a candidate (1 or 2: anchor, positive), B batches of a round, N identities of
a batch, D embedding width.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facetrain.config import MiningConfig
from facetrain.data.index import ClassTable
from facetrain.losses.logit_tiles import one_vs_all, sum_of_rows
from facetrain.mining.greedy import GreedyResult
from facetrain.mining.lists import mean_overlap
from facetrain.world import World

BatchT = TypeVar("BatchT")

MINING_STREAM = 0x6D696E65
"""Keeps the random numbers of mining apart from those that the plan draws from the same seed."""


@dataclass(frozen=True)
class MinedRound:
    """The identity lists of one round's batches, the same on every rank."""

    identities_BN: NDArray[np.int64]  # noqa: N815 - dims as suffixes
    """int64; rows of the class table, none twice in a batch."""

    stats: dict[str, float]
    """Metrics of the round: sizes, seconds, and how hard the lists are; see `gathered.mine_round`."""


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
class MinedBatch:
    """One batch as its rank mined it."""

    identities: NDArray[np.int64]
    """int64 [N]; rows of the class table."""
    mean_violation: float
    """Mean score of the classes that were added for their score."""
    tie_share: float
    """Share of classes drawn among equals."""
    filler_share: float
    """Share of classes drawn at random, because no other was left to be scored."""


def selection_figures(found: GreedyResult) -> dict[str, float]:
    """Return the fields of a MinedBatch that say how its classes were found; the first is drawn at random anyway."""
    num_added = max(1, len(found.order) - 1)
    return {
        "mean_violation": found.mean_violation,
        "tie_share": found.ties / num_added,
        "filler_share": found.fillers / num_added,
    }


@dataclass(frozen=True)
class JudgedBatch(MinedBatch):
    """A mined batch, and how hard it is."""

    loss_mined: float
    """N-pair loss of the mined classes, on the embeddings mined from."""
    loss_random: float
    """The same of as many random candidates."""


def round_generator(seed: int, round_index: int, part: int) -> np.random.Generator:
    """Return the random numbers of a part of a round: 0 draws candidates, 1 + b mines batch b, 1 + B limits."""
    return np.random.default_rng((seed, MINING_STREAM, round_index, part))


def draw_candidates(
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


def num_random_classes(config: MiningConfig, num_classes: int) -> int:
    """Return how many of `num_classes` are drawn at random (`mining.random_share`); one at least is mined."""
    return min(round(config.random_share * num_classes), num_classes - 1)


def subset_size(config: MiningConfig, fewest: int, num_candidates: int) -> int:
    """Return from how many of the candidates a batch is mined (`mining.candidates_per_batch`), `fewest` at least."""
    return min(num_candidates, max(fewest, math.ceil(config.candidates_per_batch * num_candidates)))


def mine_over_ranks(
    mine: Callable[[int], BatchT], num_batches: int, world: World
) -> tuple[list[BatchT], dict[str, float]]:
    """Mine batch b on rank b mod W, by `mine(b)`, and exchange the results.

    Over all ranks; every rank ends with all batches in order. What was exchanged is the truth: no rank mines a batch
    again, so that nothing depends on what another would have found.

    Returns:
        The batches, and the seconds of both parts as metrics.
    """
    started_at = time.perf_counter()
    own = {b: mine(b) for b in range(world.rank, num_batches, world.world_size)}
    mined_at = time.perf_counter()
    batches = dict(pair for part in world.all_gather_object(own) for pair in part.items())
    seconds = {"mining/search_s": mined_at - started_at, "mining/exchange_s": time.perf_counter() - mined_at}
    return [batches[b] for b in range(num_batches)], seconds


@torch.no_grad()
def npair_loss(embeddings_VCD: Tensor, rows: NDArray[np.int64]) -> float:
    """Return the mean N-pair loss of some classes among themselves."""
    rows_N = torch.from_numpy(rows).to(embeddings_VCD.device)
    anchors_ND, positives_ND = embeddings_VCD[0, rows_N], embeddings_VCD[-1, rows_N]
    return float(sum_of_rows(one_vs_all, anchors_ND, positives_ND, rows_N, rows_N)) / len(rows_N)


def list_stats(batches: Sequence[MinedBatch], lists_BN: NDArray[np.int64]) -> dict[str, float]:
    """Return the metrics of how the lists were found, and how much they share."""
    return {
        "mining/violation": float(np.mean([batch.mean_violation for batch in batches])),
        "mining/tie_share": float(np.mean([batch.tie_share for batch in batches])),
        "mining/filler_share": float(np.mean([batch.filler_share for batch in batches])),
        "mining/overlap": mean_overlap(lists_BN),
        "mining/most_appearances": float(np.unique(lists_BN, return_counts=True)[1].max()),
    }


def hardness_stats(loss_mined: float, loss_random: float) -> dict[str, float]:
    """Return the metrics of how hard mined batches are."""
    return {
        "mining/loss_mined": loss_mined,
        "mining/loss_random": loss_random,
        "mining/hardness": loss_mined - loss_random,
    }


def mean_hardness(batches: Sequence[JudgedBatch]) -> dict[str, float]:
    """Return the metrics of how hard a round's batches are, on average."""
    return hardness_stats(
        float(np.mean([batch.loss_mined for batch in batches])),
        float(np.mean([batch.loss_random for batch in batches])),
    )
