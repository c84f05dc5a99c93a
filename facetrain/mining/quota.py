"""Quota mining, for shards of which each rank holds a part: every batch takes as many classes from each part.

Identities belong to `mining.virtual_nodes` nodes, each rank holds as many of them, and each node's classes fill the
same rows of every batch, node after node: a rank embeds and trains on images of its own nodes alone, and no result
depends on W.

Dims: I trained identities, C candidates of a round, S of them that a batch is mined from, both node by node, V images
of a candidate (1 or 2: anchor, positive), B batches of a round, N identities of a batch, D embedding width.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facetrain.config import MiningConfig
from facetrain.data.index import ClassTable
from facetrain.mining.greedy import greedy_classes
from facetrain.mining.lists import appearances_needed, check_appearances, limit_appearances
from facetrain.mining.round import (
    MINING_STREAM,
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
from facetrain.world import World

_NODE_STREAM = 0x6E6F6465
"""Keeps the random numbers of the spread apart from those of rounds."""


def spread_identities(identities: NDArray[np.int64], num_nodes: int, seed: int) -> list[NDArray[np.int64]]:
    """Deal identities to virtual nodes at random by the seed: a list of V, ascending, sizes differing by one at most.

    At random, because by source or by name look-alikes would gather on a node and fill its quota with easy classes
    everywhere else.
    """
    dealt = np.random.default_rng((seed, _NODE_STREAM)).permutation(identities)
    return [np.sort(dealt[v::num_nodes]) for v in range(num_nodes)]


def can_fill(config: MiningConfig, num_pairs: int, num_identities: int) -> bool:
    """Return whether virtual nodes can fill their rows of a round's batches.

    Args:
        config: Virtual nodes, batches and `max_appearances`.
        num_pairs: N.
        num_identities: Those of the node that has the fewest.
    """
    quota = num_pairs // config.virtual_nodes
    if num_identities < quota:
        return False
    needed = appearances_needed(config.batches_per_round, quota, num_identities)
    return config.max_appearances is None or config.max_appearances >= needed


def mine_quota_round(
    round_index: int,
    config: MiningConfig,
    *,
    num_pairs: int,
    table: ClassTable,
    nodes: Sequence[NDArray[np.int64]],
    embed: Callable[[NDArray[np.int64]], Tensor],
    seed: int,
    world: World,
) -> MinedRound:
    """Mine the identity lists of a round's batches, as many classes of each virtual node in each.

    As `gathered.mine_round`, but each rank embeds the candidates of its own nodes, node by node, so that the
    embeddings don't depend on W. Over all ranks: an all-gather of the candidates' embeddings, 4 V C D bytes, and one of
    the lists.

    Lists are grouped by node. The batches of steps without a mined list are not: they are random, from all nodes.

    Args:
        round_index: Counts the rounds of a run from 0.
        config: Candidates, virtual nodes, batches and score.
        num_pairs: N.
        table: Which images an identity has.
        nodes: V times int64; the identities of each virtual node, trained rows of the table with two images or more.
        embed: Image indices -> float32 [len, D], by this rank alone; called once for each of its nodes.
        seed: The run's seed.
        world: The ranks that share the work.

    Raises:
        ValueError: The nodes don't divide N, W doesn't divide the nodes, a node has fewer candidates than it must give
            to a batch, or an embedding isn't finite.
    """
    num_nodes, quota = config.virtual_nodes, num_pairs // config.virtual_nodes
    num_candidates = min(config.candidates // num_nodes, min(len(node) for node in nodes))
    _check_sizes(config, num_pairs, num_candidates, nodes, world)
    started_at = time.perf_counter()
    drawn = [
        draw_candidates(
            np.random.default_rng((seed, MINING_STREAM, round_index, 0, v)),
            num_candidates,
            table,
            nodes[v],
            config.images_per_class,
        )
        for v in range(num_nodes)
    ]
    first, last = (rank * num_nodes // world.world_size for rank in (world.rank, world.rank + 1))
    own = torch.cat([embed(images) for _, images in drawn[first:last]])
    # Over all ranks, which hold as many nodes each; every rank ends with all candidates, node by node.
    by_node = world.all_gather(own).unflatten(0, (num_nodes, config.images_per_class, num_candidates))
    embeddings_VCD = by_node.transpose(0, 1).flatten(1, 2)
    if not embeddings_VCD.isfinite().all():
        raise ValueError(f"mining round {round_index}: expected finite embeddings, got NaN or infinity")
    embed_s = time.perf_counter() - started_at

    candidates_C = np.concatenate([candidates for candidates, _ in drawn])
    batches, seconds = mine_over_ranks(
        lambda b: _mine_batch(
            round_generator(seed, round_index, 1 + b), config, quota, candidates_C, embeddings_VCD, nodes
        ),
        config.batches_per_round,
        world,
    )
    lists_BN = np.stack([batch.identities for batch in batches])
    if config.max_appearances is not None:
        rng = round_generator(seed, round_index, 1 + config.batches_per_round)
        limited = zip(np.split(lists_BN, num_nodes, axis=1), nodes, strict=True)
        lists_BN = np.hstack([limit_appearances(part, config.max_appearances, node, rng) for part, node in limited])
    stats = {
        "mining/round": float(round_index),
        "mining/candidates": float(len(candidates_C)),
        "mining/embed_s": embed_s,
    }
    return MinedRound(lists_BN, stats | seconds | list_stats(batches, lists_BN) | mean_hardness(batches))


def _check_sizes(
    config: MiningConfig, num_pairs: int, num_candidates: int, nodes: Sequence[NDArray[np.int64]], world: World
) -> None:
    num_nodes, quota = len(nodes), num_pairs // len(nodes)
    if num_pairs % num_nodes or num_nodes % world.world_size:
        raise ValueError(
            f"mining.virtual_nodes: expected a divisor of train.global_pairs = {num_pairs} and a multiple of the"
            f" {world.world_size} processes, got {num_nodes}"
        )
    if num_candidates < quota:
        raise ValueError(
            f"mining.virtual_nodes: expected at least {quota} candidates in each of {num_nodes} nodes, got"
            f" {num_candidates} (mining.candidates = {config.candidates},"
            f" {sum(len(node) for node in nodes)} trained identities)"
        )
    if config.max_appearances is not None:
        check_appearances(config.max_appearances, config.batches_per_round, quota, min(len(n) for n in nodes))


def _mine_batch(
    generator: np.random.Generator,
    config: MiningConfig,
    quota: int,
    candidates_C: NDArray[np.int64],
    embeddings_VCD: Tensor,
    nodes: Sequence[NDArray[np.int64]],
) -> JudgedBatch:
    num_nodes, per_node = len(nodes), len(candidates_C) // len(nodes)
    num_random = num_random_classes(config, quota)
    num_mined = num_nodes * (quota - num_random)
    # Each batch sees candidates of its own, as many of each node.
    size = subset_size(config, quota, per_node)
    subset = np.concatenate([v * per_node + generator.choice(per_node, size, replace=False) for v in range(num_nodes)])
    embeddings_VSD = embeddings_VCD[:, torch.from_numpy(subset).to(embeddings_VCD.device)]
    node_S = np.repeat(np.arange(num_nodes), size)
    found = greedy_classes(
        embeddings_VSD[0],
        embeddings_VSD[1] if config.images_per_class == 2 else None,
        num_mined,
        generator,
        hinge=config.hinge,
        margin=config.margin,
        similarity_cap=config.similarity_cap,
        groups_C=node_S,
        group_quota=quota - num_random,
    )
    identities = []
    for v, node in enumerate(nodes):
        mined = candidates_C[subset[found.order[node_S[found.order] == v]]]
        others = np.setdiff1d(node, mined, assume_unique=True)
        random = generator.choice(others, num_random, replace=False)
        # Shuffled within the node's rows, which several ranks may share at another time: late finds go to all of them.
        identities.append(generator.permutation(np.concatenate([mined, random])))
    return JudgedBatch(
        identities=np.concatenate(identities),
        **selection_figures(found),
        loss_mined=npair_loss(embeddings_VSD, found.order),
        loss_random=npair_loss(embeddings_VSD, generator.choice(len(subset), num_mined, replace=False)),
    )
