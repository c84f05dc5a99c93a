"""Big galleries: a crowd of strangers, a million and more, added to the gallery of every identification protocol.

Each distractor is one more person in the gallery, of whom no probe is an image. A probe's rank is therefore raised by
the distractors that score >= its own person, and an impostor's best score is the best of gallery and distractors; own
scores stay. The crowd is searched once for all protocols, block by block, so that memory doesn't grow with it.

Dims: n images of the set, K best distractors kept of each, D width.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from facetrain.evaluation.identification import ClosedSet, Embeddings, OpenSet
from facetrain.evaluation.inputs import unit_vectors
from facetrain.search import ClusteredIndex, ItemBlocks, has_faiss, top_k_of_blocks, unit_centres
from facetrain.world import World

Search = Literal["exact", "ivf"]

RANKS_KEPT = 32
"""K: ranks up to this are exact in an enlarged gallery; of worse ones it is only known that they are worse."""
BLOCK_ITEMS = 16_384
"""Distractors that are in memory at a time."""
SHARE_SEARCHED = 1 / 16
"""Of the clusters of distractors, where search isn't exact."""
RECALL_SAMPLE = 500
"""Images for which a search that isn't exact is compared with one that is."""


class Block(NamedTuple):
    """Rows start to stop of a file; the first of them is number `first` of the crowd."""

    file: Path
    start: int
    stop: int
    first: int


@dataclass(frozen=True)
class Crowd:
    """Embeddings of strangers in .npy files, read block by block and never as a whole."""

    blocks: tuple[Block, ...]
    embedding_dim: int

    def __len__(self) -> int:
        """Return how many distractors there are."""
        return sum(block.stop - block.start for block in self.blocks)

    def check_width(self, expected: int) -> None:
        """Raise ValueError, naming a file, where embeddings have another width."""
        if self.embedding_dim != expected:
            file = self.blocks[0].file
            raise ValueError(f"{file}: expected embeddings {expected} wide, got {self.embedding_dim}")

    def read(self, block: Block) -> Tensor:
        """Return the unit vectors of a block, float32 [block, D].

        Raises:
            ValueError: One of them is zero, NaN or infinite; the message names file and row.
        """
        # Mapped anew each time: what a map has read counts as this process's memory until the map is closed.
        rows = np.load(block.file, mmap_mode="r")[block.start : block.stop].astype(np.float32)
        names = [f"row {row} of {block.file}" for row in range(block.start, block.stop)]
        return torch.from_numpy(unit_vectors(names, rows))


