"""What packing leaves out, joins, copies and aligns because it was told to."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from drawn_faces import drawn_image, encoded, write_faces

from facetrain.data.align import TEMPLATE, points_from_file
from facetrain.data.manifest import Manifest, PackSettings
from facetrain.data.pack import pack
from facetrain.data.photograph import Photograph
from facetrain.data.prepare import prepare_image
from facetrain.data.shards import ShardSet
from facetrain.data.sources import open_faces

COUNTS = {"Ann": 3, "Ann_Z": 2, "Bo": 1, "Cy": 4, "Di": 2}


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five identities; not to be changed."""
    return write_faces(tmp_path_factory.mktemp("source") / "faces", COUNTS)


def packed_images(out: Path) -> dict[str, list[bytes]]:
    shards = ShardSet.open(out)
    shards.verify()
    bounds = shards.table.first_image.tolist()
    return {
        name: [shards.read(image) for image in range(bounds[label], bounds[label + 1])]
        for label, name in enumerate(shards.table.names)
    }


def images_of(faces: Path, *names: str) -> list[bytes]:
    return [path.read_bytes() for name in names for path in sorted((faces / name).iterdir())]


def rejections(out: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    return {line.get("image") or line["identity"]: line["reason"] for line in lines}


def write(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


def test_excluded_identities_are_left_out_and_listed(faces: Path, tmp_path: Path) -> None:
    names = write(tmp_path / "lfw.txt", "Cy\n\n Nobody\nBo\n")
    manifest = pack([faces], tmp_path / "out", exclude=names, workers=1)
    assert packed_images(tmp_path / "out") == {name: images_of(faces, name) for name in ("Ann", "Ann_Z", "Di")}
    assert rejections(tmp_path / "out") == {name: f"excluded: {names} lists {name}" for name in ("Bo", "Cy")}
    assert (manifest.dropped_identities, manifest.rejected_images) == (2, 0)
    with pytest.raises(ValueError, match="out: holds another packing"):
        pack([faces], tmp_path / "out", workers=1)
    with pytest.raises(ValueError, match=r"all\.txt: excludes all 5 identities"):
        pack([faces], tmp_path / "all", exclude=write(tmp_path / "all.txt", "\n".join(COUNTS)), workers=1)


def test_merged_names_are_one_identity_that_keeps_the_first(faces: Path, tmp_path: Path) -> None:
    groups = write(tmp_path / "same.txt", "Di,Ann_Z\nBo\tCy\nAnn, Ann_Z\n")
    manifest = pack([faces], tmp_path / "out", merge=groups, workers=1)
    assert packed_images(tmp_path / "out") == {
        "Di": images_of(faces, "Ann", "Ann_Z", "Di"),
        "Bo": images_of(faces, "Bo", "Cy"),
    }
    assert (manifest.identities, manifest.images) == (2, 12)
    # Whoever is excluded under one name is excluded under all.
    names = write(tmp_path / "lfw.txt", "Ann\n")
    pack([faces], tmp_path / "less", merge=groups, exclude=names, workers=1)
    assert packed_images(tmp_path / "less").keys() == {"Bo"}
    assert rejections(tmp_path / "less") == {"Di": f"excluded: {names} lists Ann"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Ann,Bo\nCy\n", r"same\.txt:2: expected two or more names, separated by tabs or commas, got 'Cy'"),
        ("\nAnn,,Bo\n", r"same\.txt:2: expected two or more names"),
        ("Ann\tBo,Cy\n", r"same\.txt:1: 'Bo,Cy' is no identity of the source"),
    ],
)
def test_a_wrong_line_of_groups_is_named(faces: Path, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack([faces], tmp_path / "out", merge=write(tmp_path / "same.txt", text), workers=1)
    assert not (tmp_path / "out").exists()


def test_names_of_lists_may_hold_blanks_at_the_ends_and_odd_line_ends(tmp_path: Path) -> None:
    odd = ("Ann ", "Li\u2028A", "B\x85b")
    faces = write_faces(tmp_path / "faces", {"Ann": 1, "Cy": 1, **dict.fromkeys(odd, 1)})
    names = tmp_path / "names.txt"
    names.write_bytes("".join(f"{name}\r\n" for name in (*odd, "  Cy")).encode())
    pack([faces], tmp_path / "less", exclude=names, workers=1)
    assert packed_images(tmp_path / "less").keys() == {"Ann"}
    groups = write(tmp_path / "same.txt", "Ann \tLi\u2028A\nB\x85b, Cy\n")
    pack([faces], tmp_path / "merged", merge=groups, workers=1)
    assert packed_images(tmp_path / "merged").keys() == {"Ann", "Ann ", "B\x85b"}


def test_a_list_that_excludes_nobody_is_named(faces: Path, tmp_path: Path) -> None:
    names = write(tmp_path / "lfw.txt", "17\n18\n")
    with pytest.raises(ValueError, match=r"lfw\.txt: the source has none of these 2 identities, such as '17'; .*'Ann'"):
        pack([faces], tmp_path / "out", exclude=names, workers=1)
    assert not (tmp_path / "out").exists()
    assert pack([faces], tmp_path / "out", exclude=write(names, "\n"), workers=1).identities == len(COUNTS)


def test_names_that_differ_in_unicode_form_alone_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = "Jos\xe9", "Jose\u0301"
    faces = write_faces(tmp_path / "faces", {"Ann": 1, one: 1, other: 1})
    assert pack([faces], tmp_path / "out", workers=1).identities == 3
    assert [record.getMessage() for record in caplog.records] == [
        "1 names stand in two Unicode forms, each taken for a person of its own, such as 'Jose\\u0301' and 'Jos\\xe9';"
        " --merge makes them one"
    ]
    caplog.clear()
    pack([faces], tmp_path / "merged", merge=write(tmp_path / "same.txt", f"{one}\t{other}\n"), workers=1)
    assert packed_images(tmp_path / "merged").keys() == {"Ann", one}
    assert caplog.records == []


def test_a_listed_name_is_found_in_another_unicode_form(tmp_path: Path) -> None:
    faces = write_faces(tmp_path / "faces", {"Ann": 1, "Jos\xe9": 1})
    names = write(tmp_path / "names.txt", "Jose\u0301\n")
    pack([faces], tmp_path / "out", exclude=names, workers=1)
    assert packed_images(tmp_path / "out").keys() == {"Ann"}
    assert rejections(tmp_path / "out") == {"Jos\xe9": f"excluded: {names} lists Jos\xe9"}


def test_identities_are_bounded_by_their_usable_images(tmp_path: Path) -> None:
    faces = write_faces(tmp_path / "faces", COUNTS)
    (faces / "Di" / "000.jpg").write_bytes(b"")
    (faces / "Cy" / "001.jpg").write_bytes(b"")
    manifest = pack([faces], tmp_path / "out", min_images=2, max_images=2, workers=1)
    assert packed_images(tmp_path / "out") == {
        "Ann": images_of(faces, "Ann")[:2],
        "Ann_Z": images_of(faces, "Ann_Z"),
        "Cy": [images_of(faces, "Cy")[0], images_of(faces, "Cy")[2]],
    }
    assert rejections(tmp_path / "out") == {
        "Ann/002.jpg": "left out: beyond max_images, 2",
        "Bo": "dropped: 1 images, fewer than min_images, 2",
        "Cy/001.jpg": "empty file",
        "Cy/003.jpg": "left out: beyond max_images, 2",
        "Di": "dropped: 1 of 2 images are usable, fewer than min_images, 2",
        "Di/000.jpg": "empty file",
    }
    assert (manifest.rejected_images, manifest.dropped_identities) == (4, 2)


def test_copying_encodes_nothing_anew(tmp_path: Path) -> None:
    faces = write_faces(tmp_path / "faces", {"Ann": 2})
    (faces / "Ann" / "large.jpg").write_bytes(encoded(drawn_image(5, 130, 120)))
    (faces / "Ann" / "other.png").write_bytes(encoded(drawn_image(6), ".png"))
    pack([faces], tmp_path / "out", copy=True, workers=1)
    assert packed_images(tmp_path / "out") == {"Ann": images_of(faces, "Ann")[:2]}
    assert rejections(tmp_path / "out") == {
        "Ann/large.jpg": "doesn't fit: 120x130 pixels, but only a JPEG of 112x112 can be copied",
        "Ann/other.png": "doesn't fit: 112x112 pixels and no JPEG, but only a JPEG of 112x112 can be copied",
    }
    with pytest.raises(ValueError, match="every image of the source was rejected"):
        pack([faces], tmp_path / "small", copy=True, image_px=100, workers=1)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp"])
def test_an_image_that_states_too_many_pixels_is_not_decoded(suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(drawn_image(1, 300, 200), suffix)
    assert prepare_image(data, PackSettings(max_pixels=60_000))
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match=r"^too large: 200x300 pixels, more than 59,999 aren't decoded$"):
        prepare_image(data, PackSettings(max_pixels=59_999))


def test_a_larger_bound_of_pixels_holds_for_aligned_photographs_too() -> None:
    large = encoded(np.zeros((7100, 7100), np.uint8), ".png")  # 50.4 million
    with pytest.raises(ValueError, match=r"^too large: 7100x7100 pixels"):
        prepare_image(large, PackSettings(), lambda _: TEMPLATE, "Ann/1.png")
    assert prepare_image(large, PackSettings(max_pixels=60_000_000), lambda _: TEMPLATE, "Ann/1.png")


def test_a_thin_image_without_a_face_is_rejected(face_data: Path, tmp_path: Path) -> None:
    (tmp_path / "faces" / "Ann").mkdir(parents=True)
    (tmp_path / "faces" / "Ann" / "long.jpg").write_bytes(encoded(np.full((16, 60_000, 3), 90, np.uint8)))
    detector = face_data / "models" / "face_detection_yunet.onnx"
    with pytest.raises(ValueError, match="every image of the source was rejected"):
        pack([tmp_path / "faces"], tmp_path / "out", detector=detector, workers=1)
    assert rejections(tmp_path / "out")["Ann/long.jpg"] == "not aligned: no five points, or no face, found for it"


def test_an_image_that_opencv_cannot_align_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"^can't be aligned: OpenCV.*$"):
        prepare_image(encoded(drawn_image(1)), PackSettings(), lambda _: TEMPLATE[:4], "Ann/1.jpg")


def test_a_decompression_bomb_is_listed(tmp_path: Path) -> None:
    faces = write_faces(tmp_path / "faces", {"Ann": 1})
    bomb = bytearray(encoded(np.zeros((8, 8), np.uint8), ".png"))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2  # 10 GB of pixels
    (faces / "Ann" / "bomb.png").write_bytes(bomb)
    pack([faces], tmp_path / "out", workers=1)
    assert rejections(tmp_path / "out") == {
        "Ann/bomb.png": "too large: 60000x60000 pixels, more than 50,000,000 aren't decoded"
    }


def test_a_form_whose_size_is_not_known_beforehand_is_not_decoded() -> None:
    for data in (encoded(drawn_image(1), ".tiff"), encoded(drawn_image(1), ".ppm"), b"GIF89a" + bytes(40)):
        with pytest.raises(ValueError, match="can't be decoded as an image"):
            prepare_image(data, PackSettings())


def points_line(name: str, points: Any) -> str:
    return f"{name} {' '.join(f'{number:.4f}' for number in np.ravel(points))}\n"


def test_photographs_are_aligned_by_a_list_of_points(tmp_path: Path) -> None:
    faces = tmp_path / "faces"
    (faces / "Ann").mkdir(parents=True)
    face = cv2.GaussianBlur(drawn_image(1), (0, 0), 3)
    photograph = cv2.copyMakeBorder(cv2.resize(face, (224, 224)), 60, 40, 30, 70, cv2.BORDER_REFLECT)
    for name in ("a", "b", "c"):
        (faces / "Ann" / f"{name}.png").write_bytes(encoded(photograph, ".png"))
    lines = points_line("Ann/a.jpg", TEMPLATE * 2 + [30, 60]) + points_line("Ann/c.jpg", np.ones((5, 2)))
    list_of_points = write(tmp_path / "points.txt", lines)
    manifest = pack([faces], tmp_path / "out", landmarks=list_of_points, quality=98, workers=1)
    (aligned,) = packed_images(tmp_path / "out")["Ann"]
    image = cv2.imdecode(np.frombuffer(aligned, np.uint8), cv2.IMREAD_COLOR)
    assert np.abs(image.astype(int) - face).mean() < 2
    assert rejections(tmp_path / "out") == {
        "Ann/b.png": "not aligned: no five points, or no face, found for it",
        "Ann/c.png": "not aligned: its five points determine no position",
    }
    assert manifest.settings.alignment.startswith("landmarks ")
    write(list_of_points, lines.replace("Ann/c", "Ann/b"))
    with pytest.raises(ValueError, match=r"out: holds another packing \(alignment 'landmarks "):
        pack([faces], tmp_path / "out", landmarks=list_of_points, quality=98, workers=1)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"copy": True}, "pack: alignment makes new images of 112x112, got copy"),
        ({"image_px": 100}, "pack: alignment makes new images of 112x112, got image_px 100"),
        ({"detector": Path("d.onnx")}, r"pack: expected landmarks or a detector, got .*points\.txt and d\.onnx"),
    ],
)
def test_settings_that_exclude_each_other_are_named(
    faces: Path, tmp_path: Path, setting: Mapping[str, Any], message: str
) -> None:
    points = write(tmp_path / "points.txt", points_line("Ann/000.jpg", TEMPLATE))
    with pytest.raises(ValueError, match=message):
        pack([faces], tmp_path / "out", landmarks=points, **setting)
    assert not (tmp_path / "out").exists()


