"""Faces in tables: CSV lists of files, and images in Parquet."""

from pathlib import Path
from typing import Any

import pyarrow
import pytest
from drawn_faces import FaceFolder, drawn_image, encoded
from pyarrow.parquet import write_table

from facetrain.data.pack import pack
from facetrain.data.shards import ShardSet
from facetrain.data.sources import open_faces


@pytest.mark.parametrize(
    "text",
    [
        "faces/Ann/000.jpg,5\nfaces/Bo/000.jpg,Zoë\nfaces/Bo/001.jpg,5\n",
        "\ufeffage,Label,Path\n30,5,faces/Ann/000.jpg\n31,Zoë,faces/Bo/000.jpg\n\n32, 5 ,./faces/Bo/001.jpg\n",
    ],
)
def test_a_csv_lists_files_with_their_labels(face_folder: FaceFolder, tmp_path: Path, text: str) -> None:
    folder = face_folder({"Ann": 1, "Bo": 2})
    (tmp_path / "list.csv").write_text(text)
    source = open_faces([tmp_path / "list.csv"])
    assert source.identities == ("5", "5", "Zoë")
    assert source.names[0].endswith("faces_Ann_000.jpg")
    paths = [folder / "Ann/000.jpg", folder / "Bo/001.jpg", folder / "Bo/000.jpg"]
    assert {source.read(image) for image in range(3)} == {path.read_bytes() for path in paths}
    assert source.read(2) == paths[2].read_bytes()


def test_paths_that_slashes_alone_tell_apart_are_two_images(face_folder: FaceFolder, tmp_path: Path) -> None:
    folder = face_folder({"Ann": 2})
    (folder / "Ann/001.jpg").rename(folder / "Ann_000.jpg")
    (folder / "list.csv").write_text("Ann_000.jpg,5\nAnn/000.jpg,5\n")
    source = open_faces([folder / "list.csv"])
    assert source.names == ("5/Ann%2F000.jpg", "5/Ann_000.jpg")
    (folder / "list.csv").write_text("Ann/000.jpg,5\nAnn/000.jpg,5\n")
    with pytest.raises(ValueError, match="occurs 2 times"):
        open_faces([folder / "list.csv"])


def test_lines_of_a_csv_that_cannot_be_used_are_listed(face_folder: FaceFolder, tmp_path: Path) -> None:
    folder = face_folder({"Ann": 1})
    (tmp_path / "list.csv").write_text(f"{folder}/Ann/000.jpg,Ann\nnowhere.jpg,Ann\n{folder}/Ann/000.jpg,\nfaces,a/b\n")
    source = open_faces([tmp_path / "list.csv"])
    assert source.identities == ("Ann",)
    assert [(Path(image.name).name, image.reason.split(":")[0]) for image in source.skipped] == [
        ("000.jpg", "bad label"),
        ("faces", "bad label"),
        ("nowhere.jpg", "no such file"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a.jpg,1\nb.jpg\n", r"list\.csv:2: expected path,label, got 'b\.jpg'"),
        (b"a.jpg,b,c\n", r"list\.csv:1: expected path,label, got 'a\.jpg,b,c'"),
        (b"a.jpg,1\n", r"list\.csv: no images in it: .* found 'a\.jpg': no such file"),
        (b"", r"list\.csv: no images in it: expected lines of path,label$"),
        (b"\xff\xfe,1\n", r"list\.csv: expected a CSV in UTF-8"),
        (b'"a.jpg,1\n', r"list\.csv: expected a CSV in UTF-8"),
    ],
)
def test_a_wrong_csv_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_faces([tmp_path / "list.csv"])


