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
from facetrain.run_folder import claim_run_folder
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
