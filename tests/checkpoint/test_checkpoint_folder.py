"""A checkpoint is whole or doesn't count: killed savers, cut and flipped files, full disks."""

import errno
import hashlib
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed.ranks import RankError, run_ranks
from safetensors.torch import load_file
from small_disk import fill, missing_disk, small_disk
from test_checkpoint import config_of, make_engine, train

from facetrain.checkpoint.folder import (
    SUMS_FILE,
    aside_of,
    checkpoint_folder,
    damage_of,
    newest_checkpoint,
    prune,
    publish,
    tidy,
)
from facetrain.checkpoint.saver import Saver
from facetrain.checkpoint.state import TrainState, load_state, write_checkpoint
from facetrain.config import Config, TrainConfig
from facetrain.world import World

CONFIG = Config(train=TrainConfig(keep_checkpoints=2))


def content(step: int) -> dict[str, torch.Tensor]:
    """Half a megabyte that differs from step to step."""
    return {"weight": torch.full((1 << 17,), float(step)), "bias": torch.arange(7) + step}


def save(run_dir: Path, step: int) -> Path:
    state = TrainState(step=step, draws=np.full(100, step))
    table = {"first_row": torch.tensor([0]), "rows": torch.full((64, 8), float(step))}
    return write_checkpoint(run_dir, content(step), content(-step), state, CONFIG, World(), table_rows=table)


def save_until_killed(run_dir: Path, first_step: int, done: int) -> None:
    for step in range(first_step, first_step + 1000):
        save(run_dir, step)
        os.write(done, step.to_bytes(4, "big"))


def kill_while_saving(run_dir: Path, first_step: int, part: float) -> int:
    """Let a process save step after step, kill it without warning, and return the last step that it called saved.

    The kill comes after one whole save and `part` of its time, on a machine of any speed.
    """
    reader, writer = os.pipe()
    saver = os.fork()
    if saver == 0:
        try:
            save_until_killed(run_dir, first_step, writer)
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        began_at = time.perf_counter()
        steps = stream.read(4)
        time.sleep(part * (time.perf_counter() - began_at))
        os.kill(saver, signal.SIGKILL)
        _, status = os.waitpid(saver, 0)
        assert os.WIFSIGNALED(status)
        steps += stream.read()
    return int.from_bytes(steps[-4:], "big")


def test_a_saver_killed_fifty_times_loses_no_checkpoint_that_it_called_saved(tmp_path: Path) -> None:
    draw, step, num_half_written = random.Random(0), 1, 0
    save(tmp_path, 1)  # imports what saving needs, so that the processes forked from here don't
    for _ in range(50):
        saved = kill_while_saving(tmp_path, step + 1, draw.uniform(0, 1))
        num_half_written += bool(list((tmp_path / "checkpoints").glob(".step-*.tmp")))
        newest, damaged = newest_checkpoint(tmp_path)
        assert damaged == {}
        assert newest is not None
        step = load_state(newest).step
        assert newest == checkpoint_folder(tmp_path, step)
        assert torch.equal(load_file(newest / "model.safetensors")["weight"], content(step)["weight"])
        assert torch.equal(load_file(newest / "optimizer.safetensors")["bias"], content(-step)["bias"])
        assert step in (saved, saved + 1)  # killed between the rename and its word about it
        tidy(tmp_path, damaged)
    assert num_half_written > 10  # the kills did fall into saving
    assert step > 50
    assert len(list((tmp_path / "checkpoints").iterdir())) in (2, 3)


