"""The loss that `loss.name` names."""

import numpy as np
from numpy.typing import NDArray

from facetrain.config import LossConfig, TrainConfig
from facetrain.config.loss import NPAIR_LOSSES
from facetrain.losses.angular import AngularLoss
from facetrain.losses.class_vectors import ClassVectors
from facetrain.losses.classes import ClassLoss
from facetrain.losses.group import GroupLoss
from facetrain.losses.loss import Loss
from facetrain.losses.npair import NPairLoss
from facetrain.world import World


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
        ValueError: The loss needs a library that isn't installed, or there are too few identities.
    """
    if config.name in NPAIR_LOSSES:
        return NPairLoss(config, world)
    if config.name in ("angular", "npair-angular"):
        return AngularLoss(config, world)
    if not config.has_classes:
        # Here, because the library takes a second to import and no other loss needs it.
        from facetrain.losses.library import LibraryLoss

        return LibraryLoss(config, world, seed=seed)
    vectors = ClassVectors(identities, embedding_dim, config.classes, train, world, seed=seed)
    return GroupLoss(config, world, vectors, seed=seed) if config.name == "group" else ClassLoss(config, world, vectors)
