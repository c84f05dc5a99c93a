"""InsightFace's RecordIO, against a writer and a parser that share nothing with the reader."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
from drawn_faces import drawn_image, encoded

from facetrain.data.pack import pack
from facetrain.data.shards import ShardSet
from facetrain.data.sources import FaceSource, open_faces

MAGIC = struct.pack("<I", 0xCED7230A)


def record(content: bytes) -> bytes:
    """One record as dmlc-core's RecordIOWriter writes it: cut at aligned magic numbers, padded to four bytes."""
    pieces, begin = [], 0
    for at in range(0, len(content) // 4 * 4, 4):
        if content[at : at + 4] == MAGIC:
            pieces.append(content[begin:at])
            begin = at + 4
    pieces.append(content[begin:])
    kinds = [0] if len(pieces) == 1 else [1, *[2] * (len(pieces) - 2), 3]
    words = (MAGIC + struct.pack("<I", kind << 29 | len(piece)) for kind, piece in zip(kinds, pieces, strict=True))
    return b"".join(word + piece + bytes(-len(piece) % 4) for word, piece in zip(words, pieces, strict=True))


def packed(image: bytes, *, key: int, label: float = 0.0, labels: Sequence[float] = ()) -> bytes:
    """An image as mxnet.recordio.pack joins it with its labels."""
    header = struct.pack("<IfQQ", len(labels), 0.0 if labels else label, key, 0)
    return record(header + struct.pack(f"<{len(labels)}f", *labels) + image)


def write_set(folder: Path, records: dict[int, bytes], *, with_idx: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    offset, lines = 0, []
    for key, data in records.items():
        lines.append(f"{key}\t{offset}\n")
        offset += len(data)
    (folder / "train.rec").write_bytes(b"".join(records.values()))
    if with_idx:
        (folder / "train.idx").write_text("".join(lines))
    return folder / "train.rec"


def contents(source: FaceSource) -> dict[str, bytes]:
    return {name: source.read(image) for image, name in enumerate(source.names)}


def test_all_images_of_a_set_that_mxnet_wrote_are_byte_for_byte_in_the_shards(face_data: Path, tmp_path: Path) -> None:
    data = (face_data / "interop" / "train.rec").read_bytes()
    expected: dict[str, list[bytes]] = {}
    at = 0
    while at < len(data):
        length = int.from_bytes(data[at + 4 : at + 8], "little")  # no piece of a record, or it would be huge
        flag, label = struct.unpack("<If", data[at + 8 : at + 16])
        if flag == 0:
            expected.setdefault(f"{label:.0f}", []).append(data[at + 32 : at + 8 + length])
        at += 8 + (length + 3) // 4 * 4
    manifest = pack([face_data / "interop"], tmp_path / "out", workers=2)
    assert (manifest.images, manifest.identities, manifest.rejected_images) == (238, 60, 0)
    shards = ShardSet.open(tmp_path / "out")
    shards.verify()
    bounds = shards.table.first_image.tolist()
    for label, name in enumerate(shards.table.names):
        assert [shards.read(image) for image in range(bounds[label], bounds[label + 1])] == expected.pop(name)
    assert expected == {}
    assert pack([face_data / "interop" / "train.rec"], tmp_path / "out", workers=1) == manifest


def test_labels_in_arrays_records_in_pieces_and_any_order(tmp_path: Path) -> None:
    images = [encoded(drawn_image(seed)) for seed in range(4)]
    # Magic numbers at the start, twice in a row, at the end, and where no piece is cut because it isn't aligned.
    torn = [MAGIC + b"abcd", b"abcd" + MAGIC + MAGIC + b"abcdefg", b"abcdabcd" + MAGIC, b"ab" + MAGIC + b"abcdef"]
    records = {
        7: packed(images[0], key=7, labels=[3.0, 0.5]),
        2: packed(images[1], key=2, label=12),
        9: packed(images[2], key=9, labels=[12.0]),
        1: packed(images[3], key=1, label=3),
        20: packed(b"", key=20, labels=[1.0, 3.0]),
        **{30 + number: packed(image, key=30 + number, label=5) for number, image in enumerate(torn)},
        40: record(struct.pack("<IfQQ", 0, 6.0, int.from_bytes(MAGIC, "little"), 0) + b"torn header"),
    }
    source = open_faces([write_set(tmp_path / "set", records)])
    assert contents(source) == {
        "12/00000002": images[1],
        "12/00000009": images[2],
        "3/00000001": images[3],
        "3/00000007": images[0],
        **{f"5/{30 + number:08d}": image for number, image in enumerate(torn)},
        "6/00000040": b"torn header",
    }
    assert source.identities[:4] == ("12", "12", "3", "3")
    assert source.where(3).endswith("train.rec: record at byte 0")


def test_without_an_index_keys_are_those_of_the_headers_and_with_it_only_what_it_lists_counts(tmp_path: Path) -> None:
    records = {key: packed(f"image {key}".encode(), key=key + 100, label=key % 2) for key in range(1, 5)}
    path = write_set(tmp_path / "set", records, with_idx=False)
    assert contents(open_faces([path])) == {f"{key % 2}/{key + 100:08d}": b"image %d" % key for key in range(1, 5)}
    write_set(tmp_path / "set", records)
    index = tmp_path / "set" / "train.idx"
    index.write_text("".join(index.read_text().splitlines(keepends=True)[1:3]))
    assert contents(open_faces([path])) == {"0/00000002": b"image 2", "1/00000003": b"image 3"}


def test_labels_that_name_nobody_are_listed(tmp_path: Path) -> None:
    labels = {1: 0.0, 2: -1.0, 3: 2.5, 4: 2.0**25, 5: float("nan")}
    path = write_set(tmp_path / "set", {key: packed(b"x", key=key, label=label) for key, label in labels.items()})
    source = open_faces([path])
    assert source.names == ("0/00000001",)
    assert [(image.name, image.reason.rpartition(" got ")[2]) for image in source.skipped] == [
        ("00000002", "-1"),
        ("00000003", "2.5"),
        ("00000004", "3.35544e+07"),
        ("00000005", "nan"),
    ]


def test_a_damaged_file_is_one_line_with_file_and_offset(tmp_path: Path) -> None:
    records = {key: packed(encoded(drawn_image(key)), key=key, label=key) for key in range(1, 4)}
    second, third = len(records[1]), len(records[1]) + len(records[2])
    data = b"".join(records.values())
    damaged = {
        f"expected a record at byte {second}, found 0023d7ce and kind 0": data[:second] + b"\0" + data[second + 1 :],
        f"expected a record at byte {third}, found .* and kind 3": data[: third + 7] + b"\x60" + data[third + 8 :],
        f"a record at byte {third} goes beyond the end, byte {third + 100}": data[: third + 100],
        f"a record at byte {third} goes beyond the end, byte {third + 5}": data[: third + 5],
        f"the record at byte {third} has 10 bytes, expected 24": data[:third] + record(bytes(10)),
        "empty": b"",
    }
    path = write_set(tmp_path / "set", records)
    (tmp_path / "set" / "train.idx").unlink()
    for message, content in damaged.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"train\.rec: .*{message}") as caught:
            open_faces([path])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("1\t0\n2\t4\n", r"train\.idx:2: no record of train\.rec starts at byte 4"),
        ("1\t0\n1\t36\n", r"train\.idx:2: key 1 or byte 36 stands twice"),
        ("1\t0\none 36\n", r"train\.idx:2: expected a key and an offset, got 'one 36'"),
    ],
)
def test_a_wrong_line_of_the_index_is_named(tmp_path: Path, index: str, message: str) -> None:
    path = write_set(tmp_path / "set", {key: packed(b"face", key=key) for key in (1, 2)})
    path.with_suffix(".idx").write_text(index)
    with pytest.raises(ValueError, match=message):
        open_faces([path])