def test_a_csv_of_pixels_instead_of_paths_is_named(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(f"image,label\n{'0a' * 5000},1\n")
    with pytest.raises(ValueError, match=r"list\.csv: no images in it: .* found '(0a){100}': no such file$"):
        open_faces([tmp_path / "list.csv"])


IMAGES = [encoded(drawn_image(seed)) for seed in range(12)]


def write_parquet(path: Path, **columns: Any) -> Path:
    write_table(pyarrow.table(columns), path, row_group_size=5)
    return path


@pytest.mark.parametrize(
    "column", [pyarrow.array(IMAGES), pyarrow.array([{"bytes": image, "path": None} for image in IMAGES])]
)
@pytest.mark.parametrize("key", ["label", "identity"])
def test_parquet_in_any_order_is_packed_byte_for_byte(column: Any, key: str, tmp_path: Path) -> None:
    labels = [number % 3 for number in range(12)]
    path = write_parquet(tmp_path / "train-0.parquet", age=range(12), image=column, **{key: labels})
    manifest = pack([path], tmp_path / "out", workers=2, images_per_shard=4)
    assert (manifest.identities, manifest.images) == (3, 12)
    shards = ShardSet.open(tmp_path / "out")
    for label, name in enumerate(shards.table.names):
        first = int(shards.table.first_image[label])
        assert [shards.read(image) for image in range(first, first + 4)] == IMAGES[int(name) :: 3]
    assert pack([path], tmp_path / "out", workers=1, images_per_shard=4) == manifest
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "train-0.parquet"]


def test_parquet_in_several_files_is_one_set_and_rows_without_image_or_label_are_listed(tmp_path: Path) -> None:
    labels = pyarrow.array(["Ann", None, "Bo", "Ann"]).dictionary_encode()
    paths = [
        write_parquet(tmp_path / f"{name}.parquet", jpg=pyarrow.array([*IMAGES[:3], None]), label=labels)
        for name in "ab"
    ]
    source = open_faces(paths, spool_dir=tmp_path)
    assert source.names == ("Ann/a_00000000", "Ann/b_00000000", "Bo/a_00000002", "Bo/b_00000002")
    assert source.read(3) == IMAGES[2]
    assert source.where(3) == f"{tmp_path}/b.parquet: Bo/b_00000002"
    assert [(image.name, image.reason.split(":")[0]) for image in source.skipped] == [
        (f"{file}_{row:08d}", reason) for file in "ab" for row, reason in ((1, "bad label"), (3, "no bytes"))
    ]


def test_labels_of_parquet_are_integers_text_or_whole_floats(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for labels in ([7, 8, 7], ["7", "8", "7"], [7.0, 8.0, 7.0]):
        for column in (pyarrow.array(labels), pyarrow.array(labels).dictionary_encode()):
            source = open_faces([write_parquet(path, jpg=IMAGES[:3], label=column)])
            assert source.identities == ("7", "7", "8")
    source = open_faces([write_parquet(path, jpg=IMAGES[:4], label=pyarrow.array([7.0, None, float("nan"), 1.5]))])
    assert source.identities == ("7",)
    assert [image.reason for image in source.skipped] == [
        "bad label: the row has none",
        "bad label: expected a whole number or text, got nan",
        "bad label: expected a whole number or text, got 1.5",
    ]
    for column, kind in ((pyarrow.array([b"a", b"b"]).dictionary_encode(), "dictionary<.*"), ([True, False], "bool")):
        with pytest.raises(
            ValueError, match=rf"a\.parquet: expected a column 'label' of integers or text, found {kind}"
        ):
            open_faces([write_parquet(path, jpg=IMAGES[:2], label=column)])


def test_a_wrong_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"not a table")
    with pytest.raises(ValueError, match=r"a\.parquet: can't be read as Parquet"):
        open_faces([path])
    for columns in ({"jpg": IMAGES}, {"label": range(12)}, {"a": IMAGES, "b": IMAGES, "label": range(12)}):
        with pytest.raises(ValueError, match=r"a\.parquet: expected one column of image bytes and one called label"):
            open_faces([write_parquet(path, **columns)])
    with pytest.raises(ValueError, match=r"a\.parquet: no images in it: it has no rows"):
        open_faces([write_parquet(path, jpg=pyarrow.array([], pyarrow.binary()), label=pyarrow.array([], "int64"))])
    write_parquet(path, jpg=IMAGES, label=range(12))
    path.write_bytes(path.read_bytes()[:200] + bytes(300) + path.read_bytes()[500:])
    with pytest.raises(ValueError, match=r"a\.parquet: can't be read as Parquet"):
        open_faces([path])
