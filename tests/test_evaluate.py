"""What `facetrain lfw` takes besides an .npz: several networks, verification files, photographs to align."""

import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from facetrain.checkpoint.weights import save_weights
from facetrain.cli import main
from facetrain.config import Config, DataConfig, ModelConfig
from facetrain.data.align import TEMPLATE
from facetrain.data.decode import decode_face
from facetrain.data.sources import open_faces
from facetrain.evaluation.inputs import unit_vectors
from facetrain.models import build_backbone
from facetrain.models.onnx_backbone import OnnxInput
from facetrain.networks import EmbedOptions, embed_all, network_sha256, open_network
from facetrain.world import World, start_world


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two untrained networks that see different pixels."""
    folders = []
    for seed, px, colour in ((0, 32, "rgb"), (1, 48, "grey")):
        folder = tmp_path_factory.mktemp("run")
        data = DataConfig(image_px=px, colour=colour)
        config = Config(data=data, model=ModelConfig(name="casianet", embedding_dim=16, norm="none"))
        torch.manual_seed(seed)
        backbone = build_backbone(config.model, channels=config.data.channels, image_px=px)
        save_weights(dict(backbone.state_dict()), config, folder)
        folders.append(folder)
    return folders[0], folders[1]


@pytest.fixture
def world() -> Any:
    with start_world("cpu", 60.0) as world:
        yield world


def lfw(*words: str | Path) -> None:
    main(["lfw", "--device", "cpu", *map(str, words)])


def heldout(synthetic: Path) -> list[str | Path]:
    faces = synthetic / "faces"
    return ["--images", faces / "heldout", "--pairs", faces / "heldout_pairs.txt", "--dataset", "drawn"]


def test_embeddings_of_several_networks_stand_side_by_side(
    synthetic: Path, runs: tuple[Path, Path], world: World
) -> None:
    faces = open_faces([synthetic / "faces" / "heldout"])
    names = faces.names[:7]
    networks = [open_network(run, OnnxInput()) for run in runs]

    def decode(image: int, data: DataConfig) -> Any:
        return decode_face(faces.read(image), data, names[image])

    both = embed_all(networks, decode, names, EmbedOptions(), world)
    each = [unit_vectors(names, embed_all([network], decode, names, EmbedOptions(), world)) for network in networks]
    assert both.shape == (7, 32)
    assert np.array_equal(both, np.concatenate(each, axis=1))
    assert np.linalg.norm(both[:, 16:], axis=1) == pytest.approx(np.ones(7), abs=1e-6)


def test_networks_of_different_widths_make_no_ensemble(
    synthetic: Path, runs: tuple[Path, Path], world: World, tmp_path: Path
) -> None:
    faces = open_faces([synthetic / "faces" / "heldout"])
    config = Config(data=DataConfig(image_px=32), model=ModelConfig(name="casianet", embedding_dim=8, norm="none"))
    save_weights(dict(build_backbone(config.model, channels=3, image_px=32).state_dict()), config, tmp_path)
    networks = [open_network(run, OnnxInput()) for run in (runs[0], tmp_path)]

    def decode(image: int, data: DataConfig) -> Any:
        pytest.fail("embedded before widths were compared")

    with pytest.raises(ValueError, match=rf"{tmp_path}: expected embeddings of 16 numbers, as of {runs[0]}, got 8"):
        embed_all(networks, decode, faces.names[:3], EmbedOptions(), world)


def test_retrieval_takes_an_ensemble(synthetic: Path, runs: tuple[Path, Path], tmp_path: Path) -> None:
    images = ("--images", str(synthetic / "faces" / "heldout"), "--clusterings", "0", "--device", "cpu")
    figures = []
    for name, checkpoints in (("first", runs[:1]), ("both", runs)):
        main(["retrieval", "--checkpoint", *map(str, checkpoints), *images, "--out", str(tmp_path / name)])
        figures.append(json.loads((tmp_path / name / "results.json").read_text())["retrieval"])
    assert figures[0]["items"] == figures[1]["items"]
    assert figures[0]["map_at_r"] != figures[1]["map_at_r"]


@pytest.mark.parametrize(("flag", "expected"), [("--recall-at", "recall_at"), ("--negatives", "negatives")])
def test_a_depth_that_the_set_has_not_is_refused_before_embedding(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, expected: str
) -> None:
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"embedding would fail")
    words = ["retrieval", "--checkpoint", runs[0], "--images", tmp_path, flag, "1000", "--device", "cpu"]
    with pytest.raises(SystemExit):
        main([*map(str, words), "--out", str(tmp_path / "out")])
    assert f"{expected}: expected 1 to " in capsys.readouterr().err


def test_the_command_takes_several_checkpoints(synthetic: Path, runs: tuple[Path, Path], tmp_path: Path) -> None:
    lfw("--checkpoint", *runs, *heldout(synthetic), "--out", tmp_path / "both")
    lfw("--checkpoint", runs[0], *heldout(synthetic), "--out", tmp_path / "first")
    both, first = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("both", "first"))
    assert both["closed-full"]["probes"] == first["closed-full"]["probes"]
    assert both["verification"] != first["verification"]


def test_a_verification_file_gives_the_figures_of_its_pairs(
    synthetic: Path, runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faces = open_faces([synthetic / "faces" / "heldout"])
    row = {Path(name).stem: i for i, name in enumerate(faces.names)}
    _, *lines = (synthetic / "faces" / "heldout_pairs.txt").read_text().splitlines()
    images, is_genuine = [], []
    for line in lines:
        words = line.split()
        a, i, b, j = (words[0], words[1], words[0], words[2]) if len(words) == 3 else words
        images += [faces.read(row[f"{name}_{int(number):04d}"]) for name, number in ((a, i), (b, j))]
        is_genuine.append(a == b)
    (tmp_path / "drawn.bin").write_bytes(pickle.dumps((images, is_genuine)))
    lfw("--checkpoint", runs[0], "--bin", tmp_path / "drawn.bin", "--out", tmp_path / "bin")
    lfw("--checkpoint", runs[0], *heldout(synthetic), "--out", tmp_path / "lists")
    of_bin, of_lists = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("bin", "lists"))
    assert list(of_bin) == ["verification", "thresholds", "network_sha256"]
    assert of_bin["network_sha256"] == network_sha256(runs[0])
    assert of_bin["verification"] == pytest.approx(of_lists["verification"])
    assert f"drawn: {len(images):,} images, embeddings 16 wide" in capsys.readouterr().out


def test_a_verification_file_without_impostors_is_named(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = bytes(cv2.imencode(".png", np.random.default_rng(0).integers(0, 255, (112, 112, 3)))[1])
    (tmp_path / "same.bin").write_bytes(pickle.dumps(([image] * 20, [True] * 10)))
    with pytest.raises(SystemExit):
        lfw("--checkpoint", runs[0], "--bin", tmp_path / "same.bin", "--out", tmp_path / "out")
    assert "same.bin: expected genuine and impostor pairs, got 10 genuine of 10" in capsys.readouterr().err


def test_file_names_that_do_not_tell_who_it_is_are_refused(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = bytes(cv2.imencode(".jpg", np.zeros((112, 112, 3), np.uint8))[1])
    for person in ("Ann", "Bo"):
        (tmp_path / "set" / person).mkdir(parents=True)
        for number in (1, 2):
            (tmp_path / "set" / person / f"img_{number:06d}.jpg").write_bytes(image)
    words = ["--checkpoint", runs[0], "--images", tmp_path / "set", "--dataset", "mine", "--out", tmp_path / "out"]
    with pytest.raises(SystemExit):
        lfw(*words)
    assert "Bo/img_000001.jpg: expected a file name that tells who it is, Bo_0001.jpg" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("lfw --embeddings x.npz --detector y.onnx", "--detector: has no effect beside --embeddings"),
        ("lfw --embeddings x.npz --no-mirror", "--no-mirror: has no effect beside --embeddings"),
        ("lfw --checkpoint RUN --bin x.bin --landmarks p.txt", "--landmarks: has no effect beside --bin"),
        ("lfw --checkpoint RUN --bin x.bin --draws 3", "--draws: has no effect beside --bin"),
        ("retrieval --embeddings x.npz --onnx-colour bgr", "--onnx-colour: has no effect beside --embeddings"),
        ("compare x.npz y.npz --no-mirror", "--no-mirror: has no effect beside two .npz files"),
    ],
)
def test_flags_without_effect_are_refused(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*words.split(), "--out", str(tmp_path / "out")])
    assert message in capsys.readouterr().err


def test_a_run_folder_takes_no_other_results(
    synthetic: Path, runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    (tmp_path / "file").touch()
    for out, message in (("run", "is a run folder"), ("file", "expected a folder that can be written to")):
        with pytest.raises(SystemExit):
            lfw("--checkpoint", runs[0], *heldout(synthetic), "--out", tmp_path / out)
        assert message in capsys.readouterr().err


def test_photographs_are_aligned_and_what_is_not_found_is_counted(
    synthetic: Path, runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faces = open_faces([synthetic / "faces" / "heldout"])
    lines = []
    for image, name in enumerate(faces.names):
        face = cv2.imdecode(np.frombuffer(faces.read(image), np.uint8), cv2.IMREAD_COLOR)
        photograph = np.zeros((250, 250, 3), np.uint8)
        left, top = 30 + image % 50, 60 - image % 30
        photograph[top : top + 112, left : left + 112] = face
        (tmp_path / "photographs" / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str((tmp_path / "photographs" / name).with_suffix(".png")), photograph)
        points = np.add(TEMPLATE, [left, top]).ravel().tolist()
        lines.append("\t".join([name, *map(str, points)]))
    with tarfile.open(tmp_path / "photographs.tar", "w") as tar:
        tar.add(tmp_path / "photographs", arcname="photographs")
    (tmp_path / "points.txt").write_text("\n".join(lines))
    (tmp_path / "fewer.txt").write_text("\n".join(lines[2:]))
    lists = heldout(synthetic)[2:]
    for name, points in (("all", "points.txt"), ("fewer", "fewer.txt")):
        images = ["--images", tmp_path / "photographs.tar", "--landmarks", tmp_path / points]
        lfw("--checkpoint", runs[0], *images, *lists, "--out", tmp_path / name)
    lfw("--checkpoint", runs[0], *heldout(synthetic), "--out", tmp_path / "aligned")
    results = {n: json.loads((tmp_path / n / "results.json").read_text()) for n in ("all", "fewer", "aligned")}
    assert results["all"].pop("alignment") == {"images": len(lines), "not_found": 0}
    assert results["fewer"]["alignment"] == {"images": len(lines), "not_found": 2}
    assert "alignment" not in results["aligned"]
    assert results["all"]["closed-full"] == results["aligned"]["closed-full"]
    out = capsys.readouterr().out
    assert f"faces not found, centre taken instead: 2 of {len(lines)}: {faces.names[0][:-4]}" in out


@pytest.mark.slow
def test_insightfaces_file_and_yunet_on_real_faces(face_data: Path, runs: tuple[Path, Path], tmp_path: Path) -> None:
    lfw("--checkpoint", runs[0], "--bin", face_data / "interop" / "lfw_600pairs.bin", "--out", tmp_path / "bin")
    results = json.loads((tmp_path / "bin" / "results.json").read_text())
    assert 0.5 < results["verification"]["accuracy"] < 0.9
    images = ["--images", face_data / "lfw_original_sample.tar"]
    detector = ["--detector", face_data / "models" / "face_detection_yunet.onnx"]
    lfw("--checkpoint", runs[0], *images, *detector, "--dataset", "sample", "--out", tmp_path / "yunet")
    results = json.loads((tmp_path / "yunet" / "results.json").read_text())
    assert results["alignment"]["images"] == 600
    assert results["alignment"]["not_found"] <= 3
