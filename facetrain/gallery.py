"""A gallery of people in one file, and who in it is most like a face.

Dims: Q queries, I images in the gallery, K people in it, k people wanted, D width.
"""

import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from facetrain.evaluation.embeddings_npz import read_npz
from facetrain.search import ApproximateIndex, check_faiss, group_maxima
from facetrain.whole_file import writing

Kind = Literal["flat", "ivf", "hnsw"]

GALLERY_FILE = "gallery.npz"
_ARRAYS = (
    *("kind", "network", "network_sha256", "is_aligned", "is_mirrored"),
    *("names", "people", "embeddings", "pictures", "picture_ends", "index"),
)
_IMAGES_PER_PERSON = 10
"""Images that an approximate search looks for, for each person wanted: several of the best may be one person's."""

_MOST_STRANGERS = 2000


@dataclass(frozen=True, eq=False)
class Gallery:
    """Images of people, in the order in which they were added."""

    kind: Kind = "flat"
    """How it is searched: exactly (flat), or by FAISS, approximately."""
    network: str = ""
    """What embedded it; empty where embeddings were given."""
    network_sha256: str = ""
    """Checksum of its weights."""
    is_aligned: bool = False
    """Whether the latest images were aligned on the way."""
    is_mirrored: bool = True
    """Whether their embeddings have those of the mirrored images in them."""
    onnx: str = ""
    """What an ONNX network's pixels were, in words."""
    names: tuple[str, ...] = ()
    """[I], name of each image."""
    people: tuple[str, ...] = ()
    """[I], the person of each image."""
    embeddings: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    """[I, D], rows of unit length."""
    pictures: tuple[bytes, ...] = ()
    """[I], a small JPEG of each image; empty bytes where there is none."""
    index: ApproximateIndex | None = None
    """For ivf and hnsw."""

    @cached_property
    def persons(self) -> tuple[str, ...]:
        """[K], everybody, sorted."""
        return tuple(sorted(set(self.people)))

    @cached_property
    def _group(self) -> NDArray[np.int64]:
        """[I], the person of each image, a row of `persons`."""
        row_of = {person: row for row, person in enumerate(self.persons)}
        return np.array([row_of[person] for person in self.people], dtype=np.int64)

    @classmethod
    def load(cls, folder: Path) -> "Gallery":
        """Read a gallery.

        Raises:
            ValueError: There is none, or it is damaged, or FAISS is needed and isn't there; the message names it.
        """
        file = folder / GALLERY_FILE
        if not file.is_file():
            raise ValueError(f"{folder}: no gallery in it; `facetrain index {folder} --images FOLDER` makes one")
        arrays = read_npz(file, _ARRAYS, optional=("onnx",))  # which earlier revisions didn't write
        kind = str(arrays["kind"])
        if kind != "flat":
            check_faiss(str(file))
        ends, data = arrays["picture_ends"].tolist(), arrays["pictures"].tobytes()
        num_images = {len(arrays[key]) for key in ("names", "people", "embeddings", "picture_ends") if arrays[key].ndim}
        if len(num_images) != 1 or arrays["embeddings"].ndim != 2:
            raise ValueError(f"{file}: damaged (names, people, embeddings and pictures differ in number)")
        try:
            return cls(
                kind=kind,  # type: ignore[arg-type]
                network=str(arrays["network"]),
                network_sha256=str(arrays["network_sha256"]),
                is_aligned=bool(arrays["is_aligned"]),
                is_mirrored=bool(arrays["is_mirrored"]),
                onnx=str(arrays.get("onnx", "")),
                names=tuple(arrays["names"].tolist()),
                people=tuple(arrays["people"].tolist()),
                embeddings=arrays["embeddings"],
                pictures=tuple(data[a:b] for a, b in pairwise([0, *ends])),
                index=ApproximateIndex.from_bytes(arrays["index"]) if kind != "flat" and len(ends) else None,
            )
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"{file}: damaged ({' '.join(str(error).split())})") from None

    def save(self, folder: Path) -> None:
        """Write the gallery into a folder, at once or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        with writing(folder / GALLERY_FILE) as aside, open(aside, "wb") as file:
            np.savez(
                file,
                kind=np.array(self.kind),
                network=np.array(self.network),
                network_sha256=np.array(self.network_sha256),
                is_aligned=np.array(self.is_aligned),
                is_mirrored=np.array(self.is_mirrored),
                onnx=np.array(self.onnx),
                names=np.array(self.names, dtype=np.str_),
                people=np.array(self.people, dtype=np.str_),
                embeddings=self.embeddings,
                pictures=np.frombuffer(b"".join(self.pictures), np.uint8),
                picture_ends=np.cumsum([len(picture) for picture in self.pictures], dtype=np.int64),
                index=self.index.to_bytes() if self.index else np.empty(0, np.uint8),
            )

    def with_images(
        self, names: Sequence[str], people: Sequence[str], embeddings: NDArray[np.float32], pictures: Sequence[bytes]
    ) -> "Gallery":
        """Return the gallery with more images; those of a name that is there already are replaced.

        The index of ivf or hnsw goes over to the new gallery: don't search this one any more.

        Args:
            names: [n], of the images.
            people: [n], the person of each.
            embeddings: float32 [n, D], rows of unit length.
            pictures: [n], JPEGs, or empty bytes.

        Raises:
            ValueError: The embeddings have another width.
        """
        if len(self.names) and embeddings.shape[1] != self.embeddings.shape[1]:
            raise ValueError(f"embeddings: expected {self.embeddings.shape[1]} numbers each, got {embeddings.shape[1]}")
        fresh = set(names)
        rest = self._keep([name not in fresh for name in self.names])
        together = np.concatenate([rest.embeddings.reshape(-1, embeddings.shape[1]), embeddings])
        return replace(
            rest,
            names=(*rest.names, *names),
            people=(*rest.people, *people),
            embeddings=together,
            pictures=(*rest.pictures, *pictures),
            index=_grown(self.kind, rest.index, together, len(rest.names)),
        )

    def without(self, people: Collection[str]) -> "Gallery":
        """Return the gallery without these people, however their names are composed: as one character, or as two.

        Raises:
            ValueError: One of them isn't in it.
        """
        composed = [unicodedata.normalize("NFC", person) for person in self.people]
        gone = {unicodedata.normalize("NFC", person): person for person in people}
        for person in gone.keys() - set(composed):
            raise ValueError(f"--remove: {gone[person]!r} is not in the gallery")
        return self._keep([person not in gone for person in composed])

    def _keep(self, mask: Sequence[bool]) -> "Gallery":
        if all(mask):
            return self
        rows = [row for row, kept in enumerate(mask) if kept]
        embeddings = self.embeddings[rows]
        return replace(
            self,
            names=tuple(self.names[row] for row in rows),
            people=tuple(self.people[row] for row in rows),
            embeddings=embeddings,
            pictures=tuple(self.pictures[row] for row in rows),
            index=_grown(self.kind, None, embeddings, 0),
        )

    def search(
        self, queries: NDArray[np.float32], k: int, *, exactly: bool = False
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return who is most like each query; a person scores by the best of their images.

        flat is exact. ivf and hnsw look for the best images and then at whose they are.

        Args:
            queries: float32 [Q, D], rows of unit length.
            k: People wanted.
            exactly: As flat, whatever the kind.

        Returns:
            Scores, float32 [Q, k], best first, and rows of `persons`, int64 [Q, k]; -inf and -1 where fewer are found.

        Raises:
            ValueError: The gallery is empty, or the queries have another width.
        """
        if not self.names:
            raise ValueError("gallery: expected somebody in it, it is empty")
        if queries.shape[1] != self.embeddings.shape[1]:
            raise ValueError(f"queries: expected {self.embeddings.shape[1]} numbers each, got {queries.shape[1]}")
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        persons = np.full((len(queries), k), -1, dtype=np.int64)
        if self.index is None or exactly:
            self._search_all(torch.from_numpy(queries), scores, persons)
        else:
            self._search_some(torch.from_numpy(queries), scores, persons)
        return scores, persons

    def _search_all(self, queries: torch.Tensor, scores: NDArray[np.float32], persons: NDArray[np.int64]) -> None:
        items, group = torch.from_numpy(self.embeddings), torch.from_numpy(self._group)
        most = min(scores.shape[1], len(self.persons))
        for rows, best_qK in group_maxima(queries, items, group, len(self.persons)):
            found = best_qK.topk(most, dim=1)
            scores[rows, :most], persons[rows, :most] = found.values.numpy(), found.indices.numpy()

    def _search_some(self, queries: torch.Tensor, scores: NDArray[np.float32], persons: NDArray[np.int64]) -> None:
        assert self.index is not None
        k = scores.shape[1]
        found = self.index.top_k(queries, min(k * _IMAGES_PER_PERSON, len(self.names)))
        values, items = found[0].numpy(), found[1].numpy()
        groups = np.where(items >= 0, self._group[items], -1)
        for query in range(len(values)):
            # The first of each person is their best; np.unique sorts by person, `first` brings the order back.
            distinct, first = np.unique(groups[query], return_index=True)
            best = np.sort(first[distinct >= 0])[:k]
            scores[query, : len(best)], persons[query, : len(best)] = values[query, best], groups[query, best]

    @cached_property
    def stranger_scores(self) -> NDArray[np.float32]:
        """How alike its own images are to other people: what a stranger's best score here looks like.

        float32 [n], of n = min(I, 2000) images, evenly chosen: the best score among people who aren't theirs. Exact for
        all kinds: an approximate search may find nothing but a person's own images.
        """
        rows = np.unique(np.linspace(0, len(self.names) - 1, min(len(self.names), _MOST_STRANGERS)).astype(np.int64))
        scores, persons = self.search(self.embeddings[rows], 2, exactly=True)
        is_own = persons[:, 0] == self._group[rows]
        return np.where(is_own, scores[:, 1], scores[:, 0])

    def best_image(self, query: NDArray[np.float32], person: int) -> int:
        """Return the row of a person's image that is most like a query, float32 [D]."""
        rows = np.flatnonzero(self._group == person)
        return int(rows[np.argmax(self.embeddings[rows] @ query)])


def _grown(
    kind: Kind, index: ApproximateIndex | None, embeddings: NDArray[np.float32], num_in: int
) -> ApproximateIndex | None:
    """Return the index of all embeddings: that of the first `num_in` with the others added to it, or a new one."""
    if kind == "flat" or not len(embeddings):
        return None
    check_faiss(f"--kind {kind}")
    if index is None or index.is_outgrown_by(len(embeddings)):
        return ApproximateIndex.build(kind, torch.from_numpy(embeddings))
    index.add(torch.from_numpy(embeddings[num_in:]))
    return index
