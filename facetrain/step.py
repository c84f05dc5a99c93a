"""One optimizer step: pairs -> embeddings -> global loss -> update -> StepStats."""

from dataclasses import dataclass

import torch
from torch import Tensor

from facetrain.batch import PairBatch, network_input
from facetrain.engine import Engine
from facetrain.losses.npair import NPairLoss
from facetrain.world import World


@dataclass(frozen=True)
class StepStats:
    """What a step measured, on the device: reading it is a sync point, so it is read at logging steps alone."""

    loss: Tensor
    """This rank's share of the objective, penalty included. Scalar."""
    npair: Tensor
    """This rank's share of the N-pair loss. Scalar."""
    squared_norm: Tensor
    """Mean ||f||^2 of this rank's embeddings. Scalar."""
    grad_norm: Tensor
    """Norm of the averaged gradient before clipping, equal on all ranks. Scalar."""
    embeddings_VnD: Tensor  # noqa: N815 - dims as suffixes
    """This rank's embeddings, detached, as the network gave them."""

    def read(self, world: World) -> dict[str, float]:
        """Return the figures of the global batch under their metric names; every rank must call it.

        One all-reduce; every rank ends with the means.
        """
        figures = [self.loss.detach(), self.npair, self.squared_norm, self.grad_norm]
        means = world.all_reduce_mean_(torch.stack([f.to(world.device, torch.float64) for f in figures])).tolist()
        names = ("train/loss", "train/npair_loss", "train/squared_norm", "train/grad_norm")
        return dict(zip(names, means, strict=True))


def train_step(engine: Engine, loss: NPairLoss, batch: PairBatch, *, learning_rate: float) -> StepStats:
    """Update the network by one global batch, of which this rank holds n pairs.

    One forward of 2n images, anchors first, so that batch statistics are those of both views.
    """
    embeddings_VnD = engine(network_input(batch.images_VnHWC.flatten(0, 1))).unflatten(0, (2, -1))
    value = loss(embeddings_VnD[0], embeddings_VnD[1], batch.labels_n)
    engine.backward(value.total)  # over all ranks: gradients are averaged
    grad_norm = engine.step(learning_rate)
    return StepStats(
        loss=value.total.detach(),
        npair=value.npair,
        squared_norm=value.squared_norm,
        grad_norm=grad_norm,
        embeddings_VnD=embeddings_VnD.detach(),
    )
