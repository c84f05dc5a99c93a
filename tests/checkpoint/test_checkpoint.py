import numpy as np
import pytest
import torch
from distributed.ranks import run_ranks

from facetrain.checkpoint.folder import newest_checkpoint
from facetrain.checkpoint.state import TrainState, load_optimizer, load_state, load_table_rows, save_checkpoint
from facetrain.checkpoint.weights import load_backbone
from facetrain.config import Config, DataConfig, ModelConfig, TrainConfig
from facetrain.engine import Engine
from facetrain.models import build_backbone

SAVED = [("sgd", 2), ("sgd", 3), ("adamw", 2), ("adamw", 3)]


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
        model=ModelConfig(norm="group", embedding_dim=7),
        train=TrainConfig(optimizer=optimizer, zero_stage=zero_stage, keep_checkpoints=2),
    )


def final_weights(engine):
    return [tensor.numpy() for tensor in engine.weights().values()]


TABLE = {"anchors": torch.arange(22.0).view(11, 2).bfloat16(), "refreshed_at": torch.arange(11, dtype=torch.int32)}
TABLE_ROWS = {"sgd": ((0, 6), (6, 11)), "adamw": ((0, 11), (11, 11))}  # of a mining table, by rank


def save_and_go_on(world, folder):
    """Per optimizer and ZeRO stage: two steps, a checkpoint, two more steps; returns the final weights."""
    final = {}
    for optimizer, zero_stage in SAVED:
        config = config_of(optimizer, zero_stage)
        engine = make_engine(world, config)
        train(engine, range(2))
        mined = {7: np.arange(4), 8: np.arange(4)[::-1].copy()}
        state = TrainState(step=2, draws=np.arange(5), mined=mined, best_value=0.5, best_step=1)
        first, last = TABLE_ROWS[optimizer][world.rank]
        table_rows = {"first_row": torch.tensor([first])} | {name: rows[first:last] for name, rows in TABLE.items()}
        save_checkpoint(folder / f"{optimizer}-{zero_stage}", engine, state, config, world, table_rows=table_rows)
        train(engine, range(2, 4))
        final[optimizer] = final_weights(engine)
    return final


def resume(world, folder):
    """The same two last steps from each checkpoint, at other ZeRO stages."""
    final = []
    for optimizer, saved_stage in SAVED:
        for zero_stage in (0, 1, 3):
            newest, _ = newest_checkpoint(folder / f"{optimizer}-{saved_stage}")
            backbone, _ = load_backbone(newest)
            engine = Engine(backbone, config_of(optimizer, zero_stage).train, world, pairs_per_rank=4)
            load_optimizer(newest, engine)
            train(engine, range(2, 4))
            final.append((optimizer, final_weights(engine)))
    return final


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_goes_on_at_any_zero_stage_on_one_or_two(tmp_path):
    expected = run_ranks(save_and_go_on, 2, tmp_path)[0]
    for world_size in (1, 2):
        for optimizer, weights in run_ranks(resume, world_size, tmp_path)[0]:
            for got, wanted in zip(weights, expected[optimizer], strict=True):
                np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)

    state = load_state(tmp_path / "sgd-2" / "checkpoints" / "step-00000002")
    assert (state.step, state.best_value, state.best_step) == (2, 0.5, 1)
    assert {step: ids.tolist() for step, ids in state.mined.items()} == {7: [0, 1, 2, 3], 8: [3, 2, 1, 0]}
    assert state.draws.tolist() == [0, 1, 2, 3, 4]
    check_table_rows(tmp_path)


def check_table_rows(run_dirs):
    folders = {optimizer: run_dirs / f"{optimizer}-2" / "checkpoints" / "step-00000002" for optimizer in TABLE_ROWS}
    for folder in folders.values():
        for rows in (range(11), range(6), range(4, 9), range(9, 11), range(5, 5), range(11, 11)):
            found = load_table_rows(folder, rows)
            assert found.keys() == TABLE.keys()
            assert all(torch.equal(found[name], TABLE[name][rows.start : rows.stop]) for name in TABLE)

    (folders["adamw"] / "mining_table-00000.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"mining_table-00000\.safetensors: damaged"):
        load_table_rows(folders["adamw"], range(11))
    (folders["sgd"] / "mining_table-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"step-00000002: not a whole checkpoint \(5 of 11 rows of the mining table"):
        load_table_rows(folders["sgd"], range(11))


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
    newest, _ = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "step-00000004"

    (newest / "plan.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"plan\.safetensors: damaged"):
        load_state(newest)
    (newest / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="step-00000004: expected a run folder"):
        load_backbone(newest)
