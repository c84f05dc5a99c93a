"""The graph of candidate classes that best-first search walks: exact, computed by all ranks together.

Dims: C candidate classes, D embedding width, K neighbours of a class, q classes of a rank or a block, P capped pairs.
"""

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facetrain.mining.best_first import Extend, NeighbourGraph, Row
from facetrain.mining.scores import norms, on_grid
from facetrain.search import similarity_blocks
from facetrain.world import World

GRAPH_BYTES = 256 * 2**20
"""Bound on the memory of a graph on the host, 8 bytes a neighbour."""

KEPT_ROWS_BYTES = 256 * 2**20
"""Bound on the memory of the rows that were computed anew and are kept."""

PRODUCTS_PER_GREEDY_PRODUCT = 5
"""Products of a graph in the time of one of greedy selection: measured by benchmarks/mining.py."""


def graph_pays(num_candidates: int, subset_size: int, num_mined: int, num_batches: int) -> bool:
    """Return whether a graph shared by a round's batches takes less time than greedy selection batch by batch.

    The graph costs C^2 products of rows, computed in blocks, whatever the batches are. Greedy costs `num_mined` times
    `subset_size` of them a batch, one row at a time, which waits for memory: each takes as long as
    `PRODUCTS_PER_GREEDY_PRODUCT` of the graph's. Both are shared by the ranks, so that W doesn't matter.
    """
    greedy = num_batches * num_mined * subset_size
    return PRODUCTS_PER_GREEDY_PRODUCT * greedy >= num_candidates**2


def neighbours_needed(num_candidates: int, subset_size: int, num_mined: int) -> int:
    """Return how many neighbours a class should have for batches of `num_mined` classes out of subsets.

    A row runs dry when all its classes are selected already, or lie outside the batch's subset: not before `num_mined`
    of the subset are in it. Where memory allows no more than `GRAPH_BYTES`, some rows will have to be computed anew.
    """
    wanted = max(128, 11 * num_mined * num_candidates // (10 * subset_size))  # a tenth more: subsets are random
    return max(1, min(num_candidates, wanted, GRAPH_BYTES // (8 * num_candidates)))


@torch.no_grad()
def neighbour_graph(
    anchors_CD: Tensor,
    positives_CD: Tensor | None,
    world: World,
    *,
    num_neighbours: int,
    similarity_cap: float | None = None,
) -> tuple[NeighbourGraph, Extend]:
    """Find each class's hardest negatives among all candidates, exactly; every rank must call it.

    A rank takes C / W of the rows, and every rank ends with all of them. Costs C^2 D / W multiplications.

    Args:
        anchors_CD: one embedding of each class, the same on every rank.
        positives_CD: as in `greedy_classes`.
        world: The ranks that share the work.
        num_neighbours: K, see `neighbours_needed`; all C where there are fewer.
        similarity_cap: as in `greedy_classes`.

    Returns:
        The graph, and what makes its rows longer: one product with all positives each.
    """
    anchors_CD = on_grid(anchors_CD)
    p_CD = anchors_CD if positives_CD is None else on_grid(positives_CD)
    C = len(anchors_CD)
    first, end = world.rank * C // world.world_size, (world.rank + 1) * C // world.world_size
    K, norm_a_C, norm_p_C = min(num_neighbours, C), norms(anchors_CD), norms(p_CD)
    neighbours_qK = torch.empty(end - first, K, dtype=torch.int32, device=anchors_CD.device)
    scores_qK = torch.empty(end - first, K, device=anchors_CD.device)
    capped = [neighbours_qK.new_empty(0, 2)]
    for rows, products_qC in similarity_blocks(anchors_CD[first:end], p_CD):
        top = products_qC.float().topk(K)
        neighbours_qK[rows], scores_qK[rows] = top.indices.int(), top.values
        if similarity_cap is not None:
            limits_q1 = similarity_cap * norm_a_C[first:end][rows, None]
            pairs_P2 = (products_qC > limits_q1 * norm_p_C).nonzero().int()
            pairs_P2[:, 0] += first + rows.start
            capped.append(pairs_P2)
    # Over all ranks, three times; every rank ends with the rows of all, in order.
    neighbours_CK = world.all_gather_uneven(neighbours_qK)
    scores_CK = world.all_gather_uneven(scores_qK)
    pairs_P2 = world.all_gather_uneven(torch.cat(capped))
    # The same products as in the rows, whichever way they are added: see on_grid.
    own_C = torch.zeros_like(norm_a_C) if positives_CD is None else (anchors_CD * p_CD).sum(dim=1)
    graph = NeighbourGraph(
        neighbours=neighbours_CK.cpu().numpy(),
        scores=scores_CK.cpu().numpy(),
        own=own_C.float().cpu().numpy(),
        capped=by_class(pairs_P2.cpu().numpy()),
    )
    return graph, _exact_rows(anchors_CD, p_CD)


def _exact_rows(anchors_CD: Tensor, p_CD: Tensor) -> Extend:
    row_bytes = 8 * len(anchors_CD)  # of a whole one: index and score

    @lru_cache(maxsize=max(1, KEPT_ROWS_BYTES // row_bytes))  # the batches of a round meet the same hubs
    @torch.no_grad()
    def extend(s: int, length: int) -> Row:
        top = (p_CD @ anchors_CD[s]).float().topk(length)
        return top.indices.int().cpu().numpy(), top.values.cpu().numpy()

    return extend


def by_class(pairs_P2: NDArray[np.int32]) -> dict[int, NDArray[np.int32]]:
    """Sort (s, c) pairs, grouped by s, into the c of each s."""
    sources, starts = np.unique(pairs_P2[:, 0], return_index=True)
    return dict(zip(sources.tolist(), np.split(pairs_P2[:, 1], starts[1:]), strict=True)) if len(sources) else {}
