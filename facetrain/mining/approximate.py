"""The graph of classes that best-first search walks, approximate, for more classes than all products can be made of.

Dims: I trained identities, F of them fresh in the table, K neighbours, S sampled classes, D embedding width.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facetrain.mining.best_first import NeighbourGraph
from facetrain.mining.embedding_table import EmbeddingTable
from facetrain.mining.neighbours import by_class
from facetrain.search import ClusteredIndex, unit_centres

_RECALL_SAMPLE = 128
"""Classes whose true neighbours are computed beside an approximate graph, to say how good it is."""

_CENTRE_SAMPLE = 40
"""Positives per cluster that the clusters of an approximate graph are made from; k-means asks for 39 at least."""


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

    FAISS looks into the `probes` most promising of 4 sqrt(F) clusters of positives: an approximation, whose recall is
    measured on 128 classes. Each rank searches for the classes whose rows it owns, block by block, so that queries
    come in the same blocks, and give the same scores, at any number of ranks.

    Over all ranks: the positives (`EmbeddingTable.positive_blocks`), of which every rank makes an index, some 4 F D
    bytes on the host, half of them reserve of lists that grow; then an all-gather of the graph, 8 F K bytes, after
    which every rank has the whole graph on the host.

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
    index = _empty_index(table, rows_F, generator)
    norms = []
    for piece, block in table.positive_blocks(rows_F):
        index.add(block)
        truth.add(piece.start, block)
        norms.append(torch.linalg.vector_norm(block, dim=1))
    rows = _own_rows(table, rows_F, index, num_neighbours, probes)
    neighbours, scores, own, norm_a_F = (table.world.all_gather_uneven(column).cpu() for column in rows)
    capped = {}
    if similarity_cap is not None:
        cosines = scores / (norm_a_F[:, None] * torch.cat(norms).cpu()[neighbours])
        s, k = (cosines > similarity_cap).nonzero(as_tuple=True)
        capped = by_class(torch.stack([s.int(), neighbours[s, k]], dim=1).numpy())
    graph = NeighbourGraph(neighbours=neighbours.numpy(), scores=scores.numpy(), own=own.numpy(), capped=capped)
    return graph, truth.share_in(graph)


def _empty_index(table: EmbeddingTable, rows_F: NDArray[np.int64], generator: np.random.Generator) -> ClusteredIndex:
    """Return an index whose clusters are made for a sample of the positives."""
    num_clusters = round(4 * math.sqrt(len(rows_F)))
    sample = generator.choice(rows_F, min(len(rows_F), _CENTRE_SAMPLE * num_clusters), replace=False)
    seed = int(generator.integers(1 << 31))
    _, positives_SD = table.lookup(sample)
    # Made by rank 0; every rank ends with them.
    return ClusteredIndex(table.world.on_main(lambda: unit_centres(positives_SD, num_clusters, seed=seed)))


def _own_rows(
    table: EmbeddingTable, rows_F: NDArray[np.int64], index: ClusteredIndex, num_neighbours: int, probes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Search for the classes that this rank owns: neighbours [r, K], their scores, own scores [r], anchors' norms."""
    first, end = np.searchsorted(rows_F, (table.rows.start, table.rows.stop)).tolist()
    neighbours_rK = torch.empty(end - first, num_neighbours, dtype=torch.int32, device=table.world.device)
    scores_rK = torch.empty(end - first, num_neighbours, device=table.world.device)
    own_r, norms_r = torch.empty_like(scores_rK[:, 0]), torch.empty_like(scores_rK[:, 0])
    for owner, piece in table.blocks(rows_F):
        if owner != table.world.rank:
            continue
        anchors_qD, positives_qD = table.own(rows_F[piece])
        self_q1 = torch.arange(piece.start, piece.stop, device=anchors_qD.device)[:, None]
        score_qK, found_qK = index.top_k(anchors_qD, num_neighbours + 1, probes=probes)
        # The class itself goes, and so does the last where it wasn't found.
        score_qK.masked_fill_((found_qK == self_q1) | (found_qK < 0), -torch.inf)
        score_qK, order_qK = score_qK.sort(dim=1, descending=True)
        found_qK = found_qK.gather(1, order_qK).masked_fill_(score_qK.isneginf(), -1)
        here = slice(piece.start - first, piece.stop - first)
        neighbours_rK[here], scores_rK[here] = found_qK[:, :num_neighbours], score_qK[:, :num_neighbours]
        own_r[here] = (anchors_qD * positives_qD).sum(dim=1)
        norms_r[here] = torch.linalg.vector_norm(anchors_qD, dim=1)
    return neighbours_rK, scores_rK, own_r, norms_r


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
