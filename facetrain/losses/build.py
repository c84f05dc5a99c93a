"""The loss that `loss.name` names."""

from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from facetrain.config import LossConfig, TrainConfig
from facetrain.config.loss import NPAIR_LOSSES
from facetrain.losses.angular import AngularLoss
from facetrain.losses.class_vectors import ClassVectors
from facetrain.losses.classes import ClassLoss
from facetrain.losses.group import GroupLoss
from facetrain.losses.library import LibraryLoss
from facetrain.losses.loss import Loss
from facetrain.losses.npair import NPairLoss
from facetrain.world import World


def check_loss(config: LossConfig, *, num_identities: int, world_size: int) -> None:
    """Refuse what can't be built, before anything starts.

    Raises:
        ValueError: The loss needs a library that isn't installed, or learns vectors of fewer identities than there are
            processes to hold them.
    """
    of_library = not config.has_classes and config.name not in (*NPAIR_LOSSES, "angular", "npair-angular")
    if of_library and find_spec("pytorch_metric_learning") is None:
        raise ValueError(
            f"loss.name: '{config.name}' needs pytorch-metric-learning; pip install 'facetrain[metric-learning]'"
        )
    if config.has_classes and num_identities < max(2, world_size):
        raise ValueError(
            f"data.shards: expected as many trained identities as processes, and two, got {num_identities}"
        )


def build_loss(
    config: LossConfig,
    train: TrainConfig,
    world: World,
    *,
    identities: NDArray[np.int64],
    embedding_dim: int,
    seed: int,
) -> Loss:
    """Make the loss, with vectors for the identities where it learns some.

    Args:
        config: The section `loss`.
        train: The optimizer of those vectors.
        world: The ranks.
        identities: Labels that are trained on, ascending.
        embedding_dim: D.
        seed: 0 or more; for vectors, and for losses that draw at random.

    Raises:
        ValueError: As `check_loss`.
    """
    check_loss(config, num_identities=len(identities), world_size=world.world_size)
    if config.name in NPAIR_LOSSES:
        return NPairLoss(config, world)
    if config.name in ("angular", "npair-angular"):
        return AngularLoss(config, world)
    if not config.has_classes:
        return LibraryLoss(config, world, seed=seed)
    vectors = ClassVectors(identities, embedding_dim, config.classes, train, world, seed=seed)
    return GroupLoss(config, world, vectors, seed=seed) if config.name == "group" else ClassLoss(config, world, vectors)