@dataclass(frozen=True, eq=False)
class DistractorScores:
    """How each image of a set scores against the crowd."""

    best: NDArray[np.float32]
    """[n, K], the highest scores of each image, best first."""
    count: int
    """Distractors in the crowd."""
    recall: Mapping[str, float]
    """Of a search that isn't exact: `ivf_recall_at_1`, ...: the share of the true k best that it found."""

    def figures(self) -> dict[str, float]:
        """Return the figures by their metric keys."""
        return {"count": self.count, **self.recall}

    def describe(self) -> str:
        """Return what a reader of the figures has to know."""
        found = ", ".join(f"{key.replace('_', ' ')} {share:.4f}" for key, share in self.recall.items())
        how = f"approximate search: {found} against exact search" if self.recall else "exact search"
        return f"every gallery but BLUFR's holds {self.count:,} more people, one image each ({how})"

    def in_closed_set(self, outcome: ClosedSet) -> ClosedSet:
        """Return a closed-set outcome as it is with the crowd in the gallery."""
        ranks = outcome.ranks + self._above(outcome.probe_rows, outcome.own_scores)
        return replace(outcome, ranks=ranks, gallery=outcome.gallery + self.count)

    def in_open_set(self, outcome: OpenSet) -> OpenSet:
        """Return an open-set outcome as it is with the crowd in the gallery."""
        return replace(
            outcome,
            ranks=outcome.ranks + self._above(outcome.probe_rows, outcome.own_scores),
            impostor_scores=np.maximum(outcome.impostor_scores, self.best[outcome.impostor_rows, 0]),
            gallery=outcome.gallery + self.count,
        )

    def _above(self, rows_P: NDArray[np.int64], own_scores_P: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return how many distractors score >= the own person; K of them may stand for more."""
        above: NDArray[np.int64] = (self.best[rows_P] >= own_scores_P[:, None]).sum(axis=1)
        return above


def open_crowd(files: Sequence[Path]) -> Crowd:
    """Open .npy files of embeddings, [rows, D] each, in any float type; nothing in them is ever unpickled.

    Raises:
        ValueError: A file that is no such array, or not as wide as the first; the message names it.
        FileNotFoundError: There is no such file.
    """
    blocks: list[Block] = []
    first, width = 0, _shape(files[0])[1]
    for file in files:
        num_rows, file_width = _shape(file)
        if file_width != width:
            raise ValueError(f"{file}: expected embeddings {width} wide, as in {files[0]}, got {file_width}")
        for start in range(0, num_rows, BLOCK_ITEMS):
            blocks.append(Block(file, start, min(start + BLOCK_ITEMS, num_rows), first + start))
        first += num_rows
    if not blocks:
        raise ValueError(f"distractors: expected embeddings in {', '.join(map(str, files))}, got none")
    return Crowd(blocks=tuple(blocks), embedding_dim=width)


def check_search(search: Search) -> None:
    """Check that a crowd can be searched that way.

    Raises:
        ValueError: FAISS isn't installed.
    """
    if search == "ivf" and not has_faiss():
        raise ValueError("--search ivf: faiss is not installed; expected what pip install 'facetrain[faiss]' brings")


def search_crowd(
    embeddings: Embeddings, crowd: Crowd, world: World, *, search: Search = "exact", progress: bool = False
) -> DistractorScores:
    """Search the crowd for the nearest of each image, over all ranks; every rank must call it.

    Each rank searches a slice of the crowd, and the best of all slices are merged: the outcome is the same on any
    number of ranks, to the bit with exact search. Approximate search is compared with exact search on a sample.

    Args:
        embeddings: float32 [n, D], unit vectors.
        crowd: The distractors.
        world: Its device does the products.
        search: exact, or FAISS IVF, which pays at tens of millions.
        progress: Show a progress bar on rank 0's terminal.

    Raises:
        ValueError: The crowd is of another width, an embedding of it can't be used, or FAISS isn't installed.
    """
    crowd.check_width(embeddings.shape[1])
    check_search(search)
    queries_nD = torch.from_numpy(embeddings).to(world.device)
    share = _share_of_rank(crowd, world)

    def blocks() -> ItemBlocks:
        return _read(crowd, share, world, progress=progress)

    def exact(queries_QD: Tensor) -> tuple[Tensor, Tensor]:
        return top_k_of_blocks(queries_QD, blocks(), RANKS_KEPT)

    found = _search_clusters(queries_nD, blocks, share) if search == "ivf" and share else exact(queries_nD)
    scores_nK, items_nK = _merge(found, world)
    recall = {}
    if search == "ivf":
        sample = torch.from_numpy(np.random.default_rng(0).permutation(len(embeddings))[:RECALL_SAMPLE])
        recall = _recall(items_nK[sample], _merge(exact(queries_nD[sample]), world)[1])
    return DistractorScores(best=scores_nK.cpu().numpy(), count=len(crowd), recall=recall)


def _share_of_rank(crowd: Crowd, world: World) -> tuple[Block, ...]:
    """Return a rank's blocks. Whole blocks, so that products have the same shapes on any number of ranks."""
    num_blocks = len(crowd.blocks)
    first, last = (rank * num_blocks // world.world_size for rank in (world.rank, world.rank + 1))
    return crowd.blocks[first:last]


def _read(crowd: Crowd, blocks: Sequence[Block], world: World, *, progress: bool) -> Iterator[tuple[int, Tensor]]:
    """Yield each block with the number of its first distractor."""
    for block in tqdm(blocks, desc="distractors", unit="block", disable=None if progress and world.is_main else True):
        yield block.first, crowd.read(block).to(world.device)


def _search_clusters(
    queries_nD: Tensor, blocks: Callable[[], ItemBlocks], share: Sequence[Block]
) -> tuple[Tensor, Tensor]:
    """Return about the K nearest distractors of each query among those of a rank, with their scores in float32."""
    num_items = sum(block.stop - block.start for block in share)
    num_clusters = math.isqrt(num_items)
    every = max(num_items // (_ITEMS_A_CLUSTER * num_clusters), 1)
    index = ClusteredIndex(unit_centres(torch.cat([items[::every] for _, items in blocks()]), num_clusters, seed=0))
    for _, items in blocks():
        index.add(items)
    _, places_nK = index.top_k(queries_nD, RANKS_KEPT, probes=math.ceil(num_clusters * SHARE_SEARCHED))
    items_nK = torch.where(places_nK >= 0, places_nK + share[0].first, -1)
    scores_nK = torch.full_like(items_nK, -torch.inf, dtype=torch.float32)
    for first, items in blocks():  # the index scores bfloat16
        query, place = ((items_nK >= first) & (items_nK < first + len(items))).nonzero(as_tuple=True)
        scores_nK[query, place] = (queries_nD[query] * items[items_nK[query, place] - first]).sum(dim=1)
    return scores_nK, items_nK


def _merge(found: tuple[Tensor, Tensor], world: World) -> tuple[Tensor, Tensor]:
    """Return the k best scores [n, k] of all ranks and their items; every rank ends with the same."""
    num_queries, k = found[0].shape
    # From [W * n, k] in rank order to [n, W * k].
    scores, items = (
        world.all_gather(x).reshape(-1, num_queries, k).transpose(0, 1).reshape(num_queries, -1) for x in found
    )
    best, place = scores.topk(k, dim=1)
    return best, items.gather(1, place)


def _recall(found_nK: Tensor, true_nK: Tensor) -> dict[str, float]:
    """Return the share of each image's k truly nearest distractors that are among the k found, for k = 1 and K."""
    recall = {}
    for k in (1, true_nK.shape[1]):
        hits = (found_nK[:, :k, None] == true_nK[:, None, :k]) & (true_nK[:, None, :k] >= 0)
        recall[f"ivf_recall_at_{k}"] = float(hits.sum() / (true_nK[:, :k] >= 0).sum())
    return recall


def _shape(file: Path) -> tuple[int, int]:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, BadZipFile) as error:
        raise ValueError(f"{file}: not a readable .npy file: {error}") from None
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f":
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an .npz"
        raise ValueError(f"{file}: expected floats [rows, D], got {got}")
    return len(array), array.shape[1]


_ITEMS_A_CLUSTER = 40
"""Distractors, evenly spread, from which the clusters are made; FAISS warns below 39."""
