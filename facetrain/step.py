"""One optimizer step: pairs -> embeddings -> global loss -> update -> StepStats.

Dims: V = 2 views of a pair (anchor, positive), n pairs on this rank, m pairs of a chunk, D embedding width.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from facetrain.batch import PairBatch, network_input
from facetrain.engine import Engine
from facetrain.losses.loss import Loss, LossValue
from facetrain.world import World


@dataclass(frozen=True)
class StepStats:
    """What a step measured, on the device: reading it is a sync point, so it is read at logging steps alone."""

    loss: Tensor
    """This rank's share of the objective, penalty included. Scalar."""
    data_loss: Tensor
    """This rank's share of the objective without the penalty. Scalar."""
    squared_norm: Tensor
    """Mean ||f||^2 of this rank's embeddings. Scalar."""
    grad_norm: Tensor
    """Norm of the averaged gradient before clipping, equal on all ranks. Scalar."""
    embeddings_VnD: Tensor  # noqa: N815 - dims as suffixes
    """This rank's embeddings, detached, as the network gave them."""

    def read(self, world: World) -> dict[str, float]:
        """Return the figures of the global batch under their metric names; every rank must call it.

        `train/spread` is 1 - ||mean f||^2 / mean ||f||^2 over a rank's embeddings: 0 where all are the same.

        One all-reduce; every rank ends with the means.
        """
        mean_D = self.embeddings_VnD.float().flatten(0, 1).mean(dim=0)
        spread = 1 - mean_D.square().sum() / self.squared_norm
        figures = [self.loss, self.data_loss, self.squared_norm, self.grad_norm, spread]
        means = world.all_reduce_mean_(torch.stack([f.to(world.device, torch.float64) for f in figures])).tolist()
        names = ("train/loss", "train/data_loss", "train/squared_norm", "train/grad_norm", "train/spread")
        return dict(zip(names, means, strict=True))


class Differentiable(Protocol):
    """What gradients are computed through: the engine, or a bare network in a test."""

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Return embeddings [B, D] in training mode."""

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the gradient of a loss; `last` ends the step's accumulation."""


def train_step(engine: Engine, loss: Loss, batch: PairBatch, *, learning_rate: float) -> StepStats:
    """Update the network by one global batch, of which this rank holds n pairs.

    `train.micro_pairs` and `train.overlap` say how the gradient is computed, which is the same either way.
    """
    micro_pairs = engine.config.micro_pairs or len(batch.labels_n)
    if micro_pairs < len(batch.labels_n):
        value, embeddings_VnD = backward_in_chunks(engine, engine.backbone, loss, batch, micro_pairs)
    elif engine.config.overlap:
        value, embeddings_VnD = backward_overlapped(engine, loss, batch)
    else:
        value, embeddings_VnD = backward_at_once(engine, loss, batch)
    grad_norm = engine.step(learning_rate)
    if loss.class_vectors is not None:
        loss.class_vectors.update(learning_rate)
    return StepStats(
        loss=value.total.detach(),
        data_loss=value.data,
        squared_norm=value.squared_norm,
        grad_norm=grad_norm,
        embeddings_VnD=embeddings_VnD,
    )


def backward_at_once(engine: Differentiable, loss: Loss, batch: PairBatch) -> tuple[LossValue, Tensor]:
    """Compute the gradient with one forward of 2n images, anchors first: batch statistics are those of both views.

    Returns:
        The loss, and the embeddings [2, n, D], detached.
    """
    embeddings_VnD = engine(network_input(batch.images_VnHWC.flatten(0, 1))).unflatten(0, (2, -1))
    value = loss(embeddings_VnD[0], embeddings_VnD[1], batch.labels_n, step=batch.step)
    engine.backward(value.total)  # over all ranks: gradients are averaged
    return value, embeddings_VnD.detach()


def backward_overlapped(engine: Differentiable, loss: Loss, batch: PairBatch) -> tuple[LossValue, Tensor]:
    """Compute the same gradient with two forwards of n images, for networks without batch statistics.

    The positives are gathered while the anchors are embedded, and their gradient is reduced while that of the anchors
    goes back through the network.

    Returns:
        The loss, and the embeddings [2, n, D], detached.
    """
    positives_nD = engine(network_input(batch.images_VnHWC[1]))
    gather = loss.start_gather(positives_nD)  # over all ranks; the loss waits for it
    anchors_nD = engine(network_input(batch.images_VnHWC[0]))
    value = loss(anchors_nD, positives_nD, batch.labels_n, gather, step=batch.step)
    engine.backward(value.total)  # over all ranks: gradients are averaged
    return value, torch.stack([anchors_nD.detach(), positives_nD.detach()])


def backward_in_chunks(
    engine: Differentiable, backbone: nn.Module, loss: Loss, batch: PairBatch, micro_pairs: int
) -> tuple[LossValue, Tensor]:
    """Compute the same gradient with activations of 2m images at a time, for one more forward (GradCache).

    First all chunks are embedded without gradient; the loss of the whole batch gives the gradient of every embedding;
    then each chunk is embedded again and passes its part of that gradient on. Both passes draw the same random
    numbers and take batch statistics from the same chunk, so that a network with BatchNorm trains as with batches of
    2m images; running statistics are updated once, in the second pass.

    Args:
        engine: Where gradients accumulate.
        backbone: Its network, whose buffers the first pass leaves as they were.
        loss: The objective over all ranks.
        batch: n pairs.
        micro_pairs: m, a divisor of n.

    Returns:
        The loss, and the embeddings [2, n, D], detached.

    Source: Gao et al., Scaling deep contrastive learning batch size under memory limited setup, RepL4NLP 2021.
    """
    chunks = [_Chunk(images_VmHWC.flatten(0, 1)) for images_VmHWC in batch.images_VnHWC.split(micro_pairs, dim=1)]
    buffers = [buffer.clone() for buffer in backbone.buffers()]
    with torch.no_grad():
        embedded = [engine(chunk.first_input()).unflatten(0, (2, -1)) for chunk in chunks]
        for buffer, before in zip(backbone.buffers(), buffers, strict=True):
            buffer.copy_(before)

    embeddings_VnD = torch.cat(embedded, dim=1).requires_grad_()
    value = loss(embeddings_VnD[0], embeddings_VnD[1], batch.labels_n, step=batch.step)
    value.total.backward()  # of what the loss learns too
    grad_VnD = embeddings_VnD.grad
    assert grad_VnD is not None

    for chunk, grad_VmD in zip(chunks, grad_VnD.split(micro_pairs, dim=1), strict=True):
        embeddings_BD = engine(chunk.second_input())
        surrogate = (embeddings_BD * grad_VmD.flatten(0, 1)).sum()  # its gradient by the embeddings is grad_VmD
        engine.backward(surrogate, last=chunk is chunks[-1])  # over all ranks after the last: gradients are averaged
    return value, embeddings_VnD.detach()


class _Chunk:
    """Images of a chunk, and the state of the random numbers when they were first embedded."""

    def __init__(self, images_BHWC: Tensor) -> None:
        self.images_BHWC = images_BHWC
        self.on_cuda = images_BHWC.device.type == "cuda"

    def first_input(self) -> Tensor:
        self.cpu_state = torch.get_rng_state()
        self.cuda_state = torch.cuda.get_rng_state(self.images_BHWC.device) if self.on_cuda else None
        return network_input(self.images_BHWC)

    def second_input(self) -> Tensor:
        torch.set_rng_state(self.cpu_state)
        if self.cuda_state is not None:
            torch.cuda.set_rng_state(self.cuda_state, self.images_BHWC.device)
        return network_input(self.images_BHWC)
