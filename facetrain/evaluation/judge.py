"""What a run is judged on: pairs of held-out identities, and an evaluation set where one is configured."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from facetrain.config import Config
from facetrain.data.decode import decode_face, thumbnail
from facetrain.data.reading import FaceReader
from facetrain.data.shards import ShardSet
from facetrain.data.sources import FaceSource, open_faces
from facetrain.data.split import HeldoutPairs, IdentitySplit, heldout_pairs
from facetrain.embed import embed_images
from facetrain.evaluation.html_report import ReadPicture
from facetrain.evaluation.inputs import ImageKey, check_people, face_set, image_name, unit_vectors
from facetrain.evaluation.lfw import Evaluation, evaluate, metrics
from facetrain.evaluation.lists import Request, read_lists
from facetrain.evaluation.verification import verify
from facetrain.world import REPORT_TIMEOUT_S, World

_log = logging.getLogger(__name__)

PICTURE_PX = 112
"""Side of the pictures in a report."""


@dataclass(frozen=True)
class Judgement:
    """How good a network is."""

    heldout: Mapping[str, float]
    """Verification of held-out identities by its keys, such as `accuracy`; empty where there are none, or no scores."""
    evaluation: Evaluation | None
    """The evaluation set; None where none is configured, or there are no scores."""
    heldout_thresholds: Mapping[str, float] = field(default_factory=dict)
    """Score at which held-out impostor pairs are accepted at a FAR, by the FAR's name."""

    def metrics(self) -> dict[str, float]:
        """Return every figure under its metric name, such as `heldout/accuracy`, `lfw/verification/accuracy`."""
        of_set = metrics(self.evaluation) if self.evaluation else {}
        return {f"heldout/{key}": value for key, value in self.heldout.items()} | of_set

    def results(self) -> dict[str, Any]:
        """Return every figure as results.json holds it: protocol -> key -> fraction or count; and thresholds."""
        of_set = self.evaluation.results if self.evaluation else {}
        thresholds = self.evaluation.thresholds if self.evaluation else {}
        if self.heldout:
            thresholds = {"heldout": dict(self.heldout_thresholds)} | thresholds
        return of_set | ({"heldout": dict(self.heldout)} if self.heldout else {}) | {"thresholds": thresholds}

    def summary(self) -> str:
        """Return the figures that a log line has room for."""
        dataset = self.evaluation.dataset if self.evaluation else ""
        wanted = {
            "heldout/accuracy": "heldout verification",
            f"{dataset}/verification/accuracy": f"{dataset} verification",
            f"{dataset}/open-best-rowden/rank1": "open-best-rowden rank-1",
            f"{dataset}/open-best-rowden/dir_rank1_at_far_1e-2": "open-best-rowden DIR@FAR=1%",
        }
        figures = self.metrics()
        return "  ".join(f"{name} {figures[key]:.2%}" for key, name in wanted.items() if key in figures)


