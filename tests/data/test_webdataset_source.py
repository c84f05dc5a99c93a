"""WebDataset tars that other programs wrote: any order of samples, the class in .cls or .json."""

import io
import json
import random
import tarfile
from pathlib import Path

import pytest
import webdataset
from drawn_faces import drawn_image, encoded

from facetrain.data.index import index_tar
from facetrain.data.pack import pack
from facetrain.data.shards import ShardSet
from facetrain.data.sources import open_faces


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    return [encoded(drawn_image(seed)) for seed in range(30)]


def test_shards_of_a_stock_shard_writer_are_packed_byte_for_byte(images: list[bytes], tmp_path: Path) -> None:
    order = list(range(30))
    random.Random(0).shuffle(order)
    with webdataset.ShardWriter(str(tmp_path / "set-%02d.tar"), maxcount=12, verbose=0) as writer:
        for number in order:
            writer.write({"__key__": f"sample{number:04d}", "jpg": images[number], "cls": number % 7})
    tars = sorted(tmp_path.glob("set-*.tar"))
    assert len(tars) == 3
    # Its default time has a fraction, for which every member gets a PAX header of 1 KB.
    assert b"mtime=" in tars[0].read_bytes()[:2048]
    manifest = pack(tars, tmp_path / "out", images_per_shard=10, workers=2)
    assert (manifest.identities, manifest.images, manifest.rejected_images) == (7, 30, 0)
    shards = ShardSet.open(tmp_path / "out")
    bounds = shards.table.first_image.tolist()
    for label, name in enumerate(shards.table.names):
        packed = [shards.read(image) for image in range(bounds[label], bounds[label + 1])]
        assert packed == [images[number] for number in range(30) if number % 7 == int(name)]
    assert pack(tars, tmp_path / "again", images_per_shard=10, workers=1) == manifest


@pytest.mark.parametrize("key", ["identity", "label", "class", "cls"])
def test_the_class_is_a_key_of_the_json(images: list[bytes], tmp_path: Path, key: str) -> None:
    members = {
        "1.json": json.dumps({"age": 30, key: "Zoë"}).encode(),
        "1.jpg": images[1],
        "2.jpg": images[2],
        "2.json": json.dumps({"age": 30, key: 5}).encode(),
        "3.json": b'"Bo"',
        "3.jpg": images[3],
    }
    source = open_faces([write_tar(tmp_path / "a.tar", members)])
    assert source.names == ("5/2.jpg", "Bo/3.jpg", "Zoë/1.jpg")
    assert [source.read(image) for image in range(3)] == [images[2], images[3], images[1]]


def test_members_of_a_sample_may_lie_apart_and_keys_may_have_folders(images: list[bytes], tmp_path: Path) -> None:
    members = {f"part.1/{number}.x.JPG": images[number] for number in range(4)}
    members |= {f"part.1/{number}.cls": b"%d\n" % (number % 2) for number in reversed(range(4))}
    members |= {"part.1/1.json": b'{"label": "the .cls comes first"}', "part.1/1.txt": b"a face"}
    source = open_faces([write_tar(tmp_path / "a.tar", members)])
    assert source.names == tuple(f"{number % 2}/part.1_{number}.x.JPG" for number in (0, 2, 1, 3))
    assert source.read(1) == images[2]


def test_samples_that_cannot_be_used_are_listed(tmp_path: Path) -> None:
    members = {
        "good.jpg": b"x",
        "good.cls": b"3",
        "two.left.jpg": b"x",
        "two.right.jpg": b"x",
        "two.cls": b"3",
        "none.jpg": b"x",
        "list.jpg": b"x",
        "list.json": b'{"label": [1, 2]}',
        "broken.png": b"x",
        "broken.json": b"{",
        "leaves.jpg": b"x",
        "leaves.cls": b"../../etc",
        "empty.jpg": b"x",
        "empty.cls": b"",
    }
    source = open_faces([write_tar(tmp_path / "a.tar", members)])
    assert source.names == ("3/good.jpg",)
    no_class = "bad sample: it has no class, neither .cls nor .json"
    assert {image.name: image.reason for image in source.skipped} == {
        "broken.png": no_class,
        "empty.jpg": "bad label: it is empty",
        "leaves.jpg": "bad label: expected a name without / and control characters, got '../../etc'",
        "list.jpg": no_class,
        "none.jpg": no_class,
        "two.left.jpg": "bad sample: 2 images of one key",
        "two.right.jpg": "bad sample: 2 images of one key",
    }


def test_folders_of_identities_with_other_json_beside_the_images_stay_folders(tmp_path: Path) -> None:
    members = {"Ann/1.jpg": b"x", "Ann/1.json": b'{"age": 30}', "Bo/1.jpg": b"x", "Bo/1.json": b"{"}
    assert open_faces([write_tar(tmp_path / "a.tar", members)]).names == ("Ann/1.jpg", "Bo/1.jpg")


def test_a_key_that_comes_twice_in_an_identity_is_named(tmp_path: Path) -> None:
    members = {"1.jpg": b"x", "1.cls": b"3"}
    tars = [write_tar(tmp_path / f"{name}.tar", members) for name in "ab"]
    with pytest.raises(ValueError, match=r"3/1\.jpg: occurs 2 times, in .*a\.tar and .*b\.tar"):
        open_faces(tars)


def test_a_sample_name_that_leaves_the_tar_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"../1.jpg": b"x", "../1.cls": b"3"})
    assert [member.name for member in index_tar(path)] == ["../1.jpg", "../1.cls"]
    with pytest.raises(ValueError, match=r"a\.tar: refused: member '\.\./1\.jpg' points outside of the tar"):
        open_faces([path])


def test_keys_that_slashes_alone_tell_apart_are_two_images(images: list[bytes], tmp_path: Path) -> None:
    members = {"a/b.jpg": images[0], "a/b.cls": b"5", "a_b.jpg": images[1], "a_b.cls": b"5"}
    source = open_faces([write_tar(tmp_path / "s.tar", members)])
    assert source.names == ("5/a%2Fb.jpg", "5/a_b.jpg")
    assert [source.read(0), source.read(1)] == images[:2]


def test_samples_of_a_kind_that_is_not_read_are_listed(images: list[bytes], tmp_path: Path) -> None:
    members = {"1.jpg": images[1], "1.mask.gif": b"x", "1.cls": b"5", "2.tif": b"x", "2.cls": b"5"}
    source = open_faces([write_tar(tmp_path / "a.tar", members)])
    assert source.names == ("5/1.jpg",)
    assert [(image.name, image.reason.split(", ")[0]) for image in source.skipped] == [("2.tif", "unread kind: .tif")]
