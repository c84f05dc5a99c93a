"""W ranks compute what one process computes on the whole batch.

The reference shares no code with the loss: a cross-entropy over the full logits and the penalty, in one process.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distributed.ranks import run_ranks

from facetrain.config import LossConfig, ModelConfig, TrainConfig
from facetrain.embed import embed_images
from facetrain.engine import Engine
from facetrain.losses.npair import NPairLoss
from facetrain.models import build_backbone

PAIRS, STEPS, L2_WEIGHT, LEARNING_RATE = 12, 20, 0.01, 5e-4


def make_backbone(dtype):
    torch.manual_seed(0)
    model = ModelConfig(name="casianet", norm="none", embedding_dim=16)
    return build_backbone(model, channels=1, image_px=32).to(dtype)


def images_of(step, dtype):
    """Two views of every pair, [2, PAIRS, 1, 32, 32]: blobs that differ from pair to pair, and noise."""
    generator = torch.Generator().manual_seed(step)
    blobs = torch.randn(PAIRS, 1, 4, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, PAIRS, 1, 32, 32, generator=generator, dtype=torch.float64)
    return (3 * F.interpolate(blobs, (32, 32)) + 0.3 * noise).to(dtype)


def reference_loss(backbone, images_VN):
    anchors, positives = backbone(images_VN.flatten(0, 1)).unflatten(0, (2, -1))
    penalty = torch.cat([anchors, positives]).square().sum(dim=1).mean()
    return F.cross_entropy(anchors @ positives.T, torch.arange(PAIRS)) + L2_WEIGHT * penalty


def local_loss(world, forward, images_VN):
    rows = slice(world.rank * PAIRS // world.world_size, (world.rank + 1) * PAIRS // world.world_size)
    images_Vn = images_VN[:, rows]
    anchors, positives = forward(images_Vn.flatten(0, 1)).unflatten(0, (2, -1))
    return NPairLoss(LossConfig(l2_weight=L2_WEIGHT), world)(anchors, positives, torch.arange(PAIRS)[rows]).total


def relative_error(values, references):
    return max(float((v - r).norm() / r.norm()) for v, r in zip(values, references, strict=True))


def averaged_gradients(world):
    backbone = make_backbone(torch.float64)
    loss = local_loss(world, backbone, images_of(0, torch.float64))
    loss.backward()
    gradients = [world.all_reduce_mean_(p.grad.clone()) for p in backbone.parameters()]
    return float(world.all_reduce_mean_(loss.detach())), gradients


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_parameter_gradients_of_any_number_of_ranks_equal_one_process(world_size):
    backbone = make_backbone(torch.float64)
    expected_loss = reference_loss(backbone, images_of(0, torch.float64))
    expected_loss.backward()
    expected = [p.grad for p in backbone.parameters()]
    for loss, gradients in run_ranks(averaged_gradients, world_size):
        assert loss == pytest.approx(expected_loss.item(), rel=1e-12)
        assert relative_error(gradients, expected) < 1e-12


def train_through_engine(world, zero_stages):
    """Per ZeRO stage: what one long step changes, which is the clipped gradient, and the losses of 20 steps."""
    outcomes = {}
    for zero_stage in zero_stages:
        engine = make_engine(world, zero_stage, momentum=0.0)
        before = flat_weights(engine)
        engine.backward(local_loss(world, engine, images_of(0, torch.float32)))
        norm = float(engine.step(1.0))
        gradient = before - flat_weights(engine)

        engine, losses = make_engine(world, zero_stage, momentum=0.9), []
        for step in range(STEPS):
            loss = local_loss(world, engine, images_of(step, torch.float32))
            engine.backward(loss)
            engine.step(LEARNING_RATE)
            losses.append(float(world.all_reduce_mean_(loss.detach())))
        outcomes[zero_stage] = norm, gradient, losses
    return outcomes


def make_engine(world, zero_stage, *, momentum):
    config = TrainConfig(optimizer="sgd", momentum=momentum, zero_stage=zero_stage, clip_norm=1.0)
    return Engine(make_backbone(torch.float32), config, world, pairs_per_rank=PAIRS // world.world_size)


def flat_weights(engine):
    return torch.cat([weight.flatten() for weight in engine.weights().values()])


def reference_training():
    """The same in one process, by torch alone."""
    backbone = make_backbone(torch.float32)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=LEARNING_RATE, momentum=0.9)
    losses = []
    for step in range(STEPS):
        loss = reference_loss(backbone, images_of(step, torch.float32))
        optimizer.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(backbone.parameters(), 1.0))
        if step == 0:
            first_norm = norm
            gradient = torch.cat([p.grad.flatten() for p in backbone.parameters()])
        optimizer.step()
        losses.append(loss.item())
    return first_norm, gradient, losses


@pytest.mark.long
@pytest.mark.parametrize("world_size", [1, *(pytest.param(w, marks=pytest.mark.slow) for w in (2, 3, 4))])
def test_training_through_the_engine_equals_one_process_at_every_zero_stage(world_size):
    expected_norm, expected_gradient, expected_losses = reference_training()
    for outcomes in run_ranks(train_through_engine, world_size, (0, 1, 2, 3), timeout_s=240):
        for norm, gradient, losses in outcomes.values():
            assert norm == pytest.approx(expected_norm, rel=1e-5)
            assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()
            assert losses == pytest.approx(expected_losses, rel=1e-5)


def embed_with_shared_out_weights(world, num_images):
    engine = make_engine(world, 3, momentum=0.9)
    images = np.random.default_rng(0).integers(0, 256, (num_images, 32, 32, 1), dtype=np.uint8)
    return embed_images(
        engine.backbone, images.__getitem__, num_images, world=world, precision="float32", batch_images=4
    )


@pytest.mark.slow
def test_ranks_that_share_out_weights_embed_unequal_shares():
    for num_images in (3, 9):  # one and three batches for two ranks
        (one,) = run_ranks(embed_with_shared_out_weights, 1, num_images)
        for embeddings in run_ranks(embed_with_shared_out_weights, 2, num_images):
            assert torch.equal(embeddings, one)
