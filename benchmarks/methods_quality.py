"""How good the checkpoints of a run are on faces of people that it trained on, and on those of people held out."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from facetrain.checkpoint.weights import load_backbone
from facetrain.command_line import load_config
from facetrain.config import Config
from facetrain.data.reading import FaceReader
from facetrain.data.shards import ShardSet, open_shards
from facetrain.data.split import split_identities
from facetrain.embed import embed_images
from facetrain.models import build_backbone
from facetrain.world import World

IMAGES_OF_AN_IDENTITY = 4
TRIPLETS = 5000
MARGIN = 0.2


def quality_over_steps(folder: Path, *, images_per_step: int) -> dict[str, Any]:
    """Return figures of the untrained network, of each checkpoint and of the final weights.

    Recall@1 among as many people that were trained on as were held out, at most four images of each; and the mean of
    max(0, d(a, p) - d(a, n) + 0.2) in squared distances of unit vectors over fixed triplets of held-out people, the
    same for all methods and seeds of the run.
    """
    config = load_config(folder / "config.yaml")
    shards = open_shards(config.data)
    split = split_identities(
        shards.table,
        holdout=config.data.holdout_identities,
        exclude=config.data.exclude,
        seed=config.data.holdout_seed,
        min_images=max(config.data.min_images, config.train.images_per_identity),
    )
    some = np.random.default_rng(0).choice(split.train, min(len(split.train), len(split.heldout)), replace=False)
    sets = {"train": images_of(shards, np.sort(some)), "heldout": images_of(shards, split.heldout)}
    checkpoints = sorted((folder / "checkpoints").glob("step-*[0-9]"))
    curve = []
    for step, path in [(0, None), *((int(path.name.removeprefix("step-")), path) for path in checkpoints)]:
        units = {name: embed(path, config, shards, images) for name, (images, _) in sets.items()}
        curve.append(
            {
                "images": step * images_per_step,
                "triplet_loss": triplet_loss(units["heldout"], sets["heldout"][1]),
                **{f"{name}_recall_at_1": recall_at_1(units[name], labels) for name, (_, labels) in sets.items()},
            }
        )
    return {"identities": len(split.train), "curve": curve}


def images_of(shards: ShardSet, identities: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first images of identities, and the identity of each."""
    first = np.asarray(shards.table.first_image)
    images = [np.arange(first[i], min(first[i + 1], first[i] + IMAGES_OF_AN_IDENTITY)) for i in identities]
    return np.concatenate(images), np.repeat(identities, [len(some) for some in images])


def embed(checkpoint: Path | None, config: Config, shards: ShardSet, images: NDArray[np.int64]) -> torch.Tensor:
    """Return unit embeddings of images by a checkpoint; None is the network before the first step."""
    if checkpoint is None:
        torch.manual_seed(config.run.seed)
        backbone = build_backbone(config.model, channels=config.data.channels, image_px=config.data.image_px)
    else:
        backbone, _ = load_backbone(checkpoint)
    reader = FaceReader(shards, config.data)
    precision = config.train.precision
    embeddings = embed_images(
        backbone, lambda i: reader.face(int(images[i])), len(images), world=World(), precision=precision
    )
    return torch.nn.functional.normalize(embeddings, dim=1)


def recall_at_1(units: torch.Tensor, labels: NDArray[np.int64]) -> float:
    """Return the share of images whose nearest other one shows the same person."""
    scores = (units @ units.T).fill_diagonal_(-2.0)
    return float((labels[scores.argmax(dim=1).numpy()] == labels).mean())


def triplet_loss(units: torch.Tensor, labels: NDArray[np.int64]) -> float:
    """Return the mean triplet loss over drawn triplets."""
    rng = np.random.default_rng(1)
    anchors = rng.integers(len(labels), size=TRIPLETS)
    same = labels == labels[anchors][:, None]
    same_but_itself = same.copy()
    same_but_itself[np.arange(TRIPLETS), anchors] = False
    keys = rng.random(same.shape)
    positives = np.where(same_but_itself, keys, -1).argmax(axis=1)
    negatives = np.where(~same, keys, -1).argmax(axis=1)
    near, far = ((units[anchors] - units[others]).square().sum(dim=1) for others in (positives, negatives))
    return float(torch.relu(near - far + MARGIN).mean())
