"""Packing: the same bytes however it went, and nothing lost in silence."""

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from drawn_faces import drawn_image, encoded, tar_of, turned_by_exif, write_faces

from facetrain.data.image_header import exif_orientation
from facetrain.data.index import index_tar
from facetrain.data.manifest import PackSettings
from facetrain.data.pack import pack
from facetrain.data.prepare import prepare_image
from facetrain.data.shards import ShardSet
from facetrain.data.sources import open_faces

COUNTS = {f"p{i:03d}": 1 + i % 5 for i in range(30)}


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty identities with one to five images each; not to be changed."""
    return write_faces(tmp_path_factory.mktemp("source") / "faces", COUNTS)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rejections(out: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    return {line.get("image") or line["identity"]: line["reason"] for line in lines}


def test_no_identity_is_split_over_shards(faces: Path, tmp_path: Path) -> None:
    manifest = pack([faces], tmp_path / "out", images_per_shard=10, workers=1)
    shards_of = defaultdict(set)
    for shard in manifest.shards:
        for member in index_tar(tmp_path / "out" / shard.name):
            shards_of[member.name.split("_")[0]].add(shard.name)
    assert len(shards_of) == 30
    assert all(len(shards) == 1 for shards in shards_of.values())
    assert all(shard.images <= 10 for shard in manifest.shards)
    assert len(manifest.shards) >= 9


def test_order_is_shuffled_by_the_seed_alone(faces: Path, tmp_path: Path) -> None:
    names = {}
    for seed in (0, 1):
        pack([faces], tmp_path / str(seed), seed=seed, workers=1)
        names[seed] = ShardSet.open(tmp_path / str(seed)).table.names
    assert set(names[0]) == set(names[1]) == set(COUNTS)
    assert names[0] != names[1]
    assert abs(np.corrcoef(np.argsort(names[0]), np.arange(30))[0, 1]) < 0.5


def test_bytes_depend_neither_on_workers_nor_on_the_form_of_the_source(faces: Path, tmp_path: Path) -> None:
    one = pack([faces], tmp_path / "one", images_per_shard=20, workers=1)
    two = pack([tar_of(faces, tmp_path / "faces.tar")], tmp_path / "two", images_per_shard=20, workers=2)
    assert one == two
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


_PACK_AND_HANG = """
import sys, time
from pathlib import Path
from facetrain.data.sources import FaceSource
from facetrain.data.pack import pack

read = FaceSource.read
def hanging_read(self, image):
    while len(list(Path(sys.argv[2]).glob("*.tar"))) >= 3:
        time.sleep(0.01)
    return read(self, image)
FaceSource.read = hanging_read
pack([Path(sys.argv[1])], Path(sys.argv[2]), images_per_shard=10, workers=2)
"""


def test_a_packing_that_was_stopped_goes_on_to_the_same_bytes(faces: Path, tmp_path: Path) -> None:
    pack([faces], tmp_path / "whole", images_per_shard=10, workers=1)
    whole = files_of(tmp_path / "whole")
    stopped = {}
    for how in (signal.SIGKILL, signal.SIGINT):
        command = [sys.executable, "-c", _PACK_AND_HANG, str(faces), str(tmp_path / how.name)]
        stopped[how] = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    for how, process in stopped.items():
        _stop_amid(process, tmp_path / how.name, how)
    for how in stopped:
        _go_on_and_compare(faces, tmp_path / how.name, whole)


def _stop_amid(process: "subprocess.Popen[bytes]", out: Path, how: signal.Signals) -> None:
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.tar"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    if how == signal.SIGINT:
        os.killpg(process.pid, how)  # as Ctrl-C on a terminal: parent and workers
    else:
        process.send_signal(how)
    assert process.wait(timeout=30) != 0
    _wait_for_end_of_group(process.pid)


def _go_on_and_compare(faces: Path, out: Path, whole: dict[str, bytes]) -> None:
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert 3 <= len(finished) < sum(name.endswith(".tar") for name in whole)
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        ShardSet.open(out)
    pack([faces], out, images_per_shard=10, workers=2)
    assert files_of(out) == whole
    kept = [path for path, written_at in finished.items() if path.stat().st_mtime_ns == written_at]
    # Each worker may have been stopped between its tar and the record of it; that tar is made again.
    assert len(kept) >= len(finished) - 2


def _wait_for_end_of_group(group: int) -> None:
    """Workers end by themselves once their parent is gone."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("workers outlived the packing")


