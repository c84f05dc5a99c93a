"""A step in chunks, or with overlap, is the step at once: gradients, running statistics, updates of the engine."""

import pytest
import torch
from distributed.ranks import run_ranks
from torch import nn

from facetrain.batch import PairBatch, network_input
from facetrain.config import LossConfig, TrainConfig
from facetrain.engine import Engine
from facetrain.losses.npair import NPairLoss
from facetrain.step import backward_at_once, backward_in_chunks, backward_overlapped, train_step
from facetrain.world import World

PAIRS, LOSS = 12, LossConfig(l2_weight=0.01)


OVERLAP = -1  # in place of a number of pairs


def make_network(*layers):
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(72, 16)]
    return nn.Sequential(nn.Conv2d(1, 8, 5), *layers, nn.ReLU(), *head)


def make_batch(world, step=0):
    """Pairs of smooth pictures, a rank's share of them."""
    generator = torch.Generator().manual_seed(step)
    pictures = torch.rand(1, PAIRS, 4, 4, generator=generator) + 0.2 * torch.rand(2, PAIRS, 4, 4, generator=generator)
    images = (200 * nn.functional.interpolate(pictures, (16, 16))).to(torch.uint8)[..., None]
    n = PAIRS // world.world_size
    rows = slice(world.rank * n, (world.rank + 1) * n)
    return PairBatch(step=step, images_VnHWC=images[:, rows], labels_n=torch.arange(PAIRS)[rows])


class Float64:
    """A network in float64, which DeepSpeed doesn't take."""

    def __init__(self, network):
        self.network = network.double().train()

    def __call__(self, images):
        return self.network(images.double())

    def backward(self, loss, *, last=True):
        loss.backward()


def gradients(world, layers, micro_pairs):
    network = Float64(make_network(*layers))
    torch.manual_seed(world.rank)
    loss, batch = NPairLoss(LOSS, world), make_batch(world)
    if micro_pairs is None:
        value, _ = backward_at_once(network, loss, batch)
    elif micro_pairs == OVERLAP:
        value, _ = backward_overlapped(network, loss, batch)
    else:
        value, _ = backward_in_chunks(network, network.network, loss, batch, micro_pairs)
    averaged = [world.all_reduce_mean_(p.grad.clone()) for p in network.network.parameters()]
    return [world.all_reduce_mean_(value.total.detach().clone()), *averaged], dict(network.network.named_buffers())


def at_once_and_in_chunks(world):
    return [gradients(world, (), micro_pairs)[0] for micro_pairs in (None, 1, 2, 3, OVERLAP)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_in_chunks_and_with_overlap_are_those_at_once(world_size):
    for at_once, *others in run_ranks(at_once_and_in_chunks, world_size):
        for chunked in others:
            for got, expected in zip(chunked, at_once, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)


def test_both_passes_draw_the_same_random_numbers():
    """One chunk with dropout: the second pass must repeat the first, which is all that the step at once does."""
    (at_once, _), (chunked, _) = (gradients(World(), (nn.Dropout(0.5),), m) for m in (None, PAIRS))
    for got, expected in zip(chunked, at_once, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)


def test_with_batchnorm_a_chunk_is_a_batch_and_running_statistics_move_once():
    layers = (nn.BatchNorm2d(8),)
    network, batch = make_network(*layers).double().train(), make_batch(World())
    chunks = batch.images_VnHWC.split(4, dim=1)
    embedded = [network(network_input(chunk.flatten(0, 1)).double()).unflatten(0, (2, -1)) for chunk in chunks]
    total = NPairLoss(LOSS, World())(*torch.cat(embedded, dim=1), batch.labels_n).total
    total.backward()

    (value, *chunked), buffers = gradients(World(), layers, 4)
    torch.testing.assert_close(value, total.detach(), rtol=1e-12, atol=0.0)
    for got, parameter in zip(chunked, network.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-10, atol=1e-13)
    for name, buffer in network.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, rtol=1e-12, atol=0.0)


def flat_weights(engine):
    return torch.cat([weight.flatten() for weight in engine.weights().values()])


def updates(world):
    """What three clipped steps change, by ZeRO stage: at once, and in three or more chunks."""
    changed = {}
    for zero_stage in (0, 1, 2, 3):
        for micro_pairs in (None, PAIRS // world.world_size // 3, 1, OVERLAP):
            overlap = micro_pairs == OVERLAP
            chunks = None if overlap else micro_pairs
            how = {"micro_pairs": chunks, "overlap": overlap, "zero_stage": zero_stage}
            config = TrainConfig(optimizer="sgd", clip_norm=0.5, **how)
            engine = Engine(make_network(), config, world, pairs_per_rank=PAIRS // world.world_size)
            before = flat_weights(engine)
            for step in range(3):
                batch = make_batch(world, step)
                train_step(engine, NPairLoss(LOSS, world), batch, learning_rate=0.1)
            changed[zero_stage, micro_pairs] = flat_weights(engine) - before
    return changed


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_updates_in_chunks_are_those_at_once_at_every_zero_stage(world_size):
    for changed in run_ranks(updates, world_size):
        for key, change in changed.items():
            error = (change - changed[0, None]).norm() / changed[0, None].norm()
            assert error < 1e-5, key
