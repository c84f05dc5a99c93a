"""`facetrain.load(run).embed(images)`."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

import facetrain
from facetrain.checkpoint.weights import load_backbone
from facetrain.data.sources import open_faces
from facetrain.evaluation.inputs import unit_vectors
from facetrain.evaluation.judge import embed_faces
from facetrain.world import World


def pictures(synthetic: Path, count: int) -> list[Path]:
    return sorted((synthetic / "faces" / "heldout").rglob("*.jpg"))[:count]


def test_embeddings_are_those_by_which_training_evaluates(synthetic: Path, run: Path) -> None:
    faces = open_faces([synthetic / "faces" / "heldout"])
    backbone, config = load_backbone(run)
    expected = embed_faces(faces, backbone, config, World(), mirror=True, progress=False)
    paths = [synthetic / "faces" / "heldout" / name for name in faces.names]
    network = facetrain.load(run)
    np.testing.assert_array_equal(network.embed(paths, unit=False), expected)
    unit = network.embed(paths)
    assert unit.dtype == np.float32
    assert np.abs(unit - unit_vectors(faces.names, expected)).max() <= 1e-6


def test_paths_bytes_and_pixels_are_the_same_image(synthetic: Path, run: Path) -> None:
    network, (path, *_) = facetrain.load(str(run)), pictures(synthetic, 1)
    pixels = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    from_path, from_text, from_bytes, from_pixels = network.embed([path, str(path), path.read_bytes(), pixels])
    for other in (from_text, from_bytes, from_pixels):
        np.testing.assert_array_equal(other, from_path)


def test_a_photograph_without_a_face_is_cut_in_the_middle(face_data: Path, run: Path) -> None:
    network = facetrain.load(run, detector=face_data / "models" / "face_detection_yunet.onnx")
    empty = np.full((200, 300, 3), 128, np.uint8)
    middle = network.embed([empty[47:153, 97:203]])
    assert network.aligner is not None
    np.testing.assert_allclose(network.embed([empty]), middle, atol=1e-6)
    assert network.aligner.not_found == ("image 0",)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([], "one or more"),
        ([b"no image"], "image 0: expected an image"),
        ([np.zeros((4, 4), np.uint8)], r"image 0: expected uint8 \[H, W, 3\], got uint8 \[4, 4\]"),
        ([np.zeros((4, 4, 3), np.float32)], "got float32"),
    ],
)
def test_what_is_no_image_is_named(run: Path, images: list[bytes], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        facetrain.load(run).embed(images)


def test_a_run_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        facetrain.load(tmp_path / "nowhere")


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, facetrain; print(sorted({'torch', 'numpy', 'yaml'} & set(sys.modules)), facetrain.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[] ['Embedder', 'load']\n"
