"""Shards as they lie on disk: what is checked, what is named, and who else can read them."""

import json
import mmap
import multiprocessing
import pickle
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drawn_faces import write_faces

from facetrain.data.index import ClassTable, index_tar, save_array
from facetrain.data.manifest import Manifest, PackSettings
from facetrain.data.names import NameList
from facetrain.data.pack import pack
from facetrain.data.places import ImagePlaces, group_sizes
from facetrain.data.shards import ShardSet, index_shard, sidecar_of

COUNTS = {f"person {i}": 1 + i % 4 for i in range(12)}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve identities with one to four images, in several shards; not to be changed."""
    folder = tmp_path_factory.mktemp("packed")
    pack([write_faces(folder / "faces", COUNTS)], folder / "shards", images_per_shard=10, workers=1)
    return folder


@pytest.fixture
def copied(packed: Path, tmp_path: Path) -> Path:
    """A copy of the shards that a test may damage."""
    return shutil.copytree(packed / "shards", tmp_path / "shards")


def test_every_image_is_read_back_under_its_identity(packed: Path) -> None:
    shards = ShardSet.open(packed / "shards")
    assert dict(zip(shards.table.names, np.diff(shards.table.first_image).tolist(), strict=True)) == COUNTS
    for label, name in enumerate(shards.table.names):
        first = int(shards.table.first_image[label])
        for k in range(COUNTS[name]):
            assert shards.read(first + k) == (packed / "faces" / name / f"{k:03d}.jpg").read_bytes()
            assert shards.table.identity_of(first + k) == label
            assert shards.where(first + k).endswith(f"{label:07d}_{k:04d}.jpg")
    for image in (-1, shards.table.num_images):
        with pytest.raises(IndexError, match=f"image {image} of"):
            shards.read(image)


def test_manifest_counts_what_is_there(packed: Path) -> None:
    manifest = Manifest.load(packed / "shards")
    assert (manifest.identities, manifest.images, manifest.single_image_identities) == (12, 30, 3)
    assert len(manifest.shards) > 2
    assert sum(shard.images for shard in manifest.shards) == 30
    assert manifest.size_bytes == sum(path.stat().st_size for path in (packed / "shards").glob("*.tar"))
    assert manifest.settings == PackSettings(images_per_shard=10)


def test_stock_webdataset_pipeline_reads_the_shards(packed: Path) -> None:
    import webdataset

    shards = ShardSet.open(packed / "shards")
    urls = [str(packed / "shards" / shard.name) for shard in shards.manifest.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["jpg"] for sample in samples] == [shards.read(i) for i in range(30)]
    assert [int(sample["__key__"].split("_")[0]) for sample in samples] == [
        shards.table.identity_of(i) for i in range(30)
    ]
    assert {key for sample in samples for key in sample if not key.startswith("__")} == {"jpg"}
    decoded = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("jpg")
    assert {image.shape for (image,) in decoded} == {(112, 112, 3)}


def test_threads_forks_and_spawned_processes_read_the_same(packed: Path) -> None:
    shards = ShardSet.open(packed / "shards")
    expected = [shards.read(i) for i in range(30)]
    order = list(range(30)) * 20
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(shards.read, order)) == [expected[i] for i in order]
    with multiprocessing.get_context("fork").Pool(2) as forks:
        assert forks.map(shards.read, order) == [expected[i] for i in order]
    pickled = pickle.dumps(shards)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).read(7) == expected[7]


def test_more_shards_than_open_files_are_read(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept_open = ShardSet.open(packed / "shards")
    expected = [kept_open.read(i) for i in range(30)]
    monkeypatch.setattr("facetrain.data.index._MAX_OPEN_FILES", 1)
    shards = ShardSet.open(packed / "shards")
    assert [shards.read(i) for i in (0, 29, 0, 29)] == [expected[i] for i in (0, 29, 0, 29)]


@pytest.mark.parametrize("size", [b"-0000001000", b"\xff" * 12])
def test_a_member_of_negative_size_is_named(packed: Path, tmp_path: Path, size: bytes) -> None:
    tar = bytearray((packed / "shards" / "shard-000000.tar").read_bytes())
    tar[124 : 124 + len(size)] = size
    (tmp_path / "shard.tar").write_bytes(tar)
    with pytest.raises(ValueError, match=r"shard\.tar: (damaged tar header at byte 0|expected an uncompressed tar)"):
        list(index_tar(tmp_path / "shard.tar"))


def test_any_shard_is_indexed_from_its_headers(packed: Path) -> None:
    shards = ShardSet.open(packed / "shards")
    labels, places = index_shard(packed / "shards" / "shard-000001.tar")
    first = shards.manifest.shards[0].images
    assert labels == [shards.table.identity_of(first + i) for i in range(len(labels))]
    assert np.array_equal(places, np.load(sidecar_of(packed / "shards" / "shard-000001.tar")))


def test_folder_without_shards_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no shards \(no such folder\); `facetrain pack SOURCE .*nowhere`"):
        ShardSet.open(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no shards \(it has no manifest\.json\); `facetrain pack"):
        ShardSet.open(tmp_path)


def test_truncated_or_missing_shard_is_named(copied: Path) -> None:
    shard = copied / "shard-000001.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1000])
    with pytest.raises(ValueError, match=rf"shard-000001\.tar: truncated shard: expected {len(data)} bytes, found"):
        ShardSet.open(copied)
    shard.write_bytes(data + b"more")
    with pytest.raises(ValueError, match=r"shard-000001\.tar: not the shard that was packed"):
        ShardSet.open(copied)
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-000001\.tar: shard is missing"):
        ShardSet.open(copied)


def test_shard_that_shrinks_while_open_is_named(copied: Path) -> None:
    shards = ShardSet.open(copied)
    with open(copied / "shard-000000.tar", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match=r"shard-000000\.tar: truncated: expected \d+ bytes"):
        shards.read(0)


def test_index_that_does_not_match_its_tar_is_named(copied: Path) -> None:
    groups = np.load(copied / "images.npy")
    longer = groups.copy()
    longer["size_bytes"][0, 0] += 1
    np.save(copied / "images.npy", longer)
    with pytest.raises(ValueError, match=r"shard-000000\.tar: doesn't match its index at 0000000_0000\.jpg"):
        ShardSet.open(copied)
    fewer = groups.copy()
    fewer["size_bytes"][-1, 30 % 16 - 1] = 0
    for other in (groups[:-1], groups[[0, 1, 1]], fewer):
        np.save(copied / "images.npy", other)
        with pytest.raises(ValueError, match=r"images\.npy: index and manifest differ: expected the places of 30 im"):
            ShardSet.open(copied)
    for other in (np.zeros(3), groups[:0], groups["first_block"]):
        np.save(copied / "images.npy", other)
        with pytest.raises(ValueError, match=r"images\.npy: damaged index file"):
            ShardSet.open(copied)
    for content in (b"nothing", b"PK\x03\x04 no zip"):
        (copied / "images.npy").write_bytes(content)
        with pytest.raises(ValueError, match=r"images\.npy: damaged index file"):
            ShardSet.open(copied)
    (copied / "images.npy").unlink()
    with pytest.raises(ValueError, match=r"images\.npy: index file is missing"):
        ShardSet.open(copied)


@pytest.mark.parametrize("name", ["class_names.npy", "class_first_image.npy", "images.npy"])
def test_an_index_whose_header_is_damaged_is_named(copied: Path, name: str) -> None:
    for before, after in ((b")", b"("), (b"{", b"%"), (b"'descr'", b"'descr$")):
        damaged = (copied / name).read_bytes().replace(before, after, 1)
        assert damaged != (copied / name).read_bytes()
        kept = (copied / name).rename(copied / "kept")
        (copied / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{name}: damaged index file"):
            ShardSet.open(copied)
        kept.rename(copied / name)


def test_an_index_of_an_earlier_version_is_read(packed: Path, copied: Path) -> None:
    """It held the first block and the length of each image."""
    places = [index_shard(shard)[1] for shard in sorted(copied.glob("*.tar"))]
    np.save(copied / "images.npy", np.concatenate(places))
    earlier, shards = ShardSet.open(copied), ShardSet.open(packed / "shards")
    assert [earlier.read(image) for image in range(30)] == [shards.read(image) for image in range(30)]


@pytest.mark.parametrize("longest", [1 << 10, 1 << 18])
def test_places_are_those_of_counted_blocks(longest: int) -> None:
    """Lengths of whole blocks and one byte more or less, in shards that end anywhere in a row of the index."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, longest, 150)
    sizes[::3] = 512 * rng.integers(1, longest // 512, 50) + rng.integers(-1, 2, 50)
    images = [1, 15, 16, 17, 60, 40, 1]
    groups = group_sizes(sizes)
    assert groups.dtype["size_bytes"].base == (np.uint16 if longest < 1 << 16 else np.uint32)
    places = ImagePlaces(groups, images)
    image = 0
    for shard, count in enumerate(images):
        assert places.images_of(shard) == range(image, image + count)
        at = 0
        for _ in range(count):
            assert places.locate(image) == (shard, at + 512, sizes[image])
            assert places.shard_of(image) == shard
            at, image = at + 512 + 512 * -(-int(sizes[image]) // 512), image + 1
    assert np.array_equal(places.size_bytes(), sizes)
    order = rng.permutation(150)
    assert places.locate_all(order) == [places.locate(image) for image in order.tolist()]


@pytest.mark.slow
def test_the_index_of_41_million_images_takes_less_than_200_megabytes(tmp_path: Path) -> None:
    """Of 2 million identities, in bytes on disk, which are mapped and nothing else; benchmarks/index.py takes times."""
    identities, images = 2_000_000, 41_000_000
    rng = np.random.default_rng(0)
    sizes = rng.integers(3000, 12_000, images, dtype=np.uint16)
    save_array(tmp_path / "images.npy", group_sizes(sizes))
    first_image = np.linspace(0, images, identities + 1).astype(np.int64)
    ClassTable(names=[f"m.{i:07x}" for i in range(identities)], first_image=first_image).save(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 140e6
    places = ImagePlaces.load(tmp_path / "images.npy", [10_000] * 4100)
    table = ClassTable.load(tmp_path)
    for array in (places._first_block, places._sizes, table.first_image, table.names.text):
        while isinstance(array.base, np.ndarray) and not isinstance(array, np.memmap):
            array = array.base
        assert isinstance(array.base, mmap.mmap) or isinstance(array, np.memmap)
    assert table.names[1_999_999] == "m.01e847f"
    drawn = rng.integers(0, images, 20)
    blocks = (sizes.astype(np.int64) + 1023) // 512
    for image, place in zip(drawn.tolist(), places.locate_all(drawn), strict=True):
        shard = image // 10_000
        assert place == (shard, 512 * (int(blocks[10_000 * shard : image].sum()) + 1), sizes[image])


def test_names_are_decoded_one_at_a_time() -> None:
    names = ("", "Zoë", "a\nb", "", "李", "")
    found = NameList.of(names)
    assert [found[i] for i in range(-6, 6)] == [*names, *names]
    assert found[1:5:2] == ["Zoë", ""]
    assert found == names
    assert found != names[1:]
    assert "李" in found
    assert NameList.of(("one",))[0] == "one"
    with pytest.raises(IndexError):
        found[6]


def test_swapped_shards_are_noticed(copied: Path) -> None:
    manifest = Manifest.load(copied)
    first, second = manifest.shards[:2]
    data = (copied / second.name).read_bytes()
    (copied / first.name).write_bytes(data)
    replace(manifest, shards=(replace(first, size_bytes=len(data)), *manifest.shards[1:])).save(copied)
    with pytest.raises(ValueError, match=r"shard-000000\.tar: (doesn't match its index|truncated)"):
        ShardSet.open(copied)


def test_verify_finds_one_changed_byte(copied: Path) -> None:
    shards = ShardSet.open(copied)
    shards.verify()
    data = bytearray((copied / "shard-000001.tar").read_bytes())
    data[700] ^= 1
    (copied / "shard-000001.tar").write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-000001\.tar: its sha256 isn't that of the manifest"):
        ShardSet.open(copied).verify()


def test_verify_finds_two_names_in_one_another_s_place(copied: Path) -> None:
    table = ClassTable.load(copied)
    one, other, *names = table.names
    ClassTable(names=(other, one, *names), first_image=table.first_image).save(copied)
    with pytest.raises(
        ValueError, match=f"^{copied}: its class table or image index hasn't the sha256 of the manifest"
    ):
        ShardSet.open(copied).verify()
    replace(Manifest.load(copied), index_sha256="").save(copied)  # as an earlier version packed
    ShardSet.open(copied).verify()


def test_manifest_of_another_kind_is_refused(copied: Path) -> None:
    path = copied / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"format": 2}))
    with pytest.raises(ValueError, match=r"manifest\.json: expected shard format 1, got 2"):
        ShardSet.open(copied)
    first = content["shards"][0]
    for key, value in (("name", "../a.tar"), ("sha256", "../../a"), ("sha256", "0" * 63)):
        path.write_text(json.dumps(content | {"shards": [first | {key: value}, *content["shards"][1:]]}))
        with pytest.raises(ValueError, match=rf"can't be read: [^\n]*got '{re.escape(value)}'$"):
            ShardSet.open(copied)
    for damaged in ("{", "[]", '{"format": 1}', json.dumps(content | {"colour": 1})):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"manifest\.json: expected a manifest of facetrain shards"):
            ShardSet.open(copied)


def test_class_table_on_disk_is_the_same(tmp_path: Path) -> None:
    table = ClassTable(names=("Zoë", "a\nb", "李"), first_image=np.array([0, 2, 3, 7]))
    table.save(tmp_path)
    loaded = ClassTable.load(tmp_path)
    assert loaded.names == table.names
    assert loaded.first_image.tolist() == [0, 2, 3, 7]
    assert [loaded.identity_of(i) for i in range(7)] == [0, 0, 1, 2, 2, 2, 2]
    with pytest.raises(ValueError, match="at least one image per identity"):
        ClassTable(names=("a", "b"), first_image=np.array([0, 2, 2]))
    with pytest.raises(ValueError, match="expected 3 image bounds"):
        ClassTable(names=("a", "b"), first_image=np.array([0, 2]))
