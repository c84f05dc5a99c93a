import numpy as np
import pytest
import torch
from distributed.ranks import run_ranks

from facetrain.checkpoint import (
    TrainState,
    load_backbone,
    load_optimizer,
    load_state,
    newest_checkpoint,
    save_checkpoint,
)
from facetrain.config import Config, DataConfig, ModelConfig, TrainConfig
from facetrain.engine import Engine
from facetrain.models import build_backbone


def make_engine(world, config):
    torch.manual_seed(0)
    backbone = build_backbone(config.model, channels=3, image_px=32)
    return Engine(backbone, config.train, world, pairs_per_rank=4)


def train(engine, steps):
    for step in steps:
        images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        engine.backward(engine(images).square().mean())
        engine.step(1e-3)


def config_of(optimizer, zero_stage):
    return Config(
        data=DataConfig(image_px=32),
        model=ModelConfig(norm="group", embedding_dim=8),
        train=TrainConfig(optimizer=optimizer, zero_stage=zero_stage, keep_checkpoints=2),
    )


def save_and_go_on(world, folder):
    """Per optimizer: two steps, a checkpoint, two more steps; returns the final weights."""
    final = {}
    for optimizer in ("sgd", "adamw"):
        config = config_of(optimizer, zero_stage=2)
        engine = make_engine(world, config)
        train(engine, range(2))
        mined = {7: np.arange(4), 8: np.arange(4)[::-1].copy()}
        state = TrainState(step=2, draws=np.arange(5), mined=mined, best_value=0.5, best_step=1)
        save_checkpoint(folder / optimizer, engine, state, config, world)
        train(engine, range(2, 4))
        final[optimizer] = [p.detach().numpy() for p in engine.backbone.parameters()]
    return final


def resume(world, folder):
    """The same two last steps from the checkpoint, at other ZeRO stages."""
    final = {}
    for optimizer in ("sgd", "adamw"):
        for zero_stage in (0, 1):
            newest = newest_checkpoint(folder / optimizer)
            backbone, _ = load_backbone(newest)
            engine = Engine(backbone, config_of(optimizer, zero_stage).train, world, pairs_per_rank=4)
            load_optimizer(newest, engine)
            train(engine, range(2, 4))
            final[optimizer, zero_stage] = [p.detach().numpy() for p in engine.backbone.parameters()]
    return final


def test_a_checkpoint_of_two_ranks_at_zero_2_goes_on_anywhere(tmp_path):
    expected = run_ranks(save_and_go_on, 2, tmp_path)[0]
    for world_size in (1, 2):
        for (optimizer, _), parameters in run_ranks(resume, world_size, tmp_path)[0].items():
            for got, wanted in zip(parameters, expected[optimizer], strict=True):
                np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)

    state = load_state(tmp_path / "sgd" / "checkpoints" / "step-00000002")
    assert (state.step, state.best_value, state.best_step) == (2, 0.5, 1)
    assert {step: ids.tolist() for step, ids in state.mined.items()} == {7: [0, 1, 2, 3], 8: [3, 2, 1, 0]}
    assert state.draws.tolist() == [0, 1, 2, 3, 4]


def save_many(world, folder):
    config = config_of("sgd", 0)
    engine = make_engine(world, config)
    for step in (1, 2, 3, 4):
        state = TrainState(step=step, draws=np.zeros(1, dtype=np.int64), best_step=2)
        save_checkpoint(folder, engine, state, config, world)


def test_the_newest_and_the_best_are_kept_and_leftovers_are_ignored(tmp_path):
    (tmp_path / "checkpoints" / ".step-00000009.tmp").mkdir(parents=True)
    run_ranks(save_many, 1, tmp_path)
    kept = sorted(folder.name for folder in (tmp_path / "checkpoints").glob("step-*"))
    assert kept == ["step-00000002", "step-00000003", "step-00000004"]
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "step-00000004"

    (newest / "plan.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"plan\.safetensors: damaged"):
        load_state(newest)
    (newest / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="step-00000004: expected a run folder"):
        load_backbone(newest)
