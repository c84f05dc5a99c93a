"""The node's cache of shards: one download, bounded, never a wrong byte, whoever dies."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from commands import run
from drawn_faces import write_faces
from shard_server import Fault, ShardServer, serve

from facetrain.config import DataConfig
from facetrain.data.cache import ShardCache
from facetrain.data.loader import PairLoader
from facetrain.data.manifest import Manifest
from facetrain.data.pack import pack
from facetrain.data.plan import Plan
from facetrain.data.remote import RemoteFolder
from facetrain.data.shards import INDEX_FILES, ShardSet, open_shards

COUNTS = {f"person {i}": 2 + i % 3 for i in range(16)}
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen identities in seven shards or so; not to be changed."""
    folder = tmp_path_factory.mktemp("packed")
    pack([write_faces(folder / "faces", COUNTS)], folder / "shards", images_per_shard=8, workers=1)
    return folder / "shards"


@pytest.fixture
def server(packed: Path) -> Iterator[ShardServer]:
    with serve(packed) as running:
        yield running


def config_of(url: str, cache_dir: Path, **changes: object) -> DataConfig:
    return DataConfig(shards=url, cache_dir=str(cache_dir), fetch_attempts=1, **changes)  # type: ignore[arg-type]


def cache_of(server: ShardServer, folder: Path, max_bytes: int | None = None, timeout_s: float = 20) -> ShardCache:
    remote = RemoteFolder(url=server.url, timeout_s=timeout_s, attempts=3, pause_s=0.01)
    return ShardCache(folder, max_bytes, remote)


