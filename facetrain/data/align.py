"""From a photograph to an aligned face: five points, a similarity transform, the usual 112x112 template.

Points are x and y in pixels, ordered as seen in the picture: left eye, right eye, nose, left and right corner of the
mouth.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from facetrain.data.manifest import ALIGNED_PX
from facetrain.data.photograph import REDUCTIONS, Image, Photograph, scaled

Points = NDArray[np.float64]
"""float64 [5, 2], x and y in pixels."""
FindPoints = Callable[[Photograph], Points | None]
"""The five points of its face, in its full size; None where there is none."""

MAX_DETECTION_PX = 640
"""Longer side of the picture in which YuNet looks for faces; a larger photograph is shrunk to it."""
TEMPLATE: Points = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
"""Where the five points belong in a face of 112x112. Source: ArcFace (Deng et al., CVPR 2019), as in InsightFace."""

CENTRE_FRACTION = 0.53
"""Side of the centre crop of a photograph whose face isn't found, as a fraction of its shorter side.

The template covers as much of LFW's photographs (median of their published landmarks), whose faces are in the middle.
"""


class FaceAligner:
    """Cuts the face out of photographs, and remembers those in which it wasn't found. One thread at a time."""

    def __init__(self, find: FindPoints) -> None:
        """Take points from `find`."""
        self._find = find
        self._not_found: set[str] = set()

    @property
    def not_found(self) -> tuple[str, ...]:
        """Names of the photographs whose centre was taken instead, sorted."""
        return tuple(sorted(self._not_found))

    def forget(self) -> None:
        """Begin `not_found` anew."""
        self._not_found.clear()

    def align(self, photograph: Photograph) -> Image:
        """Return the aligned face, uint8 [112, 112, 3], RGB.

        Raises:
            ValueError: The photograph is no image, or OpenCV can't align it; the message names it.
        """
        try:
            points = self._find(photograph)
            to_template = similarity(points) if points is not None else None
            if to_template is None:
                self._not_found.add(photograph.name)
                return centre_crop(photograph.pixels())
            return align_face(photograph, to_template)
        except cv2.error as error:
            raise ValueError(f"{photograph.name}: {why_not_aligned(error)}") from None


def align_face(photograph: Photograph, to_template: NDArray[np.float64]) -> Image:
    """Move a face to the template by the matrix of `similarity`; what lies outside of the photograph is black.

    A face of twice the template's size or more is taken from a reduced photograph, whose pixels are averages:
    interpolating among single ones would alias.
    """
    scale = float(np.hypot(*to_template[:, 0]))
    reduction = max((reduction for reduction in REDUCTIONS if reduction * scale <= 1), default=1)
    image = photograph.pixels(reduction)
    turn, shift = to_template[:, :2], to_template[:, 2:]
    # The middle of a pixel is (p + 1/2) of its side from the corner, in either size.
    reduced = np.hstack([turn * reduction, shift + turn.sum(axis=1, keepdims=True) * (reduction - 1) / 2])
    return cv2.warpAffine(  # type: ignore[return-value]
        image, reduced, (ALIGNED_PX, ALIGNED_PX), flags=cv2.INTER_LINEAR, borderValue=0
    )


