"""Whose run folder it is."""

import os
import re
import socket
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
