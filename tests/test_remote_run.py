"""A run on shards that lie elsewhere, one image of which can't be decoded."""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
from commands import run
from data.numbered_faces import damage
from data.shard_server import serve

from facetrain.data.shards import INDEX_FILES, ShardSet


@pytest.mark.slow
def test_two_ranks_train_on_shards_over_http_and_replace_a_bad_image(synthetic: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(synthetic / "shards", tmp_path / "there")
    damaged = damage(ShardSet.open(folder), range(0, 192, 4))  # one of each person's four
    with serve(folder) as server:
        settings = {
            "run.dir": tmp_path / "run",
            "data.shards": server.url,
            "data.cache_dir": tmp_path / "cache",
            "data.image_px": 32,
            "data.on_bad_image": "skip",
            "train.global_pairs": 8,
            "train.steps": 4,
            "train.log_every_steps": 2,
            "mining.mode": "off",
            "tracking.backend": "none",
        }
        flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = run(*launcher, "-m", "facetrain.train", *flags, cwd=tmp_path, timeout_s=240)
        assert done.returncode == 0, done.stderr
        counts = Counter(server.names())
    assert counts == {"manifest.json": 2} | dict.fromkeys(
        [*INDEX_FILES, *(shard.name for shard in damaged.manifest.shards)], 1
    )
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    replaced = [row["train/replaced_images"] for row in rows if "train/replaced_images" in row]
    assert len(replaced) == 2
    assert sum(replaced) > 0
    log = (tmp_path / "run" / "logs" / "train.log").read_text()
    assert "can't be decoded; image" in log
    assert f"{server.url}/shard-000000.tar: 00000" in log
