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
from facetrain.estimate.collectives import Collective, step_collectives
from facetrain.estimate.mining import mining_work
from facetrain.estimate.network import measure_network
from facetrain.losses.build import build_loss
from facetrain.mining.embedding_table import EmbeddingTable
from facetrain.mining.gathered import mine_round
from facetrain.mining.quota import mine_quota_round, spread_identities
from facetrain.models import build_backbone, convert_sync_batchnorm
from facetrain.step import train_step
from facetrain.world import World

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
    "batches before": config_of(loss=LossConfig(memory_batches=2)),
    "both sides": config_of(loss=LossConfig(name="angular")),
    "both sides and N-pair": config_of(loss=LossConfig(name="npair-angular", reduce_precision="bfloat16")),
    "classes": config_of(loss=LossConfig(name="softmax")),
    "classes, cosines": config_of(loss=LossConfig(name="arcface"), zero_stage=1, micro_pairs=2),
    "proxies": config_of(loss=LossConfig(name="proxy-nca")),
    "classes, refined": config_of(loss=LossConfig(name="group")),
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
    loss = build_loss(config.loss, config.train, world, identities=np.arange(PAIRS), embedding_dim=24, seed=0)
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


@pytest.mark.long
@pytest.mark.parametrize("world_size", [2, *(pytest.param(W, marks=pytest.mark.slow) for W in (4, 8))])
def test_the_bytes_of_a_steps_collectives_are_the_estimates(world_size: int) -> None:
    configs = ENGINES | LOSSES
    for by_name in run_ranks(traffic_of_steps, world_size, configs, timeout_s=240):
        for name, calls in by_name.items():
            assert Counter(calls) == estimated(configs[name], world_size), name


@pytest.mark.slow
@pytest.mark.parametrize("micro_pairs", [None, 4])
def test_bytes_at_zero_3_are_about_the_estimates(micro_pairs: int | None) -> None:
    config = config_of(zero_stage=3, micro_pairs=micro_pairs)
    for calls in run_ranks(traffic_of_a_step, 2, config, timeout_s=240):
        expected = estimated(config, 2)
        for operation in ("all-gather", "reduce-scatter"):
            sums = [
                sum(size * times for (name, size), times in counts.items() if name == operation)
                for counts in (Counter(calls), expected)
            ]
            assert sums[0] == pytest.approx(sums[1], rel=0.1)


MINING = {
    "greedy": dict(mode="gathered", batches_per_round=1),
    "graph": dict(mode="gathered", batches_per_round=6),
    "one image": dict(mode="gathered", batches_per_round=6, images_per_class=1),
    "quota": dict(mode="quota", batches_per_round=6, virtual_nodes=8),
}


def mining_config(**mining) -> Config:
    return dataclasses.replace(config_of(), mining=MiningConfig(candidates=CANDIDATES, lag_steps=0, **mining))


def traffic_of_rounds(world):
    return {name: traffic_of_a_round(world, mining_config(**mining)) for name, mining in MINING.items()}


def traffic_of_a_round(world, config):
    backbone = build_backbone(config.model, channels=1, image_px=IMAGE_PX)
    image = np.zeros((IMAGE_PX, IMAGE_PX, 1), dtype=np.uint8)
    table = ClassTable(names=tuple(map(str, range(CANDIDATES))), first_image=2 * np.arange(CANDIDATES + 1))
    by_quota = config.mining.mode == "quota"
    embedding_world = World() if by_quota else world

    def embed(image_idx):
        return embed_images(backbone, lambda i: image, len(image_idx), world=embedding_world, precision="float32")

    with Traffic() as traffic:
        shared = {"num_pairs": PAIRS, "table": table, "embed": embed, "seed": 0, "world": world}
        if by_quota:
            nodes = spread_identities(np.arange(CANDIDATES), config.mining.virtual_nodes, 0)
            mine_quota_round(0, config.mining, nodes=nodes, **shared)
        else:
            mine_round(0, config.mining, identities=np.arange(CANDIDATES), **shared)
    return [call for call in traffic.calls if call[1] > 0]  # capped pairs, of which there are none


@pytest.mark.parametrize("world_size", [2, *(pytest.param(W, marks=pytest.mark.slow) for W in (4, 8))])
def test_the_bytes_of_a_mining_rounds_collectives_are_the_estimates(world_size: int) -> None:
    for by_name in run_ranks(traffic_of_rounds, world_size):
        for name, calls in by_name.items():
            config = mining_config(**MINING[name])
            *tensors, lists = mining_collectives(config, world_size, CANDIDATES)
            *others, (operation, payload_bytes) = calls
            assert Counter(others) == counted(tensors), name
            # Lists travel as pickled objects: the identities are counted, not what pickle and the metrics add.
            assert operation == "all-gather"
            assert lists.payload_bytes < payload_bytes < lists.payload_bytes + 700 * 8


def mining_collectives(config: Config, world_size: int, identities: int) -> list[Collective]:
    """Those of a round, however many steps it serves."""
    cluster = Cluster(gpus_per_node=world_size)
    network = measure_network(config.model, config.data)
    found = mining_work(config, cluster, network, identities=identities).collectives
    batches = config.mining.batches_per_round
    return [dataclasses.replace(c, calls_per_step=round(batches * c.calls_per_step)) for c in found]


def traffic_of_an_observation(world):
    table = EmbeddingTable(np.arange(CANDIDATES), dtype=torch.bfloat16, world=world)
    pairs = PAIRS // world.world_size
    with Traffic() as traffic:
        table.observe(0, torch.arange(pairs), torch.zeros(2, pairs, 24))
    return traffic.calls


def test_the_bytes_that_a_table_takes_from_a_step_are_the_estimates() -> None:
    config = mining_config(mode="table")
    network = measure_network(config.model, config.data)
    found = mining_work(config, Cluster(gpus_per_node=2), network, identities=CANDIDATES).collectives
    in_a_step = [c for c in found if c.calls_per_step == 1]
    for calls in run_ranks(traffic_of_an_observation, 2):
        assert Counter(calls) == counted(in_a_step)


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
    assert mining_collectives(config, 1, CANDIDATES) == []
