"""What a run is judged on: pairs of held-out identities, and an evaluation set where one is configured."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from facetrain.config import Config, DataConfig, EvalConfig
from facetrain.data.decode import decode_face
from facetrain.data.shards import ShardSet
from facetrain.data.sources import FaceSource, open_faces
from facetrain.data.split import HeldoutPairs, IdentitySplit, heldout_pairs
from facetrain.embed import embed_images
from facetrain.evaluation.lfw import Evaluation, check_inputs, evaluate, evaluate_to_folder, metrics
from facetrain.evaluation.report import write_results
from facetrain.evaluation.verification import verify
from facetrain.world import World


@dataclass(frozen=True)
class Judge:
    """Evaluates a network in training, over all ranks."""

    data: DataConfig
    eval: EvalConfig
    seed: int
    shards: ShardSet
    heldout: HeldoutPairs | None
    """None where no identities are held out."""
    faces: FaceSource | None
    """The evaluation set; None where none is configured."""

    @classmethod
    def open(cls, config: Config, shards: ShardSet, split: IdentitySplit) -> "Judge":
        """Open and check all that evaluation will read.

        Raises:
            ValueError: Too few identities are held out, or the evaluation set and its lists don't fit together.
        """
        heldout = heldout_pairs(shards.table, split.heldout, seed=config.run.seed) if len(split.heldout) else None
        faces = open_evaluation_set(config.eval) if config.eval.images else None
        return cls(
            data=config.data, eval=config.eval, seed=config.run.seed, shards=shards, heldout=heldout, faces=faces
        )

    def evaluate(self, backbone: nn.Module, config: Config, world: World, *, out: Path | None) -> dict[str, float]:
        """Judge a network; every rank must call it.

        Args:
            backbone: On `world.device`.
            config: Gives the precision.
            world: All its ranks share the embedding; rank 0 computes the figures.
            out: Folder for results.json, the table and figures; None computes metrics alone.

        Returns:
            Metrics such as `heldout/accuracy` and `lfw/verification/accuracy`, on every rank.
        """
        heldout = self._heldout_figures(backbone, config, world)
        embeddings = None
        if self.faces is not None:
            embeddings = embed_faces(
                self.faces, backbone, config, world, mirror=self.eval.mirror, progress=out is not None
            )
        flat: dict[str, float] = {}
        with world.main_first():
            if world.is_main:
                flat = {f"heldout/{key}": value for key, value in heldout.items()}
                evaluation = None if embeddings is None else self._evaluate_set(embeddings, out)
                flat |= metrics(evaluation) if evaluation else {}
                if out is not None:
                    results = {} if evaluation is None else evaluation.results
                    write_results(results | ({"heldout": heldout} if heldout else {}), out)
        return world.broadcast_object(flat)

    def summary(self, figures: Mapping[str, float]) -> str:
        """Return the figures that a log line has room for."""
        wanted = {
            "heldout/accuracy": "heldout verification",
            f"{self.eval.dataset}/verification/accuracy": f"{self.eval.dataset} verification",
            f"{self.eval.dataset}/open-best-rowden/rank1": "open-best-rowden rank-1",
            f"{self.eval.dataset}/open-best-rowden/dir_rank1_at_far_1e-2": "open-best-rowden DIR@FAR=1%",
        }
        return "  ".join(f"{name} {100 * figures[key]:.2f}%" for key, name in wanted.items() if key in figures)

    def _heldout_figures(self, backbone: nn.Module, config: Config, world: World) -> dict[str, float]:
        if self.heldout is None:
            return {}
        images, rows = np.unique(np.stack([self.heldout.image_a, self.heldout.image_b]), return_inverse=True)
        embeddings_ID = _unit(
            embed_images(
                backbone,
                lambda i: decode_face(self.shards.read(int(images[i])), self.data, f"image {images[i]}"),
                len(images),
                world=world,
                precision=config.train.precision,
                mirror=self.eval.mirror,
            )
            .cpu()
            .numpy()
        )
        rows = rows.reshape(2, -1)
        scores = np.einsum("pd,pd->p", embeddings_ID[rows[0]], embeddings_ID[rows[1]])
        return verify(scores, self.heldout.is_genuine, self.heldout.fold).figures()

    def _evaluate_set(self, embeddings: NDArray[np.float32], out: Path | None) -> Evaluation:
        assert self.faces is not None
        assert self.eval.pairs is not None
        people = None if self.eval.open_set_people is None else Path(self.eval.open_set_people)
        run_protocols = evaluate if out is None else partial(evaluate_to_folder, out=out)
        return run_protocols(
            self.faces.names,
            embeddings,
            pairs=Path(self.eval.pairs),
            open_set_people=people,
            draws=self.eval.draws,
            dataset=self.eval.dataset,
            seed=self.seed,
        )


def open_evaluation_set(config: EvalConfig) -> FaceSource:
    """Open the images of `eval.images` and check that the lists fit them.

    Raises:
        ValueError: An image, a list or a line of it can't be used.
    """
    faces = open_faces([Path(path) for path in config.images])
    assert config.pairs is not None  # EvalConfig checks it
    people = None if config.open_set_people is None else Path(config.open_set_people)
    check_inputs(faces.names, pairs=Path(config.pairs), open_set_people=people, dataset=config.dataset)
    return faces


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


def _unit(embeddings_ID: NDArray[np.float32]) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = embeddings_ID / np.linalg.norm(embeddings_ID, axis=1, keepdims=True).clip(1e-12)
    return unit
