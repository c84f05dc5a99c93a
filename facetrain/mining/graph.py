"""The graph of classes that greedy mining walks: to each class, those whose positives lie nearest to its anchor.

Dims: I trained identities, F of them fresh in the table, K neighbours, S sampled classes, D embedding width.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facetrain.mining.best_first import NeighbourGraph
from facetrain.mining.embedding_table import EmbeddingTable
from facetrain.search import ClusteredIndex, similarity_blocks, unit_centres

_RECALL_SAMPLE = 128
"""Classes whose true neighbours are computed beside an approximate graph, to say how good it is."""

_CENTRE_SAMPLE = 40
"""Positives per cluster that the clusters of an approximate graph are made from; k-means asks for 39 at least."""


def build_graph(
    table: EmbeddingTable,
    rows_F: NDArray[np.int64],
    *,
    num_neighbours: int,
    exact_limit: int,
    probes: int,
    generator: np.random.Generator,
) -> tuple[NeighbourGraph, float]:
    """Find the `num_neighbours` classes c of largest <a_s, p_c> for each class s among rows of the table.

    Each rank searches for the rows that it owns, block by block: the products have the same shapes at any number of
    ranks, and so the same values. Up to `exact_limit` rows all products are made, and every rank holds all positives
    for that (4 F D bytes on its device). Beyond, FAISS looks into the `probes` most promising of 4 sqrt(F) clusters of
    positives: an approximation, whose recall is measured on 128 classes. Every rank then indexes all positives, in
    2 F D bytes on the host.

    Over all ranks: the positives (`EmbeddingTable.positive_blocks`), then an all-gather of the graph, 8 F K bytes;
    every rank ends with the whole graph, on the host.

    Args:
        table: Owns the embeddings.
        rows_F: int64, ascending, the same on every rank; more than one.
        num_neighbours: K; F - 1 where there are fewer other classes.
        exact_limit: Rows up to which the graph is exact.
        probes: Clusters that are searched beyond that.
        generator: Draws samples and clusters; of the same state on every rank.

    Returns:
        The graph over 0 .. F - 1, and the share of the true neighbours that is in it: 1.0 where it is exact.

    Raises:
        ValueError: An embedding isn't finite.
    """
    num_neighbours = min(num_neighbours, len(rows_F) - 1)
    if len(rows_F) <= exact_limit:
        positives_FD = torch.cat([block for _, block in table.positive_blocks(rows_F)])
        return _gather(table, num_neighbours, _exact_rows(table, rows_F, positives_FD, num_neighbours)), 1.0

    judged = generator.choice(len(rows_F), min(len(rows_F), _RECALL_SAMPLE), replace=False)
    truth = _Truth(table, rows_F, judged, num_neighbours)
    index = _empty_index(table, rows_F, generator)
    for piece, block in table.positive_blocks(rows_F):
        index.add(block)
        truth.add(piece.start, block)
    graph = _gather(table, num_neighbours, _found_rows(table, rows_F, index, num_neighbours, probes))
    return graph, truth.share_in(graph)


def _empty_index(table: EmbeddingTable, rows_F: NDArray[np.int64], generator: np.random.Generator) -> ClusteredIndex:
    """Return an index whose clusters are made for a sample of the positives."""
    num_clusters = round(4 * math.sqrt(len(rows_F)))
    sample = generator.choice(rows_F, min(len(rows_F), _CENTRE_SAMPLE * num_clusters), replace=False)
    seed = int(generator.integers(1 << 31))
    _, positives_SD = table.lookup(sample)
    # Made by rank 0; every rank ends with them.
    return ClusteredIndex(table.world.on_main(lambda: unit_centres(positives_SD, num_clusters, seed=seed)))


_Rows = tuple[Tensor, Tensor, Tensor]
"""Neighbours int32 [q, K], their scores float32 [q, K] and own scores float32 [q] of some classes."""


def _exact_rows(
    table: EmbeddingTable, rows_F: NDArray[np.int64], positives_FD: Tensor, num_neighbours: int
) -> Iterator[_Rows]:
    for piece, anchors_qD, _ in _own_pieces(table, rows_F):
        for part, scores_qF in similarity_blocks(anchors_qD, positives_FD):
            row_q = torch.arange(len(scores_qF), device=scores_qF.device)
            self_q = row_q + piece.start + part.start
            # From the same product, so that a class whose embeddings equal its own scores the same, to the bit.
            own_q = scores_qF[row_q, self_q]
            scores_qF[row_q, self_q] = -torch.inf
            scores_qK, neighbours_qK = scores_qF.topk(num_neighbours, dim=1)
            yield neighbours_qK.int(), scores_qK, own_q


def _found_rows(
    table: EmbeddingTable, rows_F: NDArray[np.int64], index: ClusteredIndex, num_neighbours: int, probes: int
) -> Iterator[_Rows]:
    for piece, anchors_qD, positives_qD in _own_pieces(table, rows_F):
        scores, found = index.top_k(anchors_qD, num_neighbours + 1, probes=probes)
        self_q1 = torch.arange(piece.start, piece.stop, device=found.device)[:, None]
        # The class itself goes, and so does the last where it wasn't found; what is missing leads back to the class.
        scores, order = scores.masked_fill((found == self_q1) | (found < 0), -torch.inf).sort(dim=1, descending=True)
        found = torch.where(scores.isneginf(), self_q1, found.gather(1, order))
        own_q = (anchors_qD * positives_qD).sum(dim=1)
        yield found[:, :num_neighbours].int(), scores[:, :num_neighbours], own_q


def _own_pieces(table: EmbeddingTable, rows_F: NDArray[np.int64]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield the pieces of ascending rows that this rank owns, and their embeddings, float32."""
    for owner, piece in table.blocks(rows_F):
        if owner == table.world.rank:
            yield piece, *table.own(rows_F[piece])


def _gather(table: EmbeddingTable, num_neighbours: int, rows: Iterator[_Rows]) -> NeighbourGraph:
    """Make the whole graph of every rank's part of it."""
    device = table.world.device
    parts = [
        (
            torch.empty(0, num_neighbours, dtype=torch.int32, device=device),
            torch.empty(0, num_neighbours, device=device),
            torch.empty(0, device=device),
        ),
        *rows,
    ]
    neighbours, scores, own = (
        table.world.all_gather_uneven(torch.cat(column)).cpu().numpy() for column in zip(*parts, strict=True)
    )
    # A NaN or infinity in an embedding is one in its product with itself; every rank sees it and fails.
    if not np.isfinite(own).all():
        raise ValueError("mining table: expected finite embeddings, got NaN or infinity")
    return NeighbourGraph(neighbours=neighbours, scores=scores, own=own)


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
