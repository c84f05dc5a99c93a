"""The graph of candidate classes that best-first search walks: exact, computed by all ranks together.

Dims: C candidate classes, D embedding width, K neighbours of a class, q classes of one block.
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

NEIGHBOURS = 128
"""Neighbours per class: enough that few rows are read to their end, and at 8 bytes each small beside the embeddings."""


@torch.no_grad()
def neighbour_graph(
    anchors_CD: Tensor,
    positives_CD: Tensor | None,
    world: World,
    *,
    num_neighbours: int = NEIGHBOURS,
    similarity_cap: float | None = None,
) -> NeighbourGraph:
    """Find each class's hardest negatives among all candidates, exactly; every rank must call it.

    A rank takes C / W of the rows, and every rank ends with all of them. Costs C^2 D / W multiplications.

    Args:
        anchors_CD: one embedding of each class, the same on every rank.
        positives_CD: as in `greedy_classes`.
        world: The ranks that share the work.
        num_neighbours: K; all C where there are fewer.
        similarity_cap: as in `greedy_classes`.
    """
    anchors_CD = on_grid(anchors_CD)
    p_CD = anchors_CD if positives_CD is None else on_grid(positives_CD)
    C = len(anchors_CD)
    first, end = world.rank * C // world.world_size, (world.rank + 1) * C // world.world_size
    norm_a_C, norm_p_C = norms(anchors_CD), norms(p_CD)
    neighbours_qK, scores_qK, capped = [], [], []
    for rows, products_qC in similarity_blocks(anchors_CD[first:end], p_CD):
        top = products_qC.float().topk(min(num_neighbours, C))
        neighbours_qK.append(top.indices.int())
        scores_qK.append(top.values)
        if similarity_cap is not None:
            limits_q1 = similarity_cap * norm_a_C[first + rows.start : first + rows.stop, None]
            s_and_c = (products_qC > limits_q1 * norm_p_C).nonzero().int()
            s_and_c[:, 0] += first + rows.start
            capped.append(s_and_c)
    # Over all ranks, three times; every rank ends with the rows of all, in order.
    neighbours_CK = world.all_gather_uneven(torch.cat(neighbours_qK))
    scores_CK = world.all_gather_uneven(torch.cat(scores_qK))
    pairs_P2 = world.all_gather_uneven(torch.cat(capped)) if similarity_cap is not None else neighbours_CK.new_empty(0, 2)
    # The same products as in the rows, whichever way they are added: see on_grid.
    own_C = torch.zeros_like(norm_a_C) if positives_CD is None else (anchors_CD * p_CD).sum(dim=1)
    return NeighbourGraph(
        neighbours=neighbours_CK.cpu().numpy(),
        scores=scores_CK.cpu().numpy(),
        own=own_C.float().cpu().numpy(),
        capped=_by_class(pairs_P2.cpu().numpy()),
    )


def exact_rows(anchors_CD: Tensor, positives_CD: Tensor | None) -> Extend:
    """Return what makes the rows of `neighbour_graph` longer, one product with all positives each.

    The last 4,096 answers are kept, since the batches of a round meet the same hubs.
    """
    anchors_CD = on_grid(anchors_CD)
    p_CD = anchors_CD if positives_CD is None else on_grid(positives_CD)

    @lru_cache(maxsize=4096)
    @torch.no_grad()
    def extend(s: int, length: int) -> Row:
        top = (p_CD @ anchors_CD[s]).float().topk(length)
        return top.indices.int().cpu().numpy(), top.values.cpu().numpy()

    return extend


def _by_class(pairs_P2: NDArray[np.int32]) -> dict[int, NDArray[np.int32]]:
    """Sort (s, c) pairs, grouped by s, into the c of each s."""
    sources, starts = np.unique(pairs_P2[:, 0], return_index=True)
    return dict(zip(sources.tolist(), np.split(pairs_P2[:, 1], starts[1:]), strict=True)) if len(sources) else {}
