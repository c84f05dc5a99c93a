"""The graph of classes that best-first search walks, approximate, for more classes than all products can be made of.

Dims: F identities fresh in the table, K neighbours, L clusters, P probed ones, S sampled classes, b classes of a block,
D embedding width.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facetrain.mining.best_first import NeighbourGraph
from facetrain.mining.cluster_search import neighbours_in_clusters
from facetrain.mining.embedding_table import EmbeddingTable
from facetrain.mining.neighbours import by_class
from facetrain.search import top_k, unit_centres

_RECALL_SAMPLE = 128
"""Classes whose true neighbours are computed beside an approximate graph, to say how good it is."""

_CENTRE_SAMPLE = 40
"""Positives per cluster that the clusters are made from."""


def approximate_graph(
    table: EmbeddingTable,
    rows_F: NDArray[np.int64],
    *,
    num_neighbours: int,
    probes: int,
    similarity_cap: float | None,
    generator: np.random.Generator,
) -> tuple[NeighbourGraph, float]:
    """Find about the `num_neighbours` classes c of largest <a_s, p_c> for each class s among rows of the table.

    A class looks into the `probes` most promising of 4 sqrt(F) clusters of positives: an approximation, whose recall is
    measured on 128 classes. For the same embeddings it is the same at any number of ranks.

    Over all ranks: all embeddings, 4 F D bytes in bfloat16, which every rank then holds on its device; the clusters of
    the classes; and the neighbours, W * 8 F K bytes. The products, about 4 F sqrt(F) D / 16 multiplications a probe,
    are shared by the ranks.

    Args:
        table: Owns the embeddings.
        rows_F: int64, ascending, the same on every rank; more than one.
        num_neighbours: K; F - 1 where there are fewer other classes.
        probes: Clusters that are searched.
        similarity_cap: As in `greedy_classes`, but among the K neighbours alone.
        generator: Draws samples and clusters; of the same state on every rank.

    Returns:
        The graph over 0 .. F - 1, and the share of the sampled classes' true neighbours that is in it.
    """
    num_neighbours = min(num_neighbours, len(rows_F) - 1)
    judged = generator.choice(len(rows_F), min(len(rows_F), _RECALL_SAMPLE), replace=False)
    truth = _Truth(table, rows_F, judged, num_neighbours)
    centres_LD = _centres(table, rows_F, generator)
    embeddings_2FD = table.empty(2, len(rows_F))
    anchors_FD, positives_FD = embeddings_2FD.unbind()
    for piece, block_2bD in table.embedding_blocks(rows_F):
        embeddings_2FD[:, piece] = block_2bD
        truth.add(piece.start, block_2bD[1].float())
    cluster_F, probed_FP, own, norm_a_F, norm_p_F = _columns(table, rows_F, centres_LD, min(probes, len(centres_LD)))
    neighbours, scores = neighbours_in_clusters(
        anchors_FD, positives_FD, cluster_F, probed_FP, num_neighbours=num_neighbours, world=table.world
    )
    capped = {}
    if similarity_cap is not None:
        cosines = scores / (norm_a_F[:, None] * norm_p_F[neighbours])
        s, k = (cosines > similarity_cap).nonzero(as_tuple=True)
        capped = by_class(torch.stack([s.int(), neighbours[s, k]], dim=1).cpu().numpy())
    graph = NeighbourGraph(neighbours.cpu().numpy(), scores.cpu().numpy(), own.cpu().numpy(), capped)
    return graph, truth.share_in(graph)


def _centres(table: EmbeddingTable, rows_F: NDArray[np.int64], generator: np.random.Generator) -> Tensor:
    """Return cluster centres of a sample of the positives; made by rank 0, the same on every rank."""
    num_clusters = round(4 * math.sqrt(len(rows_F)))
    sample = generator.choice(rows_F, min(len(rows_F), _CENTRE_SAMPLE * num_clusters), replace=False)
    seed = int(generator.integers(1 << 31))
    _, positives_SD = table.lookup(sample)
    num_clusters = min(num_clusters, len(sample))
    return table.world.on_main(lambda: unit_centres(positives_SD, num_clusters, seed=seed).cpu()).to(
        positives_SD.device
    )


def _columns(
    table: EmbeddingTable, rows_F: NDArray[np.int64], centres_LD: Tensor, num_probes: int
) -> tuple[Tensor, ...]:
    """Return for each class its positive's cluster, the clusters that it probes [F, P], its own score, both norms.

    Each rank finds those of the classes that it owns, block by block, so that products are the same at any number of
    ranks; then an all-gather of each, after which every rank has all.
    """
    blocks = []
    for owner, piece in table.blocks(rows_F):
        if owner == table.world.rank:
            anchors_bD, positives_bD = table.own(rows_F[piece])
            cluster_b1 = top_k(positives_bD, centres_LD, 1)[1]
            probed_bP = top_k(anchors_bD, centres_LD, num_probes)[1]
            own_b = (anchors_bD * positives_bD).sum(dim=1)
            norms = (torch.linalg.vector_norm(x_bD, dim=1) for x_bD in (anchors_bD, positives_bD))
            blocks.append((cluster_b1[:, 0], probed_bP, own_b, *norms))
    if not blocks:  # a rank that owns no fresh class
        none, device = torch.empty(0, device=table.world.device), table.world.device
        indices = torch.empty(0, num_probes, dtype=torch.int64, device=device)
        blocks.append((torch.empty(0, dtype=torch.int64, device=device), indices, none, none, none))
    return tuple(table.world.all_gather_uneven(torch.cat(column)) for column in zip(*blocks, strict=True))


class _Truth:
    """The true neighbours of a few classes, found while the positives pass by; every rank finds the same."""

    def __init__(
        self, table: EmbeddingTable, rows_F: NDArray[np.int64], sample_S: NDArray[np.int64], num_neighbours: int
    ) -> None:
        self._sample_S = sample_S
        self._anchors_SD, _ = table.lookup(rows_F[sample_S])
        # The class itself can be among them, and is taken out at the end.
        self._scores_SK = self._anchors_SD.new_full((len(sample_S), num_neighbours + 1), -torch.inf)
        self._classes_SK = torch.full(self._scores_SK.shape, -1, device=self._scores_SK.device)

    def add(self, first: int, positives_bD: Tensor) -> None:
        """Look at the positives of classes first, first + 1, .."""
        scores = torch.cat([self._scores_SK, self._anchors_SD @ positives_bD.T], dim=1)
        classes = torch.arange(first, first + len(positives_bD), device=scores.device).expand(len(scores), -1)
        self._scores_SK, order = scores.topk(self._scores_SK.shape[1], dim=1)
        self._classes_SK = torch.cat([self._classes_SK, classes], dim=1).gather(1, order)

    def share_in(self, graph: NeighbourGraph) -> float:
        """Return the share of the true neighbours that a graph has."""
        shares = []
        for s, classes in zip(self._sample_S.tolist(), self._classes_SK.tolist(), strict=True):
            others = [c for c in classes if c != s][: graph.neighbours.shape[1]]
            shares.append(np.isin(others, graph.neighbours[s]).mean())
        return float(np.mean(shares))