def centre_crop(photograph: Image) -> Image:
    """Return the middle of a photograph as large as a face of LFW stands there, uint8 [112, 112, 3]."""
    height, width = photograph.shape[:2]
    side = max(round(CENTRE_FRACTION * min(height, width)), 1)
    middle = photograph[(height - side) // 2 :, (width - side) // 2 :][:side, :side]
    method = cv2.INTER_AREA if side > ALIGNED_PX else cv2.INTER_LINEAR
    return cv2.resize(middle, (ALIGNED_PX, ALIGNED_PX), interpolation=method)  # type: ignore[return-value]


def why_not_aligned(error: cv2.error) -> str:
    """Return in one line why OpenCV couldn't align an image."""
    return f"can't be aligned: {' '.join(str(error).split())}"


def similarity(points: Points) -> NDArray[np.float64] | None:
    """Return the rotation, scale and shift, float64 [2, 3], that bring five points to the template.

    By least median of squares (cv2.LMEDS) and then least squares over the points that fit, so that one misplaced
    point doesn't tilt the face. None where the points determine nothing, as where all are equal.
    """
    matrix, _ = cv2.estimateAffinePartial2D(points, TEMPLATE, method=cv2.LMEDS)
    return None if matrix is None else np.asarray(matrix, dtype=np.float64)


def points_from_file(file: Path) -> FindPoints:
    """Take the points of images from a list: a line is a name such as `Name/Name_0001.jpg`, then x and y five times.

    Images are looked up by folder and name without the suffix; one that isn't listed has no face.

    Raises:
        ValueError: A malformed line, by its number, or a name that stands twice.
    """
    points: dict[str, Points] = {}
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected a text file: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, *words = line.strip().rsplit(maxsplit=10)
        numbers = _finite(words)
        # A folder's name may hold blanks; a number after a blank is one too many rather than a part of the name.
        if numbers is None or len(numbers) != 10 or _finite(name.split()[1:][-1:]):
            raise ValueError(f"{file}:{number}: expected a name and five points as x y, got {line.strip()!r}")
        key = _image_key(name)
        if key in points:
            raise ValueError(f"{file}:{number}: {name} stands twice")
        points[key] = np.array(numbers).reshape(5, 2)
    if not points:
        raise ValueError(f"{file}: expected a name and five points a line, got an empty file")
    return lambda photograph: points.get(_image_key(photograph.name))


class YunetDetector:
    """Finds the five points with YuNet; of several faces it takes a large one near the middle."""

    def __init__(self, file: Path, *, min_score: float = 0.6) -> None:
        """Open the network, `face_detection_yunet.onnx`.

        Raises:
            ValueError: The file is no network of that kind.
            FileNotFoundError: There is no such file.
        """
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such detector")
        logging: Any = cv2.utils.logging
        level = logging.getLogLevel()
        logging.setLogLevel(logging.LOG_LEVEL_SILENT)  # OpenCV 5 warns of a target that nobody chose
        try:
            self._network: Any = cv2.FaceDetectorYN.create(str(file), "", (320, 320), min_score)
            self(Photograph(np.zeros((320, 320, 3), np.uint8), ""))
        except (cv2.error, SystemError) as error:
            raise ValueError(f"{file}: not a YuNet face detector: {' '.join(str(error).split())}") from None
        finally:
            logging.setLogLevel(level)

    def __call__(self, photograph: Photograph) -> Points | None:
        """Return the five points of the photograph's main face; None where there is none."""
        reduction = photograph.reduction_to(MAX_DETECTION_PX)
        reduced = photograph.pixels(reduction)
        picture = _shrunk(reduced)
        height, width = picture.shape[:2]
        scale = max(height, width) / max(reduced.shape[:2]) / reduction
        self._network.setInputSize((width, height))
        _, faces = self._network.detect(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        if faces is None:
            return None
        # Area less twice the squared distance from the middle, by which InsightFace chooses among faces.
        middle = faces[:, :2] + faces[:, 2:4] / 2 - np.array([width, height]) / 2
        main = faces[np.argmax(faces[:, 2] * faces[:, 3] - 2 * np.square(middle).sum(axis=1))]
        return (main[4:14].reshape(5, 2).astype(np.float64) + 0.5) / scale - 0.5  # type: ignore[no-any-return]


def _shrunk(photograph: Image) -> Any:
    """Bring the longer side to MAX_DETECTION_PX if it is longer.

    By halves as far as they go, which average four pixels each in a tenth of the time that INTER_AREA takes for other
    factors; what is left, a factor of less than two, by INTER_LINEAR. Points stay as near to published ones.
    """
    picture: Any = photograph
    while max(picture.shape[:2]) >= 2 * MAX_DETECTION_PX:
        picture = scaled(picture, 0.5, cv2.INTER_AREA)
    scale = MAX_DETECTION_PX / max(picture.shape[:2])
    return picture if scale >= 1 else scaled(picture, scale, cv2.INTER_LINEAR)


def check_detector(file: Path) -> None:
    """Open YuNet and close it again, without threads, which a later fork would lose; raises as `YunetDetector`."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)
    try:
        YunetDetector(file)
    finally:
        cv2.setNumThreads(threads)


def _image_key(name: str) -> str:
    """Return the last folder and the name without its suffix."""
    *folders, image = name.replace("\\", "/").split("/")
    return "/".join([*folders[-1:], image.rsplit(".", 1)[0]])


def _finite(words: Sequence[str]) -> list[float] | None:
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        return None
    return numbers if np.isfinite(numbers).all() else None
