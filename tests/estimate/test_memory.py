"""Weights and optimizer state are the real ones to the byte, the fullest moment of a step is within a stated factor."""

import numpy as np
import pytest
import torch
from distributed.ranks import run_ranks

from facetrain.batch import PairBatch
from facetrain.config import Config, DataConfig, LossConfig, ModelConfig, RunConfig, TrainConfig
from facetrain.engine import Engine
from facetrain.estimate.counting import WorkCounter
from facetrain.estimate.loss import measure_loss
from facetrain.estimate.memory import kept_by_loss, kept_memory, step_memory
from facetrain.estimate.network import measure_network, measure_passes
from facetrain.estimate.schedule import schedule_of
from facetrain.losses.build import build_loss
from facetrain.models import build_backbone
from facetrain.step import train_step

PAIRS, IMAGE_PX, CLASSES = 64, 32, 20_000


def config_of(*, loss=None, **train) -> Config:
    return Config(
        run=RunConfig(device="cpu"),
        data=DataConfig(image_px=IMAGE_PX, colour="grey", workers=0),
        model=ModelConfig(embedding_dim=26),
        loss=loss or LossConfig(),
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
    "batches before": config_of(loss=LossConfig(memory_batches=50)),
    "many classes": config_of(loss=LossConfig(name="softmax")),
    "many classes, sgd": config_of(loss=LossConfig(name="arcface"), optimizer="sgd"),
    "many classes, refined, in chunks": config_of(loss=LossConfig(name="group"), micro_pairs=4),
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
    loss = build_loss(config.loss, config.train, world, identities=np.arange(CLASSES), embedding_dim=26, seed=0)
    images = torch.randint(0, 256, (2, pairs, IMAGE_PX, IMAGE_PX, 1), dtype=torch.uint8)
    batch = PairBatch(step=0, images_VnHWC=images, labels_n=torch.arange(pairs) + world.rank * pairs)
    if batches := config.loss.memory_batches:  # as many as it will hold
        labels = torch.arange(batches * PAIRS).reshape(batches, PAIRS)
        loss.load_state({"labels": labels, "rows": torch.randn(*labels.shape, 26)})
    train_step(engine, loss, batch, learning_rate=0.01)
    with WorkCounter() as counter:
        train_step(engine, loss, batch, learning_rate=0.01)
    optimizer = engine._torch_optimizer
    state = [x for values in optimizer.state.values() for x in values.values() if isinstance(x, torch.Tensor)]
    kept = {
        "weights": bytes_of_storages([*backbone.parameters(), *backbone.buffers()]),
        "optimizer state": bytes_of_storages(state),
    }
    if loss.class_vectors is not None:
        kept["class vectors"] = bytes_of_storages([loss.class_vectors.rows_cD])
        (state,) = loss.class_vectors._optimizer.state.values()
        kept["their optimizer state"] = bytes_of_storages([x for x in state.values() if isinstance(x, torch.Tensor)])
    if batches:
        kept["batches before"] = bytes_of_storages([x for pair in loss._memory._past for x in pair])
    if config.train.zero_stage > 0:
        shares = [p for group in optimizer.param_groups for p in group["params"]]
        kept["optimizer's share of weights"] = bytes_of_storages(shares)
    return kept, counter.peak_bytes


@pytest.mark.long
@pytest.mark.parametrize("world_size", [2])
def test_memory_is_that_of_a_real_step(world_size: int) -> None:
    for by_name in run_ranks(real_memory, world_size, CONFIGS):
        for name, (kept, peak_bytes) in by_name.items():
            config = CONFIGS[name]
            network = measure_network(config.model, config.data)
            schedule = schedule_of(config.train, world_size)
            passes = measure_passes(config.model, config.data, config.train.precision, images=schedule.images)
            sizes = {"pairs": schedule.pairs, "global_pairs": PAIRS, "embedding_dim": 26}
            loss = measure_loss(config.loss, **sizes, classes=CLASSES // world_size)
            assert kept_memory(config, network, world_size) | kept_by_loss(config, loss) == kept, name
            parts = step_memory(config, network, passes, loss, schedule, world_size)
            ratio = (sum(parts.values()) - parts["images"]) / peak_bytes
            assert 0.9 < ratio < 1.25, (name, ratio, parts, peak_bytes)
