"""`facetrain export`: other programs compute what PyTorch does."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from people.conftest import make_run

import facetrain
from facetrain.cli import main
from facetrain.config import DataConfig
from facetrain.data.decode import present_face
from facetrain.models.pixels import FacePixels

needs_onnx = pytest.mark.skipif(
    any(not __import__("importlib.util").util.find_spec(name) for name in ("onnxscript", "onnxruntime")),
    reason="onnxscript or onnxruntime is not installed",
)


@pytest.mark.parametrize(
    "data",
    [
        DataConfig(image_px=56),
        DataConfig(image_px=40),
        DataConfig(image_px=112, colour="grey"),
        DataConfig(crop_px=100, image_px=50, colour="grey"),
        DataConfig(crop_px=96, image_px=32),
        DataConfig(crop_px=100, image_px=64),
    ],
    ids=lambda data: f"{data.crop_px}-{data.image_px}-{data.colour}",
)
def test_pixels_in_the_network_are_those_of_evaluation(data: DataConfig) -> None:
    faces = np.random.default_rng(0).integers(0, 256, (4, 112, 112, 3), dtype=np.uint8)
    expected = np.stack([present_face(face, data) for face in faces]).transpose(0, 3, 1, 2)
    levels = (FacePixels(data)(torch.from_numpy(faces)) + 1) * 127.5
    differ = np.abs(levels.round().numpy() - expected)
    assert differ.max() <= 1  # float32 sums that end at one half
    assert (differ > 0).mean() < 1e-3


def test_enlarging_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.image_px"):
        FacePixels(DataConfig(crop_px=50, image_px=56))


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("preprocess", [False, True])
def test_onnx_embeds_any_number_of_faces_as_the_run_does(
    synthetic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], preprocess: bool
) -> None:
    run = make_run(tmp_path / "run", data=DataConfig(crop_px=96, image_px=32))
    main(["export", str(run), *(["--preprocess"] if preprocess else [])])
    assert "differ from PyTorch's by" in capsys.readouterr().out
    pictures = sorted((synthetic / "faces" / "heldout").rglob("*.jpg"))[:7]
    ours, theirs = (facetrain.load(file).embed(pictures) for file in (run, run / "model.onnx"))
    assert np.abs(ours - theirs).max() <= 1e-4


@needs_onnx
@pytest.mark.slow
def test_lfw_of_an_exported_network_is_that_of_the_run(synthetic: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", data=DataConfig(crop_px=96, image_px=32))
    main(["export", str(run), "--out", str(tmp_path / "m.onnx")])
    faces, found = synthetic / "faces", []
    for number, checkpoint in enumerate((run, tmp_path / "m.onnx")):
        words: list[Any] = ["lfw", "--device", "cpu", "--checkpoint", checkpoint, "--images", faces / "heldout"]
        words += ["--pairs", faces / "heldout_pairs.txt", "--dataset", "drawn", "--out", tmp_path / str(number)]
        main([str(word) for word in words])
        found.append(json.loads((tmp_path / str(number) / "results.json").read_text())["verification"])
    assert found[0]["accuracy"] == found[1]["accuracy"]


def test_torch_export_embeds_any_number_of_faces(run: Path, tmp_path: Path) -> None:
    main(["export", str(run), "--format", "torch", "--out", str(tmp_path / "new" / "m.pt2")])
    exported = torch.export.load(tmp_path / "new" / "m.pt2").module()
    assert exported(torch.zeros(3, 3, 40, 40)).shape == (3, 16)


def test_a_folder_is_no_file_to_write(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", str(run), "--out", str(run)])
    assert f"--out: expected a file, {run} is a folder" in capsys.readouterr().err


@pytest.mark.parametrize("differences", [(0.0, 1e-3), (0.0, float("nan"))])
def test_an_export_that_differs_is_not_written(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    differences: tuple[float, float],
) -> None:
    found = iter(differences)
    monkeypatch.setattr("facetrain.export._difference", lambda *_: next(found))
    with pytest.raises(SystemExit):
        main(["export", str(run), "--format", "torch", "--out", str(tmp_path / "m.pt2")])
    assert "differ from PyTorch's" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
