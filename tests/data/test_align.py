from pathlib import Path

import cv2
import numpy as np
import pytest

from facetrain.data.align import (
    TEMPLATE,
    FaceAligner,
    YunetDetector,
    align_face,
    centre_crop,
    points_from_file,
    similarity,
)
from facetrain.data.decode import decode_photograph
from facetrain.data.sources import FaceSource, open_faces

LINE = "A/A_0001.jpg\t" + "\t".join(str(number) for point in TEMPLATE for number in point)


def png(image: np.ndarray) -> bytes:
    return bytes(cv2.imencode(".png", image)[1])


@pytest.mark.parametrize(("angle", "scale"), [(0.0, 1.0), (0.4, 0.3), (-1.2, 2.5), (3.0, 1.0)])
def test_a_turned_and_scaled_face_is_turned_back(angle: float, scale: float) -> None:
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = similarity(TEMPLATE @ turn.T + [70, -30])
    assert matrix is not None
    assert matrix[:, :2] == pytest.approx(np.linalg.inv(turn), abs=1e-6)
    assert (TEMPLATE @ turn.T + [70, -30]) @ matrix[:, :2].T + matrix[:, 2] == pytest.approx(TEMPLATE, abs=1e-4)


def test_one_misplaced_point_does_not_tilt_the_face() -> None:
    points = TEMPLATE.copy()
    points[2] += [25, -14]
    matrix = similarity(points)
    assert matrix == pytest.approx(np.eye(2, 3), abs=1e-3)


def test_points_at_one_place_determine_nothing() -> None:
    assert similarity(np.full((5, 2), 9.0)) is None


def test_an_aligned_face_stays_as_it_is() -> None:
    image = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    matrix = similarity(TEMPLATE)
    assert matrix is not None
    assert np.abs(align_face(image, matrix).astype(int) - image).max() <= 1


def test_the_centre_crop_is_the_middle_of_the_photograph() -> None:
    photograph = np.zeros((250, 300, 3), np.uint8)
    photograph[59:191, 84:216] = 200  # 132 px, 0.53 of 250
    assert (centre_crop(photograph) == 200).all()
    assert centre_crop(np.zeros((1, 1, 3), np.uint8)).shape == (112, 112, 3)


def test_a_face_that_is_not_found_is_counted_once() -> None:
    aligner = FaceAligner(lambda _, name: None if name.startswith("C") else TEMPLATE)
    photograph = png(np.full((250, 250, 3), 90, np.uint8))
    assert aligner.align(photograph, "A/A_0001.jpg").shape == (112, 112, 3)
    for name in ("C/C_0002.jpg", "C/C_0001.jpg", "C/C_0002.jpg"):
        assert (aligner.align(photograph, name) == 90).all()
    assert aligner.not_found == ("C/C_0001.jpg", "C/C_0002.jpg")
    with pytest.raises(ValueError, match="D: expected an image, got 4 bytes"):
        aligner.align(b"text", "D")


def test_points_are_looked_up_whatever_the_suffix(tmp_path: Path) -> None:
    (tmp_path / "points.txt").write_text(LINE + "\n\n")
    find = points_from_file(tmp_path / "points.txt")
    image = np.zeros((1, 1, 3), np.uint8)
    for name in ("A/A_0001.jpg", "A/A_0001.png", "lfw/A/A_0001"):
        points = find(image, name)
        assert points is not None
        assert points == pytest.approx(TEMPLATE)
    assert find(image, "B/A_0001.jpg") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A_0001 1 2 3", "points.txt:1: expected a name and five points as x y, got 'A_0001 1 2 3'"),
        (LINE.replace("38.2946", "left"), "points.txt:1: expected a name and five points"),
        (LINE.replace("38.2946", "nan"), "points.txt:1: expected a name and five points"),
        (f"{LINE}\n{LINE}", r"points.txt:2: A/A_0001\.jpg stands twice"),
        ("\n", "points.txt: expected a name and five points a line, got an empty file"),
    ],
)
def test_a_wrong_line_of_points_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "points.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        points_from_file(tmp_path / "points.txt")


def test_a_file_that_is_no_detector_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d.onnx").write_bytes(b"not a network")
    with pytest.raises(ValueError, match=r"d\.onnx: not a YuNet face detector"):
        YunetDetector(tmp_path / "d.onnx")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        YunetDetector(tmp_path / "nowhere.onnx")


@pytest.fixture
def originals(face_data: Path) -> FaceSource:
    return open_faces([face_data / "lfw_original_sample.tar"])


@pytest.fixture
def aligned(face_data: Path) -> FaceSource:
    return open_faces([face_data / f"lfw_aligned-0{part}.tar" for part in (0, 1)])


def test_published_points_give_the_aligned_faces(face_data: Path, originals: FaceSource, aligned: FaceSource) -> None:
    find = points_from_file(face_data / "protocols" / "lfw_landmark.txt")
    aligner = FaceAligner(find)
    errors = []
    for image in range(0, 600, 4):
        name = originals.names[image]
        expected = decode_photograph(aligned.read(aligned.names.index(name)), name)
        errors.append(np.abs(aligner.align(originals.read(image), name).astype(float) - expected).mean())
    assert aligner.not_found == ()
    # What is left is the JPEG that the aligned faces went through: of 256 grey levels
    assert np.mean(errors) < 1.6
    assert max(errors) < 3.5


def test_yunet_finds_the_published_points(
    face_data: Path, originals: FaceSource, capfd: pytest.CaptureFixture[str]
) -> None:
    find = points_from_file(face_data / "protocols" / "lfw_landmark.txt")
    detect = YunetDetector(face_data / "models" / "face_detection_yunet.onnx")
    distances_px = []
    for image in range(0, 600, 6):
        name = originals.names[image]
        photograph = decode_photograph(originals.read(image), name)
        published, found = find(photograph, name), detect(photograph, name)
        assert published is not None
        assert found is not None, name
        matrix, own = similarity(published), similarity(found)
        assert matrix is not None
        assert own is not None
        # Where the template's points come from by YuNet's alignment, seen in the pixels of the published one
        back = np.c_[TEMPLATE, np.ones(5)] @ np.linalg.inv(np.vstack([own, [0, 0, 1]])).T
        distances_px.append(np.linalg.norm(back @ matrix.T - TEMPLATE, axis=1).mean())
    assert np.mean(distances_px) < 3  # of 112
    assert max(distances_px) < 9
    assert capfd.readouterr().err == ""
