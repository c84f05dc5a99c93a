"""Every loss over W ranks is that of one process: values, gradients, what it learns, and resume at another W."""

import pytest
import torch
from distributed.ranks import run_ranks
from torch import nn

from facetrain.batch import PairBatch
from facetrain.config import LossConfig, TrainConfig
from facetrain.config.loss_parameters import ArcFaceConfig, GroupConfig, TripletConfig
from facetrain.engine import Engine
from facetrain.losses.build import build_loss
from facetrain.step import train_step
from facetrain.world import World

PAIRS, WIDTH, STEP = 24, 6, 5
TRAIN = TrainConfig(optimizer="sgd")
IDENTITIES = torch.arange(3, 60, 2)
CASES = [
    LossConfig(name="angular"),
    LossConfig(name="npair-angular"),
    LossConfig(name="softmax"),
    LossConfig(name="arcface", arcface=ArcFaceConfig(scale=8)),
    LossConfig(name="proxy-nca"),
    LossConfig(name="group", group=GroupConfig(iterations=2)),
    LossConfig(name="contrastive"),
    LossConfig(name="triplet", triplet=TripletConfig(mining="random")),
    LossConfig(name="triplet", triplet=TripletConfig(mining="semi-hard")),
    LossConfig(name="triplet", triplet=TripletConfig(mining="batch-hard")),
    LossConfig(name="lifted"),
    LossConfig(name="ranked-list"),
    LossConfig(name="multi-similarity"),
]


def make_loss(config, world, train=TRAIN):
    identities = IDENTITIES.numpy()
    return build_loss(config, train, world, identities=identities, embedding_dim=WIDTH, seed=2)


def rows_of(world):
    n = PAIRS // world.world_size
    return slice(world.rank * n, (world.rank + 1) * n)


def labels():
    labels_N = IDENTITIES[torch.randperm(len(IDENTITIES), generator=torch.Generator().manual_seed(4))][:PAIRS].clone()
    labels_N[[5, 20]] = int(labels_N[1])  # four images more, also on another rank
    return labels_N


def losses_and_gradients(world):
    """Per case: the mean of the ranks' shares, its gradients by this rank's embeddings, and by the class vectors."""
    generator = torch.Generator().manual_seed(0)
    embeddings_VND = torch.randn(2, PAIRS, WIDTH, generator=generator, dtype=torch.float64)
    outcomes = []
    for case in CASES:
        loss = make_loss(case, world)
        local_VnD, vectors = embeddings_VND[:, rows_of(world)].clone().requires_grad_(), loss.class_vectors
        if vectors is not None:
            vectors.rows_cD = vectors.rows_cD.detach().double().requires_grad_()
        total = loss(*local_VnD, labels()[rows_of(world)], step=STEP).total
        total.backward()
        by_vectors = world.all_gather_uneven(vectors.rows_cD.grad) if vectors else torch.zeros(1)
        mean = float(world.all_reduce_mean_(total.detach().clone()))
        outcomes.append((mean, local_VnD.grad / world.world_size, by_vectors))
    return outcomes


def learn(world, optimizer, state, steps):
    """Update class vectors by given gradients, from a state on; returns the state after it."""
    vectors = make_loss(CASES[2], world, TrainConfig(optimizer=optimizer)).class_vectors
    if state is not None:
        vectors.load(state)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        gradient_CD = torch.randn(len(IDENTITIES), WIDTH, generator=generator)
        vectors.rows_cD.grad = gradient_CD[vectors.first : vectors.end].clone()
        vectors.update(0.1)
    return vectors.state()


def learn_in_parts(world, halves):
    """The state after steps 0 and 1 here, and after steps 2 and 3 from the halves that another world gave."""
    return {o: (learn(world, o, None, (0, 1)), learn(world, o, halves.get(o), (2, 3))) for o in ("sgd", "adamw")}


def of_ranks(world, halves):
    return losses_and_gradients(world), learn_in_parts(world, halves)


@pytest.mark.parametrize("world_size", [2, *(pytest.param(w, marks=pytest.mark.slow) for w in (3, 4))])
def test_any_number_of_ranks_gives_the_loss_and_gradients_of_one_and_learns_and_resumes_like_it(world_size):
    expected = losses_and_gradients(World())
    halves = {optimizer: learn(World(), optimizer, None, (0, 1)) for optimizer in ("sgd", "adamw")}
    by_rank = run_ranks(of_ranks, world_size, halves, timeout_s=240)
    for c, (loss, gradient_VND, by_vectors) in enumerate(expected):
        of_case = [outcomes[c] for outcomes, _ in by_rank]
        assert [mean for mean, _, _ in of_case] == pytest.approx([loss] * world_size, rel=1e-12), CASES[c]
        gathered = torch.cat([gradient_VnD for _, gradient_VnD, _ in of_case], dim=1)
        torch.testing.assert_close(gathered, gradient_VND, rtol=1e-10, atol=1e-13)
        for _, _, gradient_of_vectors in of_case:
            torch.testing.assert_close(gradient_of_vectors, by_vectors, rtol=1e-10, atol=1e-13)
    for optimizer, half in halves.items():
        whole = learn(World(), optimizer, None, range(4))
        for _, learned in by_rank:
            first_half, second_half = learned[optimizer]
            assert all(first_half[name].equal(value) for name, value in half.items())
            assert all(second_half[name].equal(value) for name, value in whole.items())


def make_batch(world, step):
    generator = torch.Generator().manual_seed(step)
    pictures = torch.rand(1, PAIRS, 4, 4, generator=generator) + 0.2 * torch.rand(2, PAIRS, 4, 4, generator=generator)
    images = (200 * nn.functional.interpolate(pictures, (16, 16))).to(torch.uint8)[..., None]
    rows = rows_of(world)
    return PairBatch(step=step, images_VnHWC=images[:, rows], labels_n=labels()[rows])


TRAINED = [
    (LossConfig(name="softmax"), TrainConfig(optimizer="sgd")),
    (LossConfig(name="softmax"), TrainConfig(optimizer="sgd", zero_stage=1, clip_norm=0.1)),
    (LossConfig(name="softmax"), TrainConfig(optimizer="sgd", zero_stage=2, micro_pairs=3)),
    (LossConfig(name="group"), TrainConfig(optimizer="sgd", zero_stage=3, micro_pairs=6)),
]


def train_all(world):
    """The changes of weights and class vectors by three steps, for each case."""
    changes = []
    for loss_config, config in TRAINED:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(1, 8, 5), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(72, 6))
        loss = make_loss(loss_config, world, config)
        engine = Engine(network, config, world, pairs_per_rank=PAIRS // world.world_size)
        before = engine.weights() | loss.class_vectors.state()
        for step in range(3):
            train_step(engine, loss, make_batch(world, step), learning_rate=0.1)
        after = engine.weights() | loss.class_vectors.state()
        changes.append(torch.cat([(after[name] - value).flatten() for name, value in before.items()]))
    return changes


@pytest.mark.slow
def test_the_engine_trains_network_and_class_vectors_alike_on_any_ranks():
    (expected,) = run_ranks(train_all, 1, timeout_s=240)
    for changes in run_ranks(train_all, 2, timeout_s=240):
        for change, change_of_one in zip(changes, expected, strict=True):
            assert (change - change_of_one).norm() < 1e-4 * change_of_one.norm()
    assert (expected[2] - expected[0]).norm() < 1e-4 * expected[0].norm()  # in chunks as at once