def test_a_file_cut_off_at_any_byte_flipped_missing_or_added_is_found_out(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    assert damage_of(folder) == ""
    draw = random.Random(1)
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        cuts = range(len(whole)) if len(whole) < 1000 else sorted(draw.sample(range(len(whole)), 50))
        for cut in [*cuts, len(whole) - 1]:
            os.truncate(file, cut)
            assert damage_of(folder), (file.name, cut)
            file.write_bytes(whole)
        for _ in range(30):
            changed = bytearray(whole)
            changed[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            file.write_bytes(changed)
            assert damage_of(folder), (file.name, "flip")
        file.write_bytes(whole)
        file.rename(tmp_path / "away")
        assert file.name in damage_of(folder)
        (tmp_path / "away").rename(file)
    (folder / "stray").touch()
    assert damage_of(folder) == f"{SUMS_FILE} lacks stray"
    (folder / "stray").unlink()
    assert damage_of(folder) == ""
    assert subprocess.run(["sha256sum", "--quiet", "-c", SUMS_FILE], cwd=folder, check=False).returncode == 0


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EMFILE])
def test_a_file_server_that_fails_makes_no_checkpoint_damaged(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path, 1)
    read = Path.open

    def fail(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == "model.safetensors":
            raise OSError(number, os.strerror(number), str(path))
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", fail)
    said = f"model.safetensors: can't be read ({os.strerror(number)})"
    with pytest.raises(OSError, match=re.escape(said)) as error:
        newest_checkpoint(tmp_path)
    assert "\n" not in str(error.value)
    assert folder.name in str(error.value)


def test_a_folder_in_place_of_a_file_is_damage(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    assert damage_of(folder) == "model.safetensors: Is a directory"


def test_a_file_of_another_rank_that_is_lost_is_missed(tmp_path: Path) -> None:
    final = checkpoint_folder(tmp_path, 1)
    aside = aside_of(final)
    aside.mkdir(parents=True)
    (aside / "state.json").write_text("{}")
    table = hashlib.sha256(b"rows").hexdigest()
    publish(aside, final, {"mining_table-00001.safetensors": table})
    assert damage_of(final) == "mining_table-00001.safetensors is missing"
    (final / "mining_table-00001.safetensors").write_bytes(b"rows")  # it was there, and is seen late
    assert damage_of(final) == ""


def test_damaged_checkpoints_are_passed_over_by_name_and_their_steps_can_be_saved_again(tmp_path: Path) -> None:
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    os.truncate(second / "optimizer.safetensors", 100)
    newest, damaged = newest_checkpoint(tmp_path)
    assert (newest, damaged) == (first, {second: "optimizer.safetensors isn't what was saved"})
    (tmp_path / "checkpoints" / ".step-00000009.tmp").mkdir()
    tidy(tmp_path, damaged)
    assert {path.name for path in first.parent.iterdir()} == {first.name, "step-00000002.damaged"}
    assert save(tmp_path, 2) == second
    assert newest_checkpoint(tmp_path) == (second, {})


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoint_folder(tmp_path, step).mkdir(parents=True)
    prune(tmp_path, keep=2, best_step=1)
    assert sorted(path.name[-1] for path in (tmp_path / "checkpoints").iterdir()) == ["1", "4", "5"]


def save_on_a_disk_that_fills_up(world: World, run_dir: Path) -> list[str]:
    """Steps 1 to 6; the disk is full at 2, 3, 5 and 6. Returns what became of each, and the best step after it."""
    config = config_of("sgd", 0)
    config = Config(data=config.data, model=config.model, train=TrainConfig(optimizer="sgd", max_failed_saves=2))
    engine = make_engine(world, config)
    state = TrainState(step=0, draws=np.zeros(1, dtype=np.int64))
    saver, filler, seen = Saver(run_dir, config, world, state), run_dir / "filler", []
    for step in range(1, 7):
        train(engine, range(step - 1, step))
        state.step, state.best_step = step, step
        if world.is_main:
            filler.unlink(missing_ok=True)
            if step in (2, 3, 5, 6):
                fill(filler)
        table = {"first_row": torch.tensor([world.rank]), "rows": torch.zeros(1, 4)}
        try:
            saver.save(engine, state, table_rows=table, loss_state={}, must=step == 6)
            seen.append(f"{step}: best {state.best_step}")
        except OSError as error:
            seen.append(f"{step}: {error}")
    return seen


@pytest.mark.slow
def test_a_full_disk_costs_a_warning_until_it_must_not(tmp_path: Path) -> None:
    if missing_disk():
        pytest.skip(missing_disk())
    with small_disk(tmp_path, size="64m"):
        seen = run_ranks(save_on_a_disk_that_fills_up, 2, tmp_path)
        assert seen[0] == seen[1]
        assert seen[0][:5] == ["1: best 1", "2: best 1", "3: best 1", "4: best 4", "5: best 4"]
        assert seen[0][5].startswith("6: step 6: no checkpoint could be written")
        assert "No space left on device" in seen[0][5]
        newest, damaged = newest_checkpoint(tmp_path)
        assert (newest, damaged) == (checkpoint_folder(tmp_path, 4), {})
        assert {path.name for path in newest.parent.iterdir()} == {"step-00000001", "step-00000004"}


def save_beside_the_training(world: World, run_dir: Path) -> list[int]:
    """Steps 1 to 4 by a thread, the last waited for; the disk is full at 2 and 3. Returns the best step after each."""
    config = config_of("sgd", 0)
    train_config = TrainConfig(optimizer="sgd", max_failed_saves=2, async_checkpoint=True)
    config = Config(data=config.data, model=config.model, train=train_config)
    engine = make_engine(world, config)
    state = TrainState(step=0, draws=np.zeros(1, dtype=np.int64))
    saver, filler, best_steps = Saver(run_dir, config, world, state), run_dir / "filler", []
    for step in range(1, 5):
        train(engine, range(step - 1, step))
        state.step, state.best_step = step, step
        if world.is_main and step == 2:
            fill(filler)
        if world.is_main and step == 4:
            filler.unlink()
        saver.save(engine, state, table_rows={}, loss_state={}, must=step == 4)
        best_steps.append(state.best_step)
        aside = run_dir / "checkpoints" / f".step-{step:08d}.tmp"
        while aside.exists():  # the thread is at work
            time.sleep(0.01)
        weights = engine.weights()
        if step in (1, 4) and world.is_main:
            saved = load_file(checkpoint_folder(run_dir, step) / "model.safetensors")
            assert all(torch.equal(saved[name], weights[name]) for name in weights)
    saver.close()
    return best_steps


@pytest.mark.slow
def test_a_thread_that_can_not_write_costs_a_warning_too(tmp_path: Path) -> None:
    if missing_disk():
        pytest.skip(missing_disk())
    with small_disk(tmp_path, size="64m"):
        seen = run_ranks(save_beside_the_training, 2, tmp_path)
        assert seen == [[1, 2, 3, 4]] * 2
        newest, damaged = newest_checkpoint(tmp_path)
        assert (newest, damaged) == (checkpoint_folder(tmp_path, 4), {})
        assert {path.name for path in newest.parent.iterdir()} == {"step-00000001", "step-00000004"}


def write_slowly(world: World, allowed_s: float) -> None:
    """Let rank 0 take three seconds, where others usually wait for two."""
    world = replace(world, timeout_s=2.0)
    world.limit_waiting()
    with world.waiting_up_to(allowed_s):
        world.on_main(lambda: time.sleep(3))


@pytest.mark.slow
def test_ranks_wait_longer_for_a_checkpoint_than_in_a_step() -> None:
    run_ranks(write_slowly, 2, 30.0)
    with pytest.raises(RankError, match=r"[Tt]imed out"):
        run_ranks(write_slowly, 2, 2.0)


class EngineWithoutWeights:
    """What a saver asks for."""

    def weights(self) -> dict[str, torch.Tensor]:
        return {}

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        return {}


def judged(monkeypatch: pytest.MonkeyPatch, run_dir: Path, values: Sequence[float], lost: Collection[int]) -> list[int]:
    """Judge and save steps 1, 2, ... by a thread that can't write some of them; returns the best step after each."""

    def begin(*args: Any, **_: object) -> Callable[[], None]:
        step = args[3].step

        def finish() -> None:
            if step in lost:
                raise OSError("No space left on device")

        return finish

    monkeypatch.setattr("facetrain.checkpoint.saver.begin_checkpoint", begin)
    config = Config(train=TrainConfig(async_checkpoint=True, max_failed_saves=9))
    state, best = TrainState(step=0, draws=np.zeros(1, dtype=np.int64)), []
    saver = Saver(run_dir, config, World(), state)
    for step, value in enumerate(values, start=1):
        state.step = step
        saver.settle(state)
        if value > state.best_value:
            state.best_value, state.best_step = value, step
        saver.save(EngineWithoutWeights(), state, table_rows={}, loss_state={}, must=False)  # type: ignore[arg-type]
        best.append(state.best_step)
    saver.close()
    return best


def test_a_best_checkpoint_that_was_lost_is_none_to_compare_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert judged(monkeypatch, tmp_path, [0.5, 0.9, 0.8, 0.6], lost=()) == [1, 2, 2, 2]
    assert judged(monkeypatch, tmp_path, [0.5, 0.9, 0.8, 0.6], lost=(2,)) == [1, 2, 3, 3]
