"""Weights and optimizer state are the real ones to the byte, the fullest moment of a step is within a stated factor."""

import pytest
import torch
from distributed.ranks import run_ranks

from facetrain.batch import PairBatch
from facetrain.config import Config, DataConfig, ModelConfig, RunConfig, TrainConfig
from facetrain.engine import Engine
from facetrain.estimate.counting import WorkCounter
from facetrain.estimate.memory import kept_memory, step_memory
from facetrain.estimate.network import measure_loss, measure_network, measure_passes
from facetrain.estimate.schedule import schedule_of
from facetrain.losses.npair import NPairLoss
from facetrain.models import build_backbone
from facetrain.step import train_step

PAIRS, IMAGE_PX = 64, 32


def config_of(**train) -> Config:
    return Config(
        run=RunConfig(device="cpu"),
        data=DataConfig(image_px=IMAGE_PX, colour="grey", workers=0),
        model=ModelConfig(embedding_dim=26),
        train=TrainConfig(global_pairs=PAIRS, **train),
    )


CONFIGS = {
    "adamw": config_of(),
    "sgd": config_of(optimizer="sgd"),
    "sgd without momentum": config_of(optimizer="sgd", momentum=0.0),
    "ZeRO 1": config_of(zero_stage=1),
    "ZeRO 2, sgd": config_of(zero_stage=2, optimizer="sgd"),
    "bfloat16": config_of(precision="bfloat16"),
    "chunks": config_of(micro_pairs=4),
    "chunks at ZeRO 1": config_of(micro_pairs=4, zero_stage=1),
    "chunks at ZeRO 2": config_of(micro_pairs=4, zero_stage=2),
}


def bytes_of_storages(tensors) -> int:
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def real_memory(world, configs):
    """What stays after a step, part by part, and the most that a step makes beyond it, for each config."""
    return {name: memory_of_a_step(world, config) for name, config in configs.items()}


def memory_of_a_step(world, config):
    torch.manual_seed(0)
    pairs = PAIRS // world.world_size
    backbone = build_backbone(config.model, channels=1, image_px=IMAGE_PX)
    engine = Engine(backbone, config.train, world, pairs_per_rank=pairs)
    loss = NPairLoss(config.loss, world)
    images = torch.randint(0, 256, (2, pairs, IMAGE_PX, IMAGE_PX, 1), dtype=torch.uint8)
    batch = PairBatch(step=0, images_VnHWC=images, labels_n=torch.arange(pairs) + world.rank * pairs)
    train_step(engine, loss, batch, learning_rate=0.01)
    with WorkCounter() as counter:
        train_step(engine, loss, batch, learning_rate=0.01)
    optimizer = engine._torch_optimizer
    state = [x for values in optimizer.state.values() for x in values.values() if isinstance(x, torch.Tensor)]
    kept = {
        "weights": bytes_of_storages([*backbone.parameters(), *backbone.buffers()]),
        "optimizer state": bytes_of_storages(state),
    }
    if config.train.zero_stage > 0:
        shares = [p for group in optimizer.param_groups for p in group["params"]]
        kept["optimizer's share of weights"] = bytes_of_storages(shares)
    return kept, counter.peak_bytes


@pytest.mark.parametrize("world_size", [2])
def test_memory_is_that_of_a_real_step(world_size: int) -> None:
    for by_name in run_ranks(real_memory, world_size, CONFIGS):
        for name, (kept, peak_bytes) in by_name.items():
            config = CONFIGS[name]
            network = measure_network(config.model, config.data)
            assert kept_memory(config, network, world_size) == kept, name
            schedule = schedule_of(config.train, world_size)
            passes = measure_passes(config.model, config.data, config.train.precision, images=schedule.images)
            loss = measure_loss(
                config.loss, pairs=schedule.pairs, global_pairs=PAIRS, embedding_dim=network.embedding_dim
            )
            parts = step_memory(config, network, passes, loss, schedule, world_size)
            ratio = (sum(parts.values()) - parts["images"]) / peak_bytes
            assert 0.9 < ratio < 1.25, (name, ratio, parts, peak_bytes)
