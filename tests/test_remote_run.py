"""Runs on shards that lie elsewhere."""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
from commands import run
from data.numbered_faces import damage
from data.shard_server import ShardServer, serve

from facetrain.data.pack import pack
from facetrain.data.shards import INDEX_FILES, ShardSet


def torchrun(server: ShardServer, tmp_path: Path, num_ranks: int = 2, **more: object) -> list[dict[str, float]]:
    """Train four steps, and return the rows of metrics."""
    settings = {
        "run.dir": tmp_path / "run",
        "data.shards": server.url,
        "data.cache_dir": tmp_path / "cache",
        "data.image_px": 32,
        "train.global_pairs": 8,
        "train.steps": 4,
        "train.log_every_steps": 2,
        "mining.mode": "off",
        "tracking.backend": "none",
    } | {key.replace("__", "."): value for key, value in more.items()}
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    done = run(*launcher, "-m", "facetrain.train", *flags, cwd=tmp_path, timeout_s=240)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_ranks_train_on_shards_over_http_and_replace_a_bad_image(synthetic: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(synthetic / "shards", tmp_path / "there")
    damaged = damage(ShardSet.open(folder), range(0, 192, 4))  # one of each person's four
    with serve(folder) as server:
        rows = torchrun(server, tmp_path, data__on_bad_image="skip")
        counts = Counter(server.names())
    assert counts == {"manifest.json": 2} | dict.fromkeys(
        [*INDEX_FILES, *(shard.name for shard in damaged.manifest.shards)], 1
    )
    replaced = [row["train/replaced_images"] for row in rows if "train/replaced_images" in row]
    assert len(replaced) == 2
    assert sum(replaced) > 0
    log = (tmp_path / "run" / "logs" / "train.log").read_text()
    assert "can't be decoded; image" in log
    assert f"{server.url}/shard-000000.tar: 00000" in log


@pytest.mark.slow
def test_two_ranks_train_in_windows_of_shards(synthetic: Path, tmp_path: Path) -> None:
    folder = tmp_path / "there"
    manifest = pack([synthetic / "faces" / "train"], folder, images_per_shard=8, workers=1)
    assert len(manifest.shards) == 24
    largest = max(shard.size_bytes for shard in manifest.shards)
    window = {"data__window_shards": 2, "data__virtual_nodes": 2, "data__cache_bytes": 18 * largest}
    with serve(folder) as server:
        rows = torchrun(server, tmp_path, data__prefetch=1, **window)
        counts = Counter(name for name in server.names() if name.endswith(".tar"))
    assert any("train/loss" in row for row in rows)
    assert len(counts) < 24
    assert set(counts.values()) == {1}
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")) <= 18 * largest
    assert "2 virtual nodes with 12 to 12 shards each, 2 in a window" in (tmp_path / "run/logs/train.log").read_text()


@pytest.mark.slow
def test_mining_in_windows_is_the_same_for_any_ranks_and_counts_bad_images(synthetic: Path, tmp_path: Path) -> None:
    """Every virtual node mines what its window holds; a quarter of the images can't be decoded."""
    pack([synthetic / "faces" / "train"], tmp_path / "there", images_per_shard=12, workers=1)
    damage(ShardSet.open(tmp_path / "there"), range(0, 192, 4))
    settings = {
        "data__window_shards": 3,
        "data__virtual_nodes": 2,
        "data__prefetch": 1,
        "data__on_bad_image": "skip",
        "model__norm": "group",
        "train__global_pairs": 2,
        "mining__mode": "quota",
        "mining__virtual_nodes": 2,
        "mining__candidates": 8,
        "mining__warmup_steps": 0,
        "mining__lag_steps": 1,
        "mining__batches_per_round": 1,
    }
    found = {}
    with serve(tmp_path / "there") as server:
        for num_ranks in (1, 2):
            folder = tmp_path / str(num_ranks)
            folder.mkdir()
            rows = torchrun(server, folder, num_ranks, **settings)
            found[num_ranks] = [row for row in rows if "mining/hardness" in row]
    assert [len(rounds) for rounds in found.values()] == [3, 3]  # before steps 0 to 2, for steps 1 to 3
    for alone, shared in zip(found[1], found[2], strict=True):
        assert alone["mining/replaced_images"] == shared["mining/replaced_images"] > 0
        assert alone["mining/candidates"] == shared["mining/candidates"]
    assert found[1][0]["mining/hardness"] == found[2][0]["mining/hardness"]
