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
from facetrain.data.photograph import Photograph
from facetrain.data.sources import FaceSource, open_faces

LINE = "A/A_0001.jpg\t" + "\t".join(str(number) for point in TEMPLATE for number in point)


def encoded(image: np.ndarray, kind: str = ".png") -> bytes:
    return bytes(cv2.imencode(kind, image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 98])[1])


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
    assert np.abs(align_face(Photograph(image, "A"), matrix).astype(int) - image).max() <= 1


@pytest.mark.parametrize("reduction", [2, 4, 8])
@pytest.mark.parametrize("kind", ["pixels", ".jpg", ".png"])
def test_a_large_face_is_taken_from_averages_at_the_same_place(kind: str, reduction: int) -> None:
    rng = np.random.default_rng(0)
    face = cv2.GaussianBlur(rng.integers(0, 256, (112, 112, 3), dtype=np.uint8), (0, 0), 6)
    face = cv2.normalize(face, None, 0, 255, cv2.NORM_MINMAX)
    large = np.kron(face, np.ones((reduction, reduction, 1), np.uint8))
    source = (
        large if kind == "pixels" else bytes(cv2.imencode(kind, large[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 98])[1])
    )
    photograph = Photograph(source, "A")
    to_template = similarity((TEMPLATE + 0.5) * reduction - 0.5)
    assert to_template is not None
    aligned = align_face(photograph, to_template)
    assert photograph.pixels(reduction).shape == face.shape
    assert np.abs(aligned.astype(int) - face).mean() < (2 if kind == ".jpg" else 0.5)  # a shift by a pixel gives 9


def test_a_reduced_png_is_of_averages_too() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8)
    file = encoded(pixels, ".png")
    for reduction in (1, 2, 4, 8):
        expected = pixels.reshape(96 // reduction, reduction, 64 // reduction, reduction, 3).mean(axis=(1, 3))
        assert np.abs(Photograph(file, "A").pixels(reduction) - expected).max() <= 0.5


def test_a_photograph_is_reduced_as_far_as_it_stays_large_enough() -> None:
    sides_px = {640: 1, 1279: 1, 1280: 2, 2559: 2, 2560: 4, 5120: 8, 40_960: 8}
    for side_px, reduction in sides_px.items():
        assert Photograph(np.zeros((3, side_px, 3), np.uint8), "A").reduction_to(640) == reduction
    assert Photograph(b"no image", "A").reduction_to(640) == 1


def test_a_thin_photograph_keeps_a_pixel_of_its_short_side(face_data: Path) -> None:
    detect = YunetDetector(face_data / "models" / "face_detection_yunet.onnx")
    for kind, height, width in ((".jpg", 16, 60_000), (".png", 20, 30_000), (".png", 700, 1), (".png", 2000, 3)):
        photograph = Photograph(encoded(np.full((height, width, 3), 90, np.uint8), kind), "A")
        assert detect(photograph) is None
        assert min(photograph.pixels(8).shape[:2]) >= 1
        assert (FaceAligner(detect).align(photograph) == 90).all()


def test_a_photograph_that_opencv_cannot_align_is_named() -> None:
    photograph = Photograph(np.zeros((112, 112, 3), np.uint8), "A/A_0001.jpg")
    with pytest.raises(ValueError, match=r"^A/A_0001\.jpg: can't be aligned: OpenCV.*$"):
        FaceAligner(lambda _: TEMPLATE[:4]).align(photograph)


def test_the_centre_crop_is_the_middle_of_the_photograph() -> None:
    photograph = np.zeros((250, 300, 3), np.uint8)
    photograph[59:191, 84:216] = 200  # 132 px, 0.53 of 250
    assert (centre_crop(photograph) == 200).all()
    assert centre_crop(np.zeros((1, 1, 3), np.uint8)).shape == (112, 112, 3)


def test_a_face_that_is_not_found_is_counted_once() -> None:
    aligner = FaceAligner(lambda photograph: None if photograph.name.startswith("C") else TEMPLATE)
    photograph = encoded(np.full((250, 250, 3), 90, np.uint8))
    assert aligner.align(Photograph(photograph, "A/A_0001.jpg")).shape == (112, 112, 3)
    for name in ("C/C_0002.jpg", "C/C_0001.jpg", "C/C_0002.jpg"):
        assert (aligner.align(Photograph(photograph, name)) == 90).all()
    assert aligner.not_found == ("C/C_0001.jpg", "C/C_0002.jpg")
    aligner.forget()
    assert aligner.not_found == ()
    with pytest.raises(ValueError, match="D: expected an image, got 4 bytes"):
        aligner.align(Photograph(b"text", "D"))


def test_points_are_looked_up_whatever_the_suffix(tmp_path: Path) -> None:
    (tmp_path / "points.txt").write_text(LINE + "\n\n")
    find = points_from_file(tmp_path / "points.txt")
    image = np.zeros((1, 1, 3), np.uint8)
    for name in ("A/A_0001.jpg", "A/A_0001.png", "lfw/A/A_0001"):
        points = find(Photograph(image, name))
        assert points is not None
        assert points == pytest.approx(TEMPLATE)
    assert find(Photograph(image, "B/A_0001.jpg")) is None


def test_names_in_a_list_of_points_may_hold_blanks(tmp_path: Path) -> None:
    (tmp_path / "points.txt").write_text(LINE.replace("A/A_0001", "John Smith/1"))
    find = points_from_file(tmp_path / "points.txt")
    assert find(Photograph(np.zeros((1, 1, 3), np.uint8), "John Smith/1.png")) is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A_0001 1 2 3", "points.txt:1: expected a name and five points as x y, got 'A_0001 1 2 3'"),
        (LINE.replace("38.2946", "left"), "points.txt:1: expected a name and five points"),
        (f"{LINE} 1", "points.txt:1: expected a name and five points"),
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
        expected = Photograph(aligned.read(aligned.names.index(name)), name).pixels()
        errors.append(np.abs(aligner.align(Photograph(originals.read(image), name)).astype(float) - expected).mean())
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
        photograph = Photograph(originals.read(image), name)
        published, found = find(photograph), detect(photograph)
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