def test_run_again_it_repairs_what_was_damaged(faces: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = pack([faces], out, images_per_shard=10, workers=1)
    before = files_of(out)
    (out / manifest.shards[0].name).write_bytes(before[manifest.shards[0].name][:5000])
    (out / manifest.shards[1].name).unlink()
    (out / "images.npy").write_bytes(b"damaged")
    next(out.glob("*.idx.npy")).unlink()
    (out / "shard-000000.tar.123.tmp").write_bytes(b"left by a killed run")
    pack([faces], out, images_per_shard=10, workers=1)
    assert files_of(out) == before


def test_rejected_images_are_listed_with_the_reason(tmp_path: Path) -> None:
    faces = write_faces(tmp_path / "faces", COUNTS)
    whole = encoded(drawn_image(1))
    bad = {
        "p004/001.jpg": (b"", "empty file"),
        "p004/002.jpg": (b"not an image", "can't be decoded"),
        "p004/003.jpg": (whole[: len(whole) // 2], "truncated"),
        "p009/000.jpg": (encoded(drawn_image(1, 112, 10)), "too small: 10x112 pixels"),
        "p014/000.jpg": (encoded(drawn_image(1), ".png")[:-40], "truncated"),
        "p019/000.jpg": (whole[:1500] + bytes(60) + whole[1560:], "damaged: Corrupt JPEG data"),
        "stray.jpg": (whole, "bad name: expected IDENTITY/IMAGE"),
    }
    for name, (data, _) in bad.items():
        (faces / name).write_bytes(data)
    manifest = pack([faces], tmp_path / "out", images_per_shard=20, workers=2)
    found = rejections(tmp_path / "out")
    assert found.keys() == bad.keys()
    for name, (_, reason) in bad.items():
        assert found[name].startswith(reason)
    assert manifest.rejected_images == len(bad)
    assert manifest.images == sum(COUNTS.values()) - 6
    assert manifest.identities == 30
    assert manifest.single_image_identities == 6


def test_identities_without_a_usable_image_are_dropped_and_labels_have_no_gaps(tmp_path: Path) -> None:
    faces = write_faces(tmp_path / "faces", COUNTS)
    out = tmp_path / "out"
    pack([faces], tmp_path / "all", images_per_shard=10, workers=1)
    order = ShardSet.open(tmp_path / "all").table.names
    dropped = {order[3], order[17]}
    for name in dropped:
        for path in (faces / name).iterdir():
            path.write_bytes(b"")
    manifest = pack([faces], out, images_per_shard=10, workers=2)
    shards = ShardSet.open(out)
    shards.verify()
    assert shards.table.names == tuple(name for name in order if name not in dropped)
    assert (manifest.identities, manifest.dropped_identities) == (28, 2)
    assert {name: reason for name, reason in rejections(out).items() if name in dropped} == {
        name: f"dropped: all {COUNTS[name]} images were rejected" for name in dropped
    }
    for label, name in enumerate(shards.table.names):
        assert shards.read(int(shards.table.first_image[label])) == (faces / name / "000.jpg").read_bytes()
    before = files_of(out)
    assert pack([faces], out, images_per_shard=10, workers=1) == manifest
    assert files_of(out) == before


def test_a_shard_without_a_usable_image_is_left_out(tmp_path: Path) -> None:
    faces = write_faces(tmp_path / "faces", {"a": 3, "b": 3, "c": 3})
    for path in (faces / "b").iterdir():
        path.write_bytes(b"")
    manifest = pack([faces], tmp_path / "out", images_per_shard=3, workers=1)
    assert len(manifest.shards) == 2
    shards = ShardSet.open(tmp_path / "out")
    shards.verify()
    assert set(shards.table.names) == {"a", "c"}


def test_images_of_the_right_size_keep_their_bytes_and_others_are_encoded_anew(tmp_path: Path) -> None:
    settings = PackSettings(image_px=112, quality=95)
    right = encoded(drawn_image(1))
    assert prepare_image(right, settings) is right
    # A wide picture: its centre square is what remains, shrunk to a quarter of the area.
    wide = np.hstack([np.zeros((224, 50, 3), np.uint8), drawn_image(2, 224, 224), np.zeros((224, 50, 3), np.uint8)])
    for suffix in (".png", ".bmp", ".webp"):
        data = prepare_image(encoded(wide, suffix), settings)
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        expected = cv2.resize(drawn_image(2, 224, 224), (112, 112), interpolation=cv2.INTER_AREA)
        assert data.startswith(b"\xff\xd8")
        assert image.shape == (112, 112, 3)
        assert np.abs(image.astype(int) - expected.astype(int)).mean() < 4
    assert prepare_image(encoded(drawn_image(3, 60, 60)), settings) != right
    assert prepare_image(encoded(drawn_image(1), ".png"), settings).startswith(b"\xff\xd8")


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_face_that_exif_turns_is_encoded_anew_upright(orientation: int) -> None:
    turned = turned_by_exif(encoded(drawn_image(1)), orientation)
    seen = cv2.imdecode(np.frombuffer(turned, np.uint8), cv2.IMREAD_COLOR)
    assert np.abs(seen.astype(int) - drawn_image(1)).mean() > 10
    packed = prepare_image(turned, PackSettings(quality=98))
    assert exif_orientation(packed) == 1
    assert b"Exif" not in packed
    assert np.abs(cv2.imdecode(np.frombuffer(packed, np.uint8), cv2.IMREAD_COLOR).astype(int) - seen).mean() < 2
    with pytest.raises(ValueError, match=f"^turned: EXIF orientation {orientation}, but only an upright JPEG"):
        prepare_image(turned, PackSettings(copy=True))
    upright = turned_by_exif(encoded(drawn_image(1)), 1)
    assert prepare_image(upright, PackSettings(copy=True)) == upright


def test_a_shard_is_on_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, flushed = os.fsync, tmp_path / "flushed.txt"

    def listed_fsync(descriptor: int) -> None:
        with open(flushed, "a") as file:  # workers are other processes
            print(os.readlink(f"/proc/self/fd/{descriptor}"), file=file)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", listed_fsync)
    pack([write_faces(tmp_path / "faces", {"Ann": 2})], tmp_path / "out", workers=1)
    assert re.search(r"/out/shard-000000\.tar\.\d+\.tmp$", flushed.read_text(), re.MULTILINE)


def test_a_thumbnail_does_not_hide_that_a_jpeg_is_truncated() -> None:
    whole, thumbnail = encoded(drawn_image(1)), encoded(drawn_image(2, 16, 16))
    segment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    with_thumbnail = whole[:2] + segment + whole[2:]
    assert prepare_image(with_thumbnail, PackSettings()) == with_thumbnail
    assert prepare_image(with_thumbnail + b"trailing bytes", PackSettings())
    with pytest.raises(ValueError, match="truncated"):
        prepare_image(with_thumbnail[:-200], PackSettings())


def test_a_folder_of_something_else_is_refused(faces: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack([faces], out, workers=1)
    before = files_of(out)
    with pytest.raises(
        ValueError, match=r"out: holds another packing \(quality 92 instead of 80; seed 0 instead of 1\)"
    ):
        pack([faces], out, quality=80, seed=1, workers=1)
    other = write_faces(tmp_path / "other", {"Ann": 2})
    with pytest.raises(
        ValueError, match=r"out: holds another packing \(source '\w{8}' instead of '\w{8}': other images"
    ):
        pack([other], out, workers=1)
    assert files_of(out) == before
    with pytest.raises(ValueError, match="faces: expected a new or empty folder"):
        pack([other], faces, workers=1)
    (tmp_path / "a_file").touch()
    with pytest.raises(ValueError, match="a_file: expected a folder"):
        pack([other], tmp_path / "a_file", workers=1)


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "faces" / "Ann").mkdir(parents=True)
    (tmp_path / "faces" / "Ann" / "1.jpg").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"rejected\.jsonl: every image of the source was rejected"):
        pack([tmp_path / "faces"], tmp_path / "out", workers=1)
    assert rejections(tmp_path / "out")["Ann/1.jpg"] == "can't be decoded as an image"
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"quality": 101}, "pack: quality: expected 1 to 100, got 101"),
        ({"image_px": 0}, "pack: image_px: expected 1 or more, got 0"),
        ({"images_per_shard": 0}, "pack: images_per_shard: expected 1 or more, got 0"),
        ({"workers": 0}, "pack: workers: expected 1 or more, got 0"),
    ],
)
def test_settings_out_of_bounds_are_named(tmp_path: Path, setting: dict[str, int], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        pack([tmp_path], tmp_path / "out", **setting)  # type: ignore[arg-type]


def test_real_faces_are_packed_byte_for_byte(tmp_path: Path) -> None:
    if "FACETRAIN_DATA" not in os.environ:
        pytest.skip("FACETRAIN_DATA is not set")
    tar = Path(os.environ["FACETRAIN_DATA"]) / "faces_train-00.tar"
    manifest = pack([tar], tmp_path / "out", images_per_shard=2000, workers=2)
    source, shards = open_faces([tar]), ShardSet.open(tmp_path / "out")
    assert (manifest.images, manifest.rejected_images) == (len(source.names), 0)
    first_of = {name: int(shards.table.first_image[i]) for i, name in enumerate(shards.table.names)}
    packed = [first_of[name] for name in source.identities]
    for image in range(0, len(source.names), 50):
        rank = image - source.identities.index(source.identities[image])
        assert shards.read(packed[image] + rank) == source.read(image)
    shards.verify()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 100 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small file system can't be mounted: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_is_named_and_with_more_room_packing_goes_on(
    faces: Path, small_disk: Path, tmp_path: Path
) -> None:
    out = small_disk / "out"
    for _ in range(2):
        with pytest.raises(OSError, match=r"/disk/out: its disk is full; `facetrain pack`, run again with more room"):
            pack([faces], out, images_per_shard=10, workers=1)
        assert 1 <= len(list(out.glob("*.tar"))) < 9
        assert list(out.glob("*.tar*.tmp")) == []
        assert not (out / "manifest.json").exists()
    subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
    pack([faces], out, images_per_shard=10, workers=2)
    pack([faces], tmp_path / "whole", images_per_shard=10, workers=1)
    assert files_of(out) == files_of(tmp_path / "whole")


def test_there_may_be_more_shards_than_files_that_a_process_may_open(faces: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 20, hard))
    try:
        manifest = pack([faces], tmp_path / "out", images_per_shard=1, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(manifest.shards) == 30
    ShardSet.open(tmp_path / "out").verify()


def _exceed_quota(task: object) -> None:
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


def test_a_quota_that_is_used_up_is_named(faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("facetrain.data.pack.make_shard", _exceed_quota)
    with pytest.raises(OSError, match=r"out: the disk quota is used up; `facetrain pack`, run again with more room"):
        pack([faces], tmp_path / "out", workers=1)


def _die(task: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_ends_packing_in_one_line(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("facetrain.data.pack.make_shard", _die)
        with pytest.raises(ValueError, match=r"out: a worker was killed, .* fewer --workers; called again"):
            pack([faces], tmp_path / "out", workers=1)
    assert pack([faces], tmp_path / "out", workers=1).identities == 30