def test_what_insightface_says_of_the_set_is_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = {0: packed(b"", key=0, labels=[4.0, 6.0])} | {
        key: packed(b"face", key=key, label=key % 2) for key in (1, 2, 3)
    }
    path = write_set(tmp_path / "set", records)
    (tmp_path / "set" / "property").write_text("2,112,112")
    assert len(open_faces([tmp_path / "set"]).names) == 3
    assert caplog.records == []
    (tmp_path / "set" / "property").write_text("5,112,112")
    open_faces([path])
    assert "says 5 identities, the records hold 2" in caplog.text
    write_set(tmp_path / "set", {key: data for key, data in records.items() if key != 2})
    with pytest.raises(ValueError, match=r"train\.rec: the record at byte 0 says 3 images, found 2"):
        open_faces([path])


def test_a_set_beside_strangers_of_the_same_numbers_is_refused(tmp_path: Path) -> None:
    records = write_set(tmp_path / "a", {1: packed(b"x", key=1), 2: packed(b"y", key=2, label=1)})
    for name in ("Ann", "1"):
        (tmp_path / "faces" / name).mkdir(parents=True)
        (tmp_path / "faces" / name / "1.jpg").write_bytes(b"x")
    for paths in ([records, tmp_path / "faces"], [tmp_path / "faces", records]):
        with pytest.raises(ValueError, match=r"train\.rec and .*faces: both have an identity 1, "):
            open_faces(paths)
    (tmp_path / "faces" / "1").rename(tmp_path / "faces" / "Bo")
    assert set(open_faces(paths).identities) == {"0", "1", "Ann", "Bo"}


def test_two_sets_whose_labels_both_count_from_0_are_refused(tmp_path: Path) -> None:
    sets = [write_set(tmp_path / name, {1: packed(b"face", key=1)}) for name in ("a", "b")]
    with pytest.raises(ValueError, match=r"a/train\.rec and .*b: labels of both count from 0"):
        open_faces([sets[0], tmp_path / "b"])


def test_a_record_that_is_no_image_is_rejected_by_its_name(tmp_path: Path) -> None:
    records = {1: packed(encoded(drawn_image(1)), key=1, label=4), 2: packed(b"not an image", key=2, label=4)}
    records |= {3: packed(b"", key=3, label=4)}
    pack([write_set(tmp_path / "set", records)], tmp_path / "out", workers=1)
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert lines == [
        {"image": "4/00000002", "reason": "can't be decoded as an image"},
        {"image": "4/00000003", "reason": "empty file"},
    ]
