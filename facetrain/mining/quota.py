"""Quota mining, for shards of which each rank holds a part: every batch takes as many classes from each part.

Identities belong to V virtual nodes, each rank holds V / W of them, and rows v N / V to (v + 1) N / V - 1 of a batch
are of node v: a rank embeds and trains on images of its own nodes alone, and no result depends on W.

Dims: I trained identities, V virtual nodes, c candidates of each node, C = V c, B batches of a round, N identities of
a batch, D embedding width.
"""

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facetrain.config import MiningConfig
from facetrain.data.index import ClassTable
from facetrain.mining.gathered import (
    _MINING_STREAM,
    MinedRound,
    _draw_candidates,
    _generator,
    _hardness_stats,
    _MinedBatch,
    _npair_loss,
)
from facetrain.mining.greedy import greedy_classes
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


def mine_quota_round(
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
    """Mine the identity lists of a round's batches, N / V classes of each virtual node in each.

    As `gathered.mine_round`, but each rank embeds the candidates of its own nodes, node by node, so that the
    embeddings don't depend on W. Over all ranks: an all-gather of the candidates' embeddings, 8 C D bytes, and one of
    the lists.

    Lists are grouped by node. The batches of steps without a mined list are not: they are random, from all nodes.

    Args:
        round_index: Counts the rounds of a run from 0.
        config: Candidates, virtual nodes, batches and score.
        num_pairs: N, a multiple of V.
        table: Which images an identity has.
        identities: int64 [I]; the trained rows of the table, each with two images or more.
        embed: Image indices -> float32 [len, D], by this rank alone; called once for each of its nodes.
        seed: The run's seed.
        world: The ranks that share the work; W divides V.

    Raises:
        ValueError: V doesn't divide N, W doesn't divide V, a node has fewer candidates than it must give to a batch,
            or an embedding isn't finite.
    """
    num_nodes, quota = config.virtual_nodes, num_pairs // config.virtual_nodes
    if num_pairs % num_nodes or num_nodes % world.world_size:
        raise ValueError(
            f"mining.virtual_nodes: expected a divisor of train.global_pairs = {num_pairs} and a multiple of the"
            f" {world.world_size} processes, got {num_nodes}"
        )
    nodes = spread_identities(identities, num_nodes, seed)
    num_candidates = min(config.candidates // num_nodes, len(nodes[-1]))
    if num_candidates < quota:
        raise ValueError(
            f"mining.virtual_nodes: expected at least {quota} candidates in each of {num_nodes} nodes, got"
            f" {num_candidates} (mining.candidates = {config.candidates}, {len(identities)} trained identities)"
        )
    started_at = time.perf_counter()
    drawn = [
        _draw_candidates(
            np.random.default_rng((seed, _MINING_STREAM, round_index, 0, v)), num_candidates, table, nodes[v]
        )
        for v in range(num_nodes)
    ]
    candidates_Vc = np.stack([candidates for candidates, _ in drawn])
    first, last = (rank * num_nodes // world.world_size for rank in (world.rank, world.rank + 1))
    own = torch.cat([embed(images) for _, images in drawn[first:last]])
    # Over all ranks, which hold as many nodes each; every rank ends with all candidates, node by node.
    embeddings_V2cD = world.all_gather(own).unflatten(0, (num_nodes, 2, num_candidates))
    if not embeddings_V2cD.isfinite().all():
        raise ValueError(f"mining round {round_index}: expected finite embeddings, got NaN or infinity")
    embedded_at = time.perf_counter()

    mined = {
        b: _mine_batch(_generator(seed, round_index, 1 + b), config, quota, candidates_Vc, embeddings_V2cD, nodes)
        for b in range(world.rank, config.batches_per_round, world.world_size)
    }
    mined_at = time.perf_counter()
    # Over all ranks; each ends with the batches of all. What was exchanged is the truth: no rank mines a batch again.
    batches = dict(pair for part in world.all_gather_object(mined) for pair in part.items())
    exchanged_at = time.perf_counter()

    in_order = [batches[b] for b in range(config.batches_per_round)]
    stats = {
        "mining/round": float(round_index),
        "mining/candidates": float(candidates_Vc.size),
        "mining/embed_s": embedded_at - started_at,
        "mining/greedy_s": mined_at - embedded_at,
        "mining/exchange_s": exchanged_at - mined_at,
    }
    return MinedRound(np.stack([batch.identities for batch in in_order]), stats | _hardness_stats(in_order))


def _mine_batch(
    generator: np.random.Generator,
    config: MiningConfig,
    quota: int,
    candidates_Vc: NDArray[np.int64],
    embeddings_V2cD: Tensor,
    nodes: list[NDArray[np.int64]],
) -> _MinedBatch:
    num_nodes, num_candidates = candidates_Vc.shape
    num_random = min(round(config.random_share * quota), quota - 1)
    num_mined = num_nodes * (quota - num_random)
    # Each batch sees candidates of its own, as many of each node.
    size = min(num_candidates, max(quota, math.ceil(config.candidates_per_batch * num_candidates)))
    subset_Vs = np.stack([generator.choice(num_candidates, size, replace=False) for _ in range(num_nodes)])
    candidates_C = np.take_along_axis(candidates_Vc, subset_Vs, axis=1).ravel()
    node_C = np.repeat(np.arange(num_nodes), size)
    rows_C = torch.from_numpy(subset_Vs.ravel()).to(embeddings_V2cD.device)
    anchors_CD, positives_CD = (
        embeddings_V2cD[torch.from_numpy(node_C).to(rows_C.device), view, rows_C] for view in range(2)
    )
    found = greedy_classes(
        anchors_CD,
        positives_CD,
        num_mined,
        generator,
        hinge=config.hinge,
        margin=config.margin,
        groups_C=node_C,
        group_quota=quota - num_random,
    )
    mined_by_node = [candidates_C[found.order[node_C[found.order] == v]] for v in range(num_nodes)]
    others_by_node = [np.setdiff1d(nodes[v], mined_by_node[v], assume_unique=True) for v in range(num_nodes)]
    random_rows = generator.choice(len(candidates_C), num_mined, replace=False)
    return _MinedBatch(
        # Shuffled within a node, whose rows ranks may share with its images in memory.
        identities=np.concatenate(
            [
                generator.permutation(np.concatenate([mined, generator.choice(others, num_random, replace=False)]))
                for mined, others in zip(mined_by_node, others_by_node, strict=True)
            ]
        ),
        mean_violation=float(found.violations[1:].mean()) if num_mined > 1 else 0.0,
        tie_share=found.ties / max(1, num_mined - 1),
        loss_mined=_npair_loss(anchors_CD, positives_CD, found.order),
        loss_random=_npair_loss(anchors_CD, positives_CD, random_rows),
    )
