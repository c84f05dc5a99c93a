"""Whose run folder it is."""

import os
import re
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
from distributed.ranks import RankError, run_ranks

from facetrain import run_folder
from facetrain.config import Config, RunConfig
from facetrain.run_folder import claim_run_folder, open_run_folder
from facetrain.world import World


def claim_own_folder(world: World, folder: Path) -> None:
    run_folder._SEEN_WITHIN_S = 0.2
    (folder / str(world.rank)).mkdir()
    os.chdir(folder / str(world.rank))
    with claim_run_folder(Config(run=RunConfig(dir="run")), world):
        pass


def test_a_folder_that_another_host_does_not_see_is_refused_by_all_ranks(tmp_path: Path) -> None:
    host = socket.gethostname()
    said = re.escape(f"run.dir: run on {host} isn't that of rank 0 on {host}")
    with pytest.raises(RankError, match=said):
        run_ranks(claim_own_folder, 2, tmp_path)
    assert [path.name for path in (tmp_path / "0" / "run" / "logs").iterdir()] == []


def claim_twice(world: World, folder: Path, restarts: list[str]) -> None:
    """Claim a folder that doesn't exist, and again with each rank's own count of restarts."""
    config = Config(run=RunConfig(dir=str(folder / "run"), resume="never"))
    with claim_run_folder(config, world):
        pass
    os.environ["TORCHELASTIC_RESTART_COUNT"] = restarts[world.rank]
    with claim_run_folder(config, world):
        pass


def test_a_restart_goes_on_with_the_folder_that_had_to_be_fresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    run_ranks(claim_twice, 2, tmp_path / "a", ["0", "1"])
    with pytest.raises(RankError, match=r"holds a run already, expected a fresh folder with run\.resume=never"):
        run_ranks(claim_twice, 2, tmp_path / "b", ["0", "0"])
    config = Config(run=RunConfig(dir=str(tmp_path / "a" / "run"), resume="never"))
    with pytest.raises(ValueError, match="holds a run already"):
        open_run_folder(config)
    for variable in ("SLURM_RESTART_COUNT", "FACETRAIN_RESTART_COUNT"):
        monkeypatch.setenv(variable, "1")
        assert open_run_folder(config).resume_from is None
        monkeypatch.delenv(variable)


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    expected = rf"^run\.dir: expected a folder, {tmp_path}/run is a file$"
    with (
        pytest.raises(ValueError, match=expected),
        claim_run_folder(Config(run=RunConfig(dir=str(tmp_path / "run"))), World()),
    ):
        pass


def claim_what_another_host_sees_late(world: World, folder: Path) -> None:
    """Let rank 1 see the folder two seconds after a collective of rank 0 would have failed."""
    run_folder._SEEN_WITHIN_S = 6.0
    world = replace(world, timeout_s=2.0)
    world.limit_waiting()
    seen_at = time.monotonic() + 4.0
    if world.rank == 1:
        exists = os.path.exists
        os.path.exists = lambda path: exists(path) and (".seen" not in str(path) or time.monotonic() > seen_at)
    with claim_run_folder(Config(run=RunConfig(dir=str(folder / "run"))), world):
        pass


@pytest.mark.slow
def test_a_folder_that_another_host_sees_late_is_waited_for(tmp_path: Path) -> None:
    run_ranks(claim_what_another_host_sees_late, 2, tmp_path)


def claim_what_takes_long_to_verify(world: World, folder: Path, checkpoint_timeout_s: float) -> None:
    """Let rank 0 verify checkpoints for three seconds, where others usually wait for two."""
    verify = run_folder.newest_checkpoint
    run_folder.newest_checkpoint = lambda path: (time.sleep(3), verify(path))[1]
    world = replace(world, timeout_s=2.0)
    world.limit_waiting()
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    with claim_run_folder(Config(run=RunConfig(dir=str(folder), checkpoint_timeout_s=checkpoint_timeout_s)), world):
        pass


@pytest.mark.slow
def test_ranks_wait_longer_for_checkpoints_that_are_verified_than_in_a_step(tmp_path: Path) -> None:
    run_ranks(claim_what_takes_long_to_verify, 2, tmp_path / "a", 30.0)
    with pytest.raises(RankError, match=r"[Tt]imed out"):
        run_ranks(claim_what_takes_long_to_verify, 2, tmp_path / "b", 2.0)