def wait_until(is_so: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


def shard_infos(packed: Path) -> tuple:
    return Manifest.load(packed).shards


def images_of(shards: ShardSet) -> list[bytes]:
    return [shards.read(image) for image in range(shards.table.num_images)]


def test_remote_shards_hold_what_the_folder_holds(packed: Path, server: ShardServer, tmp_path: Path) -> None:
    local, remote = ShardSet.open(packed), open_shards(config_of(server.url, tmp_path))
    assert images_of(remote) == images_of(local)
    assert remote.table.names == local.table.names
    assert remote.where(0) == f"{server.url}/shard-000000.tar: 0000000_0000.jpg"
    remote.verify()
    files = [*INDEX_FILES, "manifest.json", *(shard.name for shard in local.manifest.shards)]
    assert sorted(server.names()) == sorted(files)  # each once

    again = pickle.loads(pickle.dumps(open_shards(config_of(server.url, tmp_path))))
    assert images_of(again) == images_of(local)
    assert server.names()[len(files) :] == ["manifest.json"]


@pytest.mark.parametrize("url", ["pipe:cat {folder}/{name}", "file://{folder}"])
def test_other_ways_to_a_folder_give_the_same(packed: Path, tmp_path: Path, url: str) -> None:
    remote = open_shards(config_of(url.replace("{folder}", str(packed)), tmp_path))
    assert images_of(remote) == images_of(ShardSet.open(packed))


def open_and_read(config: DataConfig, results: "multiprocessing.SimpleQueue[object]") -> None:
    results.put(images_of(open_shards(config)))


def test_processes_of_a_node_share_one_download(packed: Path, server: ShardServer, tmp_path: Path) -> None:
    for shard in shard_infos(packed):
        server.faults[shard.name] = [Fault("slow", 1000)]  # so that all of them ask meanwhile
    results = FORK.SimpleQueue()
    processes = [FORK.Process(target=open_and_read, args=(config_of(server.url, tmp_path), results)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    assert found == [images_of(ShardSet.open(packed))] * 3
    counts = Counter(server.names())
    assert counts.pop("manifest.json") == 3  # each looks whether it is still the same set
    assert set(counts.values()) == {1}


def test_who_waits_goes_on_where_a_killed_process_was(packed: Path, server: ShardServer, tmp_path: Path) -> None:
    info = shard_infos(packed)[0]
    server.faults[info.name] = [Fault("hang", 10_000)]
    cache = ShardCache(tmp_path, None, RemoteFolder(url=server.url, timeout_s=20))
    first = FORK.Process(target=cache.open, args=(info,))
    first.start()
    part = tmp_path / f"{info.sha256}-{info.size_bytes}.part"
    wait_until(lambda: part.exists() and part.stat().st_size == 10_000)
    second = FORK.Process(target=cache.open, args=(info,))
    second.start()
    time.sleep(0.1)
    assert server.asked == [(info.name, 0)]
    os.kill(first.pid, signal.SIGKILL)  # type: ignore[arg-type]
    second.join(timeout=60)
    assert second.exitcode == 0
    first.join()
    assert server.asked == [(info.name, 0), (info.name, 10_000)]
    assert cache.path_of(info).read_bytes() == (packed / info.name).read_bytes()
    assert not part.exists()


def test_who_waits_has_a_shard_that_another_goes_on_using(packed: Path, server: ShardServer, tmp_path: Path) -> None:
    info = shard_infos(packed)[0]
    cache = ShardCache(tmp_path, None, RemoteFolder(url=server.url, timeout_s=20))
    server.faults[info.name] = [Fault("slow", 1000)]
    waiting = [FORK.Process(target=cache.open, args=(info,)) for _ in range(3)]
    with ThreadPoolExecutor(1) as thread:
        opening = thread.submit(cache.open, info)
        for process in waiting:
            process.start()
        fd = opening.result()
    for process in waiting:
        process.join(timeout=60)
        assert process.exitcode == 0
    os.close(fd)
    assert server.names() == [info.name]


def test_the_disk_stays_within_its_bound(packed: Path, server: ShardServer, tmp_path: Path) -> None:
    """Reads in random order through a cache of two shards: right bytes, and never more on the disk."""
    local = ShardSet.open(packed)
    max_bytes = 2 * max(shard.size_bytes for shard in local.manifest.shards)
    remote = open_shards(config_of(server.url, tmp_path, cache_bytes=max_bytes))
    most_bytes = 0
    for image in np.random.default_rng(0).integers(0, local.table.num_images, 60).tolist():
        assert remote.read(image) == local.read(image)
        most_bytes = max(most_bytes, sum(path.stat().st_size for path in tmp_path.glob("*.tar")))
    assert 0.6 * max_bytes < most_bytes <= max_bytes
    assert not list(tmp_path.glob("*.part"))
    assert Counter(server.names())["shard-000000.tar"] > 1


def test_files_of_others_are_never_evicted(packed: Path, server: ShardServer, tmp_path: Path) -> None:
    others = [tmp_path / name for name in ("photos.tar", "film-final.part", f"{'g' * 64}.tar")]
    for path in others:
        path.write_bytes(bytes(1000))
    remote = open_shards(config_of(server.url, tmp_path, cache_bytes=max(s.size_bytes for s in shard_infos(packed))))
    assert [remote.read(image) for image in (0, remote.table.num_images - 1)]
    assert all(path.stat().st_size == 1000 for path in others)


def test_the_longest_unused_shard_makes_room_and_none_in_use(packed: Path, server: ShardServer, tmp_path: Path) -> None:
    a, b, c, d = shard_infos(packed)[:4]
    max_bytes = a.size_bytes + b.size_bytes + c.size_bytes
    cache = cache_of(server, tmp_path, max_bytes, timeout_s=1)  # for which it waits until one is out of use
    in_use = cache.open(a)
    for shard in (b, c):
        os.close(cache.open(shard))
    os.close(cache.open(b))  # c is now the longest unused, but for a, which is in use
    os.close(cache.open(d))
    assert [shard.name for shard in (a, b, c, d) if cache.path_of(shard).exists()] == [a.name, b.name, d.name]

    all_in_use = [cache.open(shard) for shard in (a, b, d)]
    with pytest.raises(ValueError, match=rf"data\.cache_dir: {tmp_path}: data\.cache_bytes is \d+, and all .* in use"):
        cache.open(c)
    for fd in [in_use, *all_in_use]:
        os.close(fd)
    os.close(cache.open(c))


def test_readers_of_a_full_cache_keep_nobody_waiting(packed: Path, server: ShardServer, tmp_path: Path) -> None:
    a, b = shard_infos(packed)[:2]
    cache = cache_of(server, tmp_path, max(a.size_bytes, b.size_bytes), timeout_s=0.5)
    in_use, reads_until = cache.open(a), time.monotonic() + 30

    def read() -> None:
        while not opening.done() and time.monotonic() < reads_until:
            os.close(cache.open(a))

    with ThreadPoolExecutor(1) as thread:
        opening = thread.submit(cache.open, b)
        read()
        given_up_at = time.monotonic()
        os.close(in_use)
        with pytest.raises(ValueError, match=r"data\.cache_bytes is \d+, and all that is there is in use"):
            opening.result()
    assert given_up_at < reads_until


def test_a_shard_larger_than_the_bound_is_refused(packed: Path, server: ShardServer, tmp_path: Path) -> None:
    info = shard_infos(packed)[0]
    with pytest.raises(ValueError, match=rf"data\.cache_bytes: expected at least the {info.size_bytes} bytes of http"):
        cache_of(server, tmp_path, max_bytes=1000).open(info)


def test_a_loader_reads_through_a_bounded_cache(packed: Path, server: ShardServer, tmp_path: Path) -> None:
    local = ShardSet.open(packed)
    config = config_of(server.url, tmp_path, cache_bytes=local.manifest.size_bytes // 2, workers=2, prefetch=1)

    def batches(shards: ShardSet) -> list[bytes]:
        plan = Plan(shards.table, np.arange(len(COUNTS)), global_pairs=8, seed=0)
        with PairLoader(plan, shards, config, rank=0, world_size=1, first_step=0, last_step=4) as loader:
            return [batch.images_VnHWC.numpy().tobytes() for batch in loader]

    assert batches(open_shards(config)) == batches(local)


def test_wrong_bytes_never_get_into_the_cache(packed: Path, server: ShardServer, tmp_path: Path) -> None:
    info = shard_infos(packed)[1]
    server.always[info.name] = Fault("flip", 700)
    with pytest.raises(
        ValueError, match=rf"^{server.url}/{info.name}: expected the manifest's sha256 .*\(3 attempts\)$"
    ):
        cache_of(server, tmp_path).open(info)
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".tar", ".part")]


def test_a_shard_that_shrank_in_the_cache_is_fetched_again(packed: Path, server: ShardServer, tmp_path: Path) -> None:
    info, cache = shard_infos(packed)[0], cache_of(server, tmp_path)
    os.close(cache.open(info))
    os.truncate(cache.path_of(info), 1000)
    os.close(cache.open(info))
    assert cache.path_of(info).read_bytes() == (packed / info.name).read_bytes()


def test_missing_swapped_and_truncated_shards_are_named(packed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(packed, tmp_path / "there")
    first, second = shard_infos(folder)[:2]
    (folder / second.name).write_bytes((folder / first.name).read_bytes())
    (folder / first.name).write_bytes((packed / first.name).read_bytes()[:-1000])
    with serve(folder) as server:
        cache = cache_of(server, tmp_path / "cache")
        with pytest.raises(ValueError, match=rf"{first.name}: expected {first.size_bytes} bytes, it ended after"):
            cache.open(first)
        with pytest.raises(ValueError, match=rf"{second.name}: expected (the manifest's sha256|\d+ bytes, it)"):
            cache.open(second)
        shutil.copy(packed / second.name, folder)
        (folder / first.name).unlink()
        with pytest.raises(ValueError, match=rf"{first.name}: the server answered 404"):
            open_shards(config_of(server.url, tmp_path / "other"))


def test_manifest_and_index_are_checked_before_any_shard(packed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(packed, tmp_path / "there")
    places = np.load(folder / "images.npy")
    places["size_bytes"][0, 5] += 1
    np.save(folder / "images.npy", places)
    with serve(folder) as server:
        with pytest.raises(
            ValueError, match=rf"{server.url}/manifest\.json: its class table and image index have anot"
        ):
            open_shards(config_of(server.url, tmp_path / "cache"))
        manifest = json.loads((folder / "manifest.json").read_text())
        for text in ("<html>Please log in</html>", json.dumps(manifest | {"format": 9})):
            (folder / "manifest.json").write_text(text)
            with pytest.raises(ValueError, match=rf"{server.url}/manifest\.json: expected (a manifest|shard format 1)"):
                open_shards(config_of(server.url, tmp_path / "cache"))
        for key, value in (("sha256", "../victim"), ("name", "../victim.tar"), ("size_bytes", -1)):
            bad = [manifest["shards"][0] | {key: value}, *manifest["shards"][1:]]
            (folder / "manifest.json").write_text(json.dumps(manifest | {"shards": bad}))
            with pytest.raises(ValueError, match=rf"{server.url}/manifest\.json: expected a manifest .* got '?{value}"):
                open_shards(config_of(server.url, tmp_path / "cache"))
        (folder / "manifest.json").unlink()
        with pytest.raises(ValueError, match=rf"{server.url}/manifest\.json: the server answered 404"):
            open_shards(config_of(server.url, tmp_path / "cache"))
        assert not [name for name in server.names() if name.endswith(".tar")]


@pytest.mark.parametrize("name", ["class_names.npy", "images.npy"])
def test_a_damaged_table_in_the_cache_is_fetched_again(
    packed: Path, server: ShardServer, tmp_path: Path, name: str
) -> None:
    before = images_of(open_shards(config_of(server.url, tmp_path / "cache")))
    (table,) = (tmp_path / "cache" / "sets").rglob(name)
    data = bytearray(table.read_bytes())
    data[-1] ^= 1
    table.write_bytes(data)
    (table.parent / f"{name}.123.tmp").write_bytes(b"left by a process that was killed")
    after = open_shards(config_of(server.url, tmp_path / "cache"))
    assert images_of(after) == before
    assert table.read_bytes() == (packed / name).read_bytes()
    assert sorted(path.name for path in table.parent.iterdir()) == sorted([*INDEX_FILES, "manifest.json"])


def test_a_process_that_fails_does_not_wait_for_what_it_fetches(packed: Path, tmp_path: Path) -> None:
    code = (
        "import time, sys\n"
        "from facetrain.data.daemon_threads import DaemonThreads\n"
        "threads = DaemonThreads(2, 'fetch')\n"
        "threads.submit(time.sleep, 600)\n"
        "threads.close(wait=False)\n"
        "raise ValueError('it fails')\n"
    )
    done = run(sys.executable, "-c", code, cwd=tmp_path, timeout_s=60)
    assert "it fails" in done.stderr


def test_a_set_packed_anew_is_fetched_beside_the_old(packed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(packed, tmp_path / "there")
    with serve(folder) as server:
        before = open_shards(config_of(server.url, tmp_path / "cache"))
        shutil.rmtree(folder)
        pack([packed.parent / "faces"], folder, images_per_shard=8, seed=1, workers=1)
        after = open_shards(config_of(server.url, tmp_path / "cache"))
    assert images_of(after) == images_of(ShardSet.open(folder))
    assert images_of(before) == images_of(ShardSet.open(packed))
    assert before.manifest.sha256 != after.manifest.sha256


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"can't mount a file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_is_too_small_is_named_before_the_download(
    packed: Path, server: ShardServer, small_disk: Path
) -> None:
    (small_disk / "other").write_bytes(bytes(100_000))
    size_bytes = Manifest.load(packed).size_bytes
    assert size_bytes > 150_000
    with pytest.raises(
        ValueError, match=rf"data\.cache_dir: {small_disk}: expected room for {size_bytes} bytes of http"
    ):
        open_shards(config_of(server.url, small_disk))
    assert not [name for name in server.names() if name.endswith(".tar")]


def test_a_disk_that_fills_up_is_named(packed: Path, server: ShardServer, small_disk: Path) -> None:
    info = shard_infos(packed)[0]
    cache = cache_of(server, small_disk)
    server.faults[info.name] = [Fault("wait", 10_000)]
    opening = FORK.Process(target=cache.open, args=(info,))
    opening.start()
    wait_until(lambda: [part.stat().st_size for part in small_disk.glob("*.part")] == [10_000])
    free = shutil.disk_usage(small_disk).free
    (small_disk / "other").write_bytes(bytes(free - 16_384))  # the room that was found is gone
    server.go_on.set()
    opening.join(timeout=60)
    assert opening.exitcode == 1
    with pytest.raises(ValueError, match=rf"{info.name}: can't be written to data\.cache_dir: No space left on device"):
        cache.open(info)
    (small_disk / "other").unlink()
    os.close(cache.open(info))
    assert cache.path_of(info).read_bytes() == (packed / info.name).read_bytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shards": "http://host/a"}, r"data\.cache_dir: expected a folder .* for http://host/a, got null"),
        ({"shards": "pipe:cat a", "cache_dir": "c"}, r"data\.shards: expected \{name\}, .* in 'pipe:cat a'"),
        ({"cache_bytes": 0}, r"data\.cache_bytes: expected 1 or more, got 0"),
        ({"fetch_attempts": 0}, r"data\.fetch_attempts: expected 1 or more, got 0"),
        ({"fetch_timeout_s": 0.0}, r"data\.fetch_timeout_s: expected more than 0, got 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)