@dataclass(frozen=True)
class Judge:
    """Evaluates a network in training, over all ranks."""

    config: Config
    shards: ShardSet
    heldout: HeldoutPairs | None
    """None where no identities are held out."""
    faces: FaceSource | None
    """The evaluation set; None where none is configured."""

    @classmethod
    def open(cls, config: Config, shards: ShardSet, split: IdentitySplit) -> "Judge":
        """Open and check all that evaluation will read, down to each image of the evaluation set.

        Raises:
            ValueError: Too few identities are held out, the evaluation set and its lists don't fit together, or an
                image of it can't be decoded.
        """
        heldout = (
            heldout_pairs(shards.table, split.heldout, seed=config.data.holdout_seed) if len(split.heldout) else None
        )
        faces = None
        if config.eval.images:
            faces = open_evaluation_set(config)
            for i, name in enumerate(faces.names):
                decode_face(faces.read(i), config.data, name)
        return cls(config=config, shards=shards, heldout=heldout, faces=faces)

    @property
    def read_picture(self) -> ReadPicture | None:
        """What gives a report the pictures of the evaluation set."""
        return pictures_of(self.faces, self.faces.names) if self.faces else None

    def judge(self, backbone: nn.Module, world: World, *, progress: bool = False) -> Judgement:
        """Embed all that is judged over all ranks, and compute the figures on rank 0; every rank must call it.

        Args:
            backbone: On `world.device`.
            world: The ranks.
            progress: Show a progress bar.
        """
        mirror = self.config.eval.mirror
        scores = self._heldout_scores(backbone, world) if self.heldout else None
        embeddings = None
        if self.faces is not None:
            found = embed_faces(self.faces, backbone, self.config, world, mirror=mirror, progress=progress)
            embeddings = None if _has_zeros(found, self.config.eval.dataset, world) else found
        # The other ranks wait for rank 0, on a large set longer than for any collective of a step.
        with world.waiting_up_to(max(REPORT_TIMEOUT_S, world.timeout_s)):
            return world.on_main(lambda: self._compute(scores, embeddings))

    def _heldout_scores(self, backbone: nn.Module, world: World) -> NDArray[np.float32] | None:
        """Return the score of each held-out pair, float32 [P]; None where an embedding is zero, which has no score."""
        assert self.heldout is not None
        images, rows = np.unique(np.stack([self.heldout.image_a, self.heldout.image_b]), return_inverse=True)

        reader = FaceReader(self.shards, self.config.data)

        def decode(i: int) -> NDArray[np.uint8]:
            return reader.face(int(images[i]))

        embeddings_ID = embed_images(
            backbone,
            decode,
            len(images),
            world=world,
            precision=self.config.train.precision,
            mirror=self.config.eval.mirror,
        )
        embeddings = embeddings_ID.cpu().numpy()
        if _has_zeros(embeddings, "heldout", world):
            return None
        unit_ID = unit_vectors([f"held-out image {image}" for image in images.tolist()], embeddings)
        a, b = rows.reshape(2, -1)
        scores: NDArray[np.float32] = np.einsum("pd,pd->p", unit_ID[a], unit_ID[b])
        return scores

    def _compute(self, scores: NDArray[np.float32] | None, embeddings: NDArray[np.float32] | None) -> Judgement:
        heldout: Mapping[str, float] = {}
        thresholds: Mapping[str, float] = {}
        if scores is not None and self.heldout is not None:
            verification = verify(scores, self.heldout.is_genuine, self.heldout.fold)
            heldout, thresholds = verification.figures(), verification.thresholds()
        evaluation = None
        if embeddings is not None and self.faces is not None:
            evaluation = evaluate(self.faces.names, embeddings, _request(self.config))
        return Judgement(heldout=heldout, evaluation=evaluation, heldout_thresholds=thresholds)


def _has_zeros(embeddings: NDArray[np.float32], what: str, world: World) -> bool:
    """Return whether images are embedded as zero, which have no score, and warn of it; it isn't the end of a run."""
    num_zero = len(embeddings) - int(np.count_nonzero(embeddings.any(axis=1)))
    if num_zero and world.is_main:
        _log.warning(f"{what}: not measured: the network embeds {num_zero:,} of {len(embeddings):,} images as zero")
    return num_zero > 0


def open_evaluation_set(config: Config) -> FaceSource:
    """Open the images of `eval.images` and check that the lists fit them.

    Raises:
        ValueError: An image, a list or a line of it can't be used.
    """
    faces = open_faces([Path(path) for path in config.eval.images])
    if left_out := faces.describe_skipped():
        _log.warning("eval.images: %s", left_out)
    check_people(faces.names, faces.identities)
    read_lists(faces.names, _request(config))
    return faces


def _request(config: Config) -> Request:
    settings = config.eval
    return Request(
        pairs=Path(settings.pairs) if settings.pairs else None,
        view1=(Path(settings.view1[0]), Path(settings.view1[1])) if settings.view1 else None,
        open_set_people=Path(settings.open_set_people) if settings.open_set_people else None,
        draws=settings.draws,
        dataset=settings.dataset,
    )


def embed_faces(
    faces: FaceSource, backbone: nn.Module, config: Config, world: World, *, mirror: bool, progress: bool
) -> NDArray[np.float32]:
    """Embed an evaluation set over all ranks with a run's own preprocessing; float32 [n, D] on every rank."""
    embeddings = embed_images(
        backbone,
        lambda i: decode_face(faces.read(i), config.data, faces.names[i]),
        len(faces.names),
        world=world,
        precision=config.train.precision,
        mirror=mirror,
        progress="embed" if progress else None,
    )
    return embeddings.cpu().numpy()


def pictures_of(faces: FaceSource, names: Sequence[str]) -> ReadPicture:
    """Return what gives a report the pictures of an evaluated set.

    Args:
        faces: Where the pictures are.
        names: The evaluated images, each of which must be among them; folders and suffixes may differ.

    Raises:
        ValueError: An image isn't there, or a name isn't one of a person's image, such as `Name_0001`.
    """
    row_of = face_set(faces.names).row_of
    missing = sorted(set(face_set(names).row_of) - set(row_of))
    if missing:
        raise ValueError(
            f"images: {len(missing):,} evaluated images are not among them, such as {image_name(missing[0])}"
        )

    def read(key: ImageKey) -> bytes:
        row = row_of[key]
        return thumbnail(faces.read(row), PICTURE_PX, faces.names[row])

    return read