def test_bounds_that_leave_nobody_are_named(faces: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pack: max_images: expected min_images \(3\) or more, got 2"):
        pack([faces], tmp_path / "out", min_images=3, max_images=2)


def test_a_file_that_is_no_detector_is_refused_before_anything_is_written(faces: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"d\.onnx: not a YuNet face detector"):
        pack([faces], tmp_path / "out", detector=write(tmp_path / "d.onnx", "no network"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pack([faces], tmp_path / "out", detector=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_photographs_are_aligned_as_by_their_published_points(face_data: Path, tmp_path: Path) -> None:
    original = some_of(face_data / "lfw_original_sample.tar", tmp_path / "some", every=6)
    by_detector = aligned_faces(original, tmp_path / "d", detector=face_data / "models" / "face_detection_yunet.onnx")
    by_list = aligned_faces(original, tmp_path / "l", landmarks=face_data / "protocols" / "lfw_landmark.txt")
    assert by_detector.images + by_detector.rejected_images == by_list.images == 100
    assert by_detector.rejected_images <= 1
    published = open_faces([face_data / f"lfw_aligned-0{part}.tar" for part in (0, 1)])
    row_of = {name: row for row, name in enumerate(published.names)}
    packed = {name: iter(images) for name, images in packed_images(tmp_path / "l").items()}
    errors = []
    for name in open_faces([original]).names:
        pair = (next(packed[name.split("/")[0]]), published.read(row_of[name]))
        a, b = (cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR).astype(int) for data in pair)
        errors.append(np.abs(a - b).mean())
    assert np.mean(errors) < 2.5  # of 256 grey levels; both went through a JPEG


def some_of(source: Path, folder: Path, *, every: int) -> Path:
    faces = open_faces([source])
    for image in range(0, len(faces.names), every):
        (folder / faces.names[image]).parent.mkdir(parents=True, exist_ok=True)
        (folder / faces.names[image]).write_bytes(faces.read(image))
    return folder


def aligned_faces(original: Path, out: Path, **by: Path) -> Manifest:
    return pack([original], out, workers=2, images_per_shard=40, **by)  # type: ignore[arg-type]


def test_a_large_photograph_gives_the_points_of_a_small_one(face_data: Path) -> None:
    from facetrain.data.align import YunetDetector

    source = open_faces([face_data / "lfw_original_sample.tar"])
    detect = YunetDetector(face_data / "models" / "face_detection_yunet.onnx")
    photograph = cv2.imdecode(np.frombuffer(source.read(0), np.uint8), cv2.IMREAD_COLOR_RGB)
    enlarged = cv2.resize(photograph, None, None, 6, 6)
    small, large = (detect(Photograph(image, source.names[0])) for image in (photograph, enlarged))
    published = points_from_file(face_data / "protocols" / "lfw_landmark.txt")(Photograph(photograph, source.names[0]))
    assert small is not None
    assert large is not None
    assert published is not None
    # In pixels of the small one, in which the face is 130 wide
    assert np.linalg.norm(large / 6 - small, axis=1).mean() < 3
    assert np.linalg.norm(large / 6 - published, axis=1).mean() < 5
