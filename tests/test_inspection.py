"""`facetrain inspect`: what it counts, what it draws, and that it notices a flipped bit."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from facetrain.cli import main
from facetrain.data.shards import ShardSet


def test_it_counts_what_the_shards_hold(synthetic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(synthetic / "shards"), "--out", str(tmp_path / "look")])
    shards = ShardSet.open(synthetic / "shards")
    lengths = [len(shards.read(image)) for image in range(192)]
    told = capsys.readouterr().out
    assert "192 images of 48 identities, 112x112 pixels, in 1 shards" in told
    assert "images per identity: min 4, median 4, mean 4.0, max 4; 0 have one alone" in told
    assert f"bytes per image: min {min(lengths):,}, median {np.median(lengths):,.0f}" in told
    assert "images left out while packing: none" in told
    assert "whole: " in told
    numbers = json.loads((tmp_path / "look" / "inspection.json").read_text())
    assert numbers["images_per_identity"] == {"min": 4, "median": 4.0, "mean": 4.0, "max": 4}
    assert numbers["image_bytes"]["mean"] == pytest.approx(np.mean(lengths))
    assert cv2.imread(str(tmp_path / "look" / "images_per_identity.png")).std() > 5


def test_the_contact_sheet_shows_images_of_the_shards(synthetic: Path, tmp_path: Path) -> None:
    main(["inspect", str(synthetic / "shards"), "--out", str(tmp_path)])
    sheet = cv2.imread(str(tmp_path / "contact_sheet.jpg"))
    shards = ShardSet.open(synthetic / "shards")
    label = int(np.random.default_rng(0).permutation(48)[0])
    first = cv2.imdecode(np.frombuffer(shards.read(4 * label), np.uint8), cv2.IMREAD_COLOR)
    first = cv2.resize(first, (96, 96), interpolation=cv2.INTER_AREA)
    differences = cv2.matchTemplate(sheet[:140, :110], first, cv2.TM_SQDIFF) / (3 * 96 * 96)
    assert differences.min() < 40  # squares of 256 grey levels; the sheet went through a JPEG


def test_what_was_left_out_is_counted_by_reason(
    synthetic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faces = tmp_path / "faces"
    shutil.copytree(synthetic / "faces" / "train", faces)
    people = sorted(faces.iterdir())
    for person in people[:2]:
        next(person.iterdir()).write_bytes(b"text")
    for image in people[2].iterdir():
        image.write_bytes(b"")
    (tmp_path / "lfw.txt").write_text(people[3].name)
    main(["pack", str(faces), str(tmp_path / "out"), "--workers", "1", "--exclude", str(tmp_path / "lfw.txt")])
    assert "182 images of 46 identities, 6 rejected, 2 identities left out" in capsys.readouterr().out
    main(["inspect", str(tmp_path / "out")])
    told = capsys.readouterr().out
    assert "images left out while packing: 4 empty file; 2 can't be decoded as an image\n" in told
    assert "identities left out while packing: 1 dropped; 1 excluded\n" in told


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shard-000000.tar", "its sha256 isn't that of the manifest"),
        ("images.npy", "doesn't match"),
        ("manifest.json", "expected a manifest of facetrain shards"),
    ],
)
def test_a_damaged_folder_is_one_line_and_code_2(
    synthetic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    shutil.copytree(synthetic / "shards", tmp_path / "shards")
    data = bytearray((tmp_path / "shards" / name).read_bytes())
    data[len(data) // 2] ^= 0x80
    (tmp_path / "shards" / name).write_bytes(data)
    with pytest.raises(SystemExit) as end:
        main(["inspect", str(tmp_path / "shards"), "--out", str(tmp_path / "look")])
    assert end.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert message in told.err
    assert not (tmp_path / "look").exists()
