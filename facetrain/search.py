"""Similarity search: exact, with products in full float32, block by block, so that memory stays bounded.

And approximate, among clusters, with FAISS: an optional dependency, of which this is the sole importer.

Dims: Q queries, q queries of one block, I items, G groups of items, L clusters, D width.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

BLOCK_BYTES = 64 * 2**20
"""Default bound on the scores held at a time, in bytes."""

_TILE = 64
"""Rows and columns of a product are padded to a multiple of this; `similarity_blocks` says why."""
_WIDTH = 512
"""Numbers of an embedding that one product sums over; `similarity_blocks` says why."""


def similarity_blocks(
    queries_QD: Tensor, items_ID: Tensor, *, block_bytes: int = BLOCK_BYTES
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the inner products of all queries with all items, a block of queries at a time.

    Equal embeddings get equal scores, to the bit: matrix libraries sum in another order at the ragged edges of a
    product (seen in 62 of 400 random shapes on two threads), and cut sums of some 900 numbers in ways that depend on
    the shape, which would decide ties by chance. Blocks are therefore padded with zeros to whole tiles, and longer
    sums are made of products over 512 numbers. TF32, bf16 and autocast are off whatever the process has set.

    Args:
        queries_QD: float32 or float64, on any device.
        items_ID: of the same type, on the same device.
        block_bytes: bound on the size of one block of scores; at least 64 queries make a block.

    Yields:
        The slice of queries, and their scores [q, I], of the type of the embeddings.
    """
    num_items = items_ID.shape[0]
    padded_ID = _pad_rows(items_ID, -num_items % _TILE)
    row_bytes = padded_ID.element_size() * max(padded_ID.shape[0], 1)
    rows = max(block_bytes // row_bytes // _TILE * _TILE, _TILE)
    for start in range(0, queries_QD.shape[0], rows):
        block_qD = queries_QD[start : start + rows]
        num_queries = block_qD.shape[0]
        with _full_float32(), torch.no_grad(), torch.autocast(queries_QD.device.type, enabled=False):
            padded_qD = _pad_rows(block_qD, -num_queries % _TILE)
            scores = padded_qD[:, :_WIDTH] @ padded_ID[:, :_WIDTH].T
            for first in range(_WIDTH, padded_qD.shape[1], _WIDTH):
                part = slice(first, first + _WIDTH)
                scores += padded_qD[:, part] @ padded_ID[:, part].T
        yield slice(start, start + num_queries), scores[:num_queries, :num_items]


def top_k(queries_QD: Tensor, items_ID: Tensor, k: int, *, block_bytes: int = BLOCK_BYTES) -> tuple[Tensor, Tensor]:
    """Return each query's k items of highest inner product, best first.

    Returns:
        The scores, float32 [Q, k], and the rows of the items, int64 [Q, k].

    Raises:
        ValueError: k is below 1 or above the number of items.
    """
    if not 1 <= k <= items_ID.shape[0]:
        raise ValueError(f"k: expected 1 to the number of items, {items_ID.shape[0]}, got {k}")
    scores_Qk = queries_QD.new_empty(queries_QD.shape[0], k)
    items_Qk = torch.empty_like(scores_Qk, dtype=torch.int64)
    for rows, scores_qI in similarity_blocks(queries_QD, items_ID, block_bytes=block_bytes):
        scores_Qk[rows], items_Qk[rows] = scores_qI.topk(k, dim=1)
    return scores_Qk, items_Qk


ItemBlocks = Iterable[tuple[int, Tensor]]
"""Items that come in blocks: the number of the block's first item, and the block, float32 [i, D]."""


def top_k_of_blocks(
    queries_QD: Tensor, blocks: ItemBlocks, k: int, *, block_bytes: int = BLOCK_BYTES
) -> tuple[Tensor, Tensor]:
    """Return each query's k items of highest inner product among items that come in blocks, best first.

    What is held is one block of items and `block_bytes` of scores, however many items there are.

    Returns:
        The scores, float32 [Q, k], and the numbers of the items, int64 [Q, k]; -inf and -1 beyond the last item.
    """
    scores_Qk = queries_QD.new_full((queries_QD.shape[0], k), -torch.inf)
    items_Qk = torch.full_like(scores_Qk, -1, dtype=torch.int64)
    for first, items_ID in blocks:
        for rows, scores_qI in similarity_blocks(queries_QD, items_ID, block_bytes=block_bytes):
            best, place = scores_qI.topk(min(k, items_ID.shape[0]), dim=1)
            scores_Qk[rows], order = torch.cat([scores_Qk[rows], best], dim=1).topk(k, dim=1)
            items_Qk[rows] = torch.cat([items_Qk[rows], place + first], dim=1).gather(1, order)
    return scores_Qk, items_Qk


def group_maxima(
    queries_QD: Tensor, items_ID: Tensor, groups_I: Tensor, num_groups: int, *, block_bytes: int = BLOCK_BYTES
) -> Iterator[tuple[slice, Tensor]]:
    """Yield each query's best inner product within each group of items, a block of queries at a time.

    Args:
        queries_QD: float32.
        items_ID: float32.
        groups_I: int64, the group of each item, in [0, num_groups).
        num_groups: G; a group without items has the score -inf.
        block_bytes: as in `similarity_blocks`.

    Yields:
        The slice of queries, and their float32 maxima [q, G].
    """
    one_each = torch.equal(groups_I, torch.arange(num_groups, device=groups_I.device))
    for rows, scores_qI in similarity_blocks(queries_QD, items_ID, block_bytes=block_bytes):
        if one_each:
            yield rows, scores_qI
            continue
        maxima_qG = scores_qI.new_full((scores_qI.shape[0], num_groups), -torch.inf)
        yield rows, maxima_qG.scatter_reduce_(1, groups_I.expand_as(scores_qI), scores_qI, "amax")


def k_means(items_ID: Tensor, num_clusters: int, *, seed: int, max_iterations: int = 100) -> Tensor:
    """Return the cluster of each item by Lloyd's algorithm, int64 [I].

    The first centres are distinct items drawn with the seed. It ends when no item changes its cluster, or after
    `max_iterations`. A cluster that loses all items starts anew at the item that is farthest from its centre.

    It needs no FAISS, so that what it finds doesn't depend on what is installed.

    Args:
        items_ID: float32.
        num_clusters: 1 to I.
        seed: Of the first centres.
        max_iterations: Rounds of assigning items and moving centres.

    Raises:
        ValueError: num_clusters is out of bounds.

    Source: Lloyd, IEEE Trans. Information Theory, 1982.
    """
    num_items = items_ID.shape[0]
    if not 1 <= num_clusters <= num_items:
        raise ValueError(f"num_clusters: expected 1 to the number of items, {num_items}, got {num_clusters}")
    drawn = torch.randperm(num_items, generator=torch.Generator().manual_seed(seed))[:num_clusters]
    centres_KD = items_ID[drawn.to(items_ID.device)]
    cluster_I = torch.full((num_items,), -1, device=items_ID.device)
    for _ in range(max_iterations):
        before_I = cluster_I
        cluster_I, nearness_I = _nearest_centres(items_ID, centres_KD)
        if torch.equal(cluster_I, before_I):
            break
        # Sums in float64, so that their order doesn't matter.
        sums_KD = torch.zeros_like(centres_KD, dtype=torch.float64).index_add_(0, cluster_I, items_ID.double())
        counts_K = cluster_I.bincount(minlength=num_clusters)
        centres_KD = (sums_KD / counts_K.clamp(min=1)[:, None]).float()
        empty = (counts_K == 0).nonzero()[:, 0]
        centres_KD[empty] = items_ID[nearness_I.argsort(stable=True)[: len(empty)]]
    return cluster_I


def _nearest_centres(items_ID: Tensor, centres_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Return each item's nearest centre by Euclidean distance, and -1/2 of that distance squared."""
    half_norms_K = centres_KD.square().sum(dim=1) / 2
    blocks = [
        (scores_qK - half_norms_K).max(dim=1)  # -|x - c|^2 / 2 + |x|^2 / 2
        for _, scores_qK in similarity_blocks(items_ID, centres_KD)
    ]
    nearness_I = torch.cat([block.values for block in blocks]) - items_ID.square().sum(dim=1) / 2
    return torch.cat([block.indices for block in blocks]), nearness_I


def has_faiss() -> bool:
    """Return whether the optional dependency is there that `ClusteredIndex` needs."""
    return find_spec("faiss") is not None


def check_faiss(what: str) -> None:
    """Raise ValueError, naming what needs it, where FAISS isn't installed."""
    if not has_faiss():
        raise ValueError(f"{what}: needs FAISS: pip install 'facetrain[faiss]'")


def unit_centres(items_ID: Tensor, num_clusters: int, *, seed: int, iterations: int = 5) -> Tensor:
    """Return cluster centres of unit length by spherical k-means, float32 [L, D].

    Args:
        items_ID: float32; some ten times as many items as clusters, or more.
        num_clusters: L.
        seed: Chooses the first centres, distinct items.
        iterations: Rounds of assigning items and moving centres. A centre without items stays.

    Source: Dhillon and Modha, Machine Learning 42, 2001.
    """
    drawn = torch.randperm(len(items_ID), generator=torch.Generator().manual_seed(seed))[:num_clusters]
    centres_LD = F.normalize(items_ID[drawn.to(items_ID.device)])
    for _ in range(iterations):
        cluster_I = torch.cat([scores_qL.argmax(dim=1) for _, scores_qL in similarity_blocks(items_ID, centres_LD)])
        sums_LD = torch.zeros_like(centres_LD, dtype=torch.float64).index_add_(0, cluster_I, items_ID.double())
        is_empty_L1 = cluster_I.bincount(minlength=num_clusters)[:, None] == 0
        centres_LD = torch.where(is_empty_L1, centres_LD, F.normalize(sums_LD).float())
    return centres_LD


class ClusteredIndex:
    """Items in clusters, of which a search looks into the most promising alone: approximate, and on the CPU.

    An item lies in the cluster whose centre has the largest inner product with it. It is kept in bfloat16; queries are
    float32. What a search misses depends on the data: measure its recall.
    """

    def __init__(self, centres_LD: Tensor) -> None:
        """Start an empty index with the centres of `unit_centres`."""
        import faiss

        num_clusters, width = centres_LD.shape
        centres = centres_LD.cpu().numpy()
        quantizer = faiss.IndexFlatIP(width)
        quantizer.add(centres)
        self._index = faiss.IndexIVFScalarQuantizer(
            quantizer, width, num_clusters, faiss.ScalarQuantizer.QT_bf16, faiss.METRIC_INNER_PRODUCT, False
        )
        self._index.train(centres)  # has nothing to learn, with its centres given and nothing to scale

    def add(self, items_ID: Tensor) -> None:
        """Append items; they are numbered in the order in which they come."""
        self._index.add(items_ID.float().cpu().numpy())

    def top_k(self, queries_QD: Tensor, k: int, *, probes: int) -> tuple[Tensor, Tensor]:
        """Return each query's k items of highest inner product in the `probes` clusters nearest to it, best first.

        Returns:
            The scores, float32 [Q, k], and the items, int64 [Q, k], on the queries' device; -1 where the clusters
            hold fewer than k.
        """
        self._index.nprobe = min(probes, self._index.nlist)
        scores, items = self._index.search(queries_QD.float().cpu().numpy(), k)
        return torch.from_numpy(scores).to(queries_QD.device), torch.from_numpy(items).to(queries_QD.device)


class ApproximateIndex:
    """Items among FAISS's clusters (ivf) or in its neighbour graph (hnsw), in float32 and on the CPU.

    What a search misses depends on the data: measure its recall.
    """

    def __init__(self, index: Any) -> None:
        """Take an index of FAISS."""
        self._index = index

    @classmethod
    def build(cls, kind: Literal["ivf", "hnsw"], items_ID: Tensor) -> "ApproximateIndex":
        """Make an index of items, which are numbered in their order.

        ivf: about 2 sqrt(I) clusters, of which a search looks into 16. hnsw: 32 neighbours an item, 128 candidates.
        """
        import faiss

        num_items, width = items_ID.shape
        index: Any
        if kind == "hnsw":
            index = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction, index.hnsw.efSearch = 200, 128
        else:
            num_clusters = _num_clusters(num_items)
            quantizer = faiss.IndexFlatIP(width)
            index = faiss.IndexIVFFlat(quantizer, width, num_clusters, faiss.METRIC_INNER_PRODUCT)
            index.nprobe = min(16, num_clusters)
            index.train(items_ID.numpy())
        made = cls(index)
        made.add(items_ID)
        return made

    @classmethod
    def from_bytes(cls, data: NDArray[np.uint8]) -> "ApproximateIndex":
        """Read what `to_bytes` gave."""
        import faiss

        return cls(faiss.deserialize_index(data))

    def to_bytes(self) -> NDArray[np.uint8]:
        """Return the index as it is kept in a file."""
        import faiss

        data: NDArray[np.uint8] = faiss.serialize_index(self._index)
        return data

    def add(self, items_ID: Tensor) -> None:
        """Append items."""
        self._index.add(items_ID.numpy())

    def is_outgrown_by(self, num_items: int) -> bool:
        """Return whether so many items, four times those it was built for, need clusters of their own."""
        return hasattr(self._index, "nlist") and _num_clusters(num_items) > 2 * self._index.nlist

    def top_k(self, queries_QD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return scores, float32 [Q, k], and items, int64 [Q, k], best first; -1 where fewer are found."""
        scores, items = self._index.search(queries_QD.numpy(), k)
        return torch.from_numpy(scores), torch.from_numpy(items)


def _num_clusters(num_items: int) -> int:
    """Return 2 sqrt(I), but no more than leaves 39 items a cluster, below which FAISS warns."""
    return max(1, min(round(2 * math.sqrt(num_items)), num_items // 39))


def _pad_rows(x: Tensor, num_rows: int) -> Tensor:
    return F.pad(x, (0, 0, 0, num_rows)) if num_rows else x


@contextmanager
def _full_float32() -> Iterator[None]:
    """Multiply float32 matrices in float32, and leave the process's own setting as it was."""
    torch_backends: Any = torch.backends  # the stubs lack mkldnn.matmul
    backends = (torch_backends.cuda.matmul, torch_backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
