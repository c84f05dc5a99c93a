"""The bytes of every collective that a step or a mining round really issues are those of the estimate."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from distributed.ranks import run_ranks
from estimate.traffic import Traffic

from facetrain.batch import PairBatch
from facetrain.config import Config, DataConfig, LossConfig, MiningConfig, ModelConfig, RunConfig, TrainConfig
from facetrain.data.index import ClassTable
from facetrain.embed import embed_images
from facetrain.engine import Engine
from facetrain.estimate.cluster import Cluster
from facetrain.estimate.collectives import Collective, mining_collectives, step_collectives
from facetrain.estimate.network import measure_network
from facetrain.losses.npair import NPairLoss
from facetrain.mining.gathered import mine_round
from facetrain.models import build_backbone, convert_sync_batchnorm
from facetrain.step import train_step

PAIRS, IMAGE_PX, CANDIDATES = 32, 16, 300


def config_of(*, norm="batch", sync_batchnorm=False, loss=None, **train) -> Config:
    return Config(
        run=RunConfig(device="cpu"),
        data=DataConfig(image_px=IMAGE_PX, colour="grey", workers=0),
        model=ModelConfig(norm=norm, sync_batchnorm=sync_batchnorm, embedding_dim=24),
        loss=loss or LossConfig(),
        train=TrainConfig(global_pairs=PAIRS, **train),
        mining=MiningConfig(mode="gathered", candidates=CANDIDATES, batches_per_round=6, lag_steps=0),
    )


ENGINES = {
    "ZeRO 0, sgd": config_of(zero_stage=0, optimizer="sgd"),
    "ZeRO 1, clipped": config_of(zero_stage=1, clip_norm=1.0),
    "ZeRO 2": config_of(zero_stage=2, precision="bfloat16"),
    "ZeRO 0 in chunks": config_of(zero_stage=0, micro_pairs=2),
    "ZeRO 1 in chunks": config_of(zero_stage=1, micro_pairs=2),
    "ZeRO 2 in chunks": config_of(zero_stage=2, micro_pairs=2),
}
LOSSES = {
    "one against one": config_of(norm="none", loss=LossConfig(name="npair-ovo")),
    "anchors as negatives": config_of(norm="group", loss=LossConfig(name="tuplet")),
    "both ways, cosines": config_of(loss=LossConfig(symmetric=True, temperature=0.1)),
    "gradients in bfloat16": config_of(loss=LossConfig(reduce_precision="bfloat16")),
    "positives first": config_of(norm="none", overlap=True),
    "statistics of all ranks": config_of(sync_batchnorm=True),
    "statistics of all ranks, in chunks": config_of(sync_batchnorm=True, micro_pairs=2),
}


def traffic_of_steps(world, configs):
    """The collectives of the second step, when nothing is set up any more, for each config."""
    return {name: traffic_of_a_step(world, config) for name, config in configs.items()}


def traffic_of_a_step(world, config):
    torch.manual_seed(0)
    pairs = PAIRS // world.world_size
    backbone = build_backbone(config.model, channels=1, image_px=IMAGE_PX)
    if config.model.sync_batchnorm:
        backbone = convert_sync_batchnorm(backbone, world)
    engine = Engine(backbone, config.train, world, pairs_per_rank=pairs)
    loss = NPairLoss(config.loss, world)
    images = torch.randint(0, 256, (2, pairs, IMAGE_PX, IMAGE_PX, 1), dtype=torch.uint8)
    batch = PairBatch(step=0, images_VnHWC=images, labels_n=torch.arange(pairs) + world.rank * pairs)
    train_step(engine, loss, batch, learning_rate=0.01)
    with Traffic() as traffic:
        train_step(engine, loss, batch, learning_rate=0.01)
    return traffic.calls


def estimated(config: Config, world_size: int) -> Counter[tuple[str, int]]:
    network = measure_network(config.model, config.data)
    return counted(step_collectives(config, network, world_size))


def counted(collectives) -> Counter[tuple[str, int]]:
    calls: Counter[tuple[str, int]] = Counter()
    for c in collectives:
        assert c.calls_per_step == int(c.calls_per_step)
        calls[c.operation, c.payload_bytes] += int(c.calls_per_step)
    return calls


@pytest.mark.parametrize("world_size", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_the_bytes_of_a_steps_collectives_are_the_estimates(world_size: int) -> None:
    configs = ENGINES | LOSSES
    for by_name in run_ranks(traffic_of_steps, world_size, configs, timeout_s=240):
        for name, calls in by_name.items():
            assert Counter(calls) == estimated(configs[name], world_size), name


def traffic_of_a_round(world, config):
    backbone = build_backbone(config.model, channels=1, image_px=IMAGE_PX)
    image = np.zeros((IMAGE_PX, IMAGE_PX, 1), dtype=np.uint8)
    table = ClassTable(names=tuple(map(str, range(CANDIDATES))), first_image=2 * np.arange(CANDIDATES + 1))

    def embed(image_idx):
        return embed_images(backbone, lambda i: image, len(image_idx), world=world, precision="float32")

    with Traffic() as traffic:
        mine_round(
            0,
            config.mining,
            num_pairs=PAIRS,
            table=table,
            identities=np.arange(CANDIDATES),
            embed=embed,
            seed=0,
            world=world,
        )
    return traffic.calls


@pytest.mark.parametrize("world_size", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_the_bytes_of_a_mining_rounds_collectives_are_the_estimates(world_size: int) -> None:
    config = config_of()
    network = measure_network(config.model, config.data)
    found = list(mining_collectives(config, network, world_size, CANDIDATES))
    *tensors, lists = [dataclasses.replace(c, calls_per_step=round(6 * c.calls_per_step)) for c in found]
    for calls in run_ranks(traffic_of_a_round, world_size, config):
        expected = counted(tensors)
        assert Counter(calls) - expected == Counter([calls[-1]])
        # Lists travel as pickled objects: the identities are counted, not what pickle and the metrics add.
        operation, payload_bytes = calls[-1]
        assert operation == "all-gather"
        assert lists.payload_bytes < payload_bytes < lists.payload_bytes + 600 * 6


def test_what_a_ring_sends_and_takes() -> None:
    """By hand: 2 machines of 4 GPUs, 10 GB/s between them per GPU, hops of 10 us between and 1 us inside."""
    cluster = Cluster(nodes=2, gpus_per_node=4, link_gb_per_s=10, node_link_gb_per_s=100, latency_us=10)
    gather = Collective("", "", "all-gather", 8_000_000, 1)
    reduce = Collective("", "", "all-reduce", 8_000_000, 1)
    assert gather.sent_bytes(8) == 7_000_000
    assert reduce.sent_bytes(8) == 14_000_000
    assert gather.seconds(cluster) == pytest.approx(7e6 / 40e9 + 6 * 1e-6 + 1 * 10e-6)
    assert reduce.seconds(cluster) == pytest.approx(14e6 / 40e9 + 2 * (3 * 1e-6 + 1 * 10e-6))


def test_one_rank_sends_nothing() -> None:
    config = config_of(sync_batchnorm=True, zero_stage=2)
    network = measure_network(config.model, config.data)
    assert list(step_collectives(config, network, 1)) == []
    assert list(mining_collectives(config, network, 1, CANDIDATES)) == []
