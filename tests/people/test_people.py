"""`facetrain index` and `facetrain search`, as a user types them."""

import itertools
import json
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from people.conftest import make_run

from facetrain.cli import main
from facetrain.evaluation.embeddings_npz import load_embeddings_npz
from facetrain.gallery import Gallery
from facetrain.people import Decision


def run_main(*words: str | Path) -> None:
    main([str(word) for word in words])


def test_people_are_added_found_and_removed(
    synthetic: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    people = synthetic / "faces" / "heldout"
    first, *rest = sorted(path for path in people.iterdir() if path.is_dir())
    gallery, out = tmp_path / "gallery", tmp_path / "out"
    run_main("index", gallery, "--checkpoint", run, "--images", people, "--device", "cpu")
    (first / "broken.jpg").write_bytes(b"no image")
    try:
        run_main("index", gallery, "--images", people, "--device", "cpu")  # once more: nothing is doubled
    finally:
        (first / "broken.jpg").unlink()
    stored = Gallery.load(gallery)
    assert stored.persons == tuple(sorted(path.name for path in [first, *rest]))
    assert len(stored.names) == len(list(people.rglob("*.jpg")))
    assert "broken.jpg" in (gallery / "left_out.txt").read_text()

    results = tmp_path / "results.json"
    thresholds = {"thresholds": {"open-best-rowden": {"1e-2": 0.9}}}
    results.write_text(json.dumps(thresholds | {"network_sha256": "another"}))
    capsys.readouterr()
    words = ("--images", first, "--far", "0.01", "--results", results, "--device", "cpu")
    run_main("search", gallery, *words, "--top", "2", "--out", out)
    printed = capsys.readouterr().out
    assert "threshold 0.9000, of open-best-rowden at FAR 0.01" in printed
    assert f"warning: {results} is of other weights than the gallery's" in printed
    for row in json.loads((out / "search.json").read_text())["images"]:
        assert row["is_known"] is True
        assert row["matches"][0]["person"] == first.name
        assert row["matches"][0]["score"] == pytest.approx(1, abs=1e-5)
    page = (out / "search.html").read_text()
    assert page.count("<img") == 3 * len(list(first.iterdir()))

    run_main("index", gallery, "--remove", first.name)
    capsys.readouterr()
    (tmp_path / "no.jpg").write_bytes(b"no image")
    run_main("search", gallery, "--images", first, tmp_path / "no.jpg", "--threshold", "0.9999", "--device", "cpu")
    printed = capsys.readouterr().out
    assert f"left out: {tmp_path}/no.jpg: expected an image" in printed
    with pytest.raises(SystemExit):
        run_main("search", gallery, "--images", tmp_path / "no.jpg", "--device", "cpu")
    assert "none of the 1 images can be used" in capsys.readouterr().err
    assert "unknown" in printed
    assert f"  {first.name} " not in printed


def test_embeddings_of_others_make_a_gallery_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = np.eye(4, dtype=np.float16)
    np.savez(tmp_path / "e.npz", names=np.array(["Ann_0001", "Ann_0002", "Bob/1.jpg", "x/Cid/1.jpg"]), embeddings=rows)
    run_main("index", tmp_path / "g", "--embeddings", tmp_path / "e.npz")
    assert "4 images of 3 people" in capsys.readouterr().out
    run_main("search", tmp_path / "g", "--embeddings", tmp_path / "e.npz", "--top", "1", "--threshold", "0.5")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-2:] for line in lines[:4]] == [[p, "1.000"] for p in ("Ann", "Ann", "Bob", "Cid")]


def test_the_terminal_shows_some_of_many_faces_where_a_file_has_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = np.array([f"Ann_{number:04}" for number in range(1, 26)])
    np.savez(tmp_path / "e.npz", names=names, embeddings=np.ones((25, 4), np.float32))
    run_main("index", tmp_path / "g", "--embeddings", tmp_path / "e.npz")
    capsys.readouterr()
    run_main("search", tmp_path / "g", "--embeddings", tmp_path / "e.npz")
    assert capsys.readouterr().out.count("Ann 1.000") == 25
    run_main("search", tmp_path / "g", "--embeddings", tmp_path / "e.npz", "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    assert printed.count("Ann 1.000") == 20
    assert f"... and 5 more in {tmp_path}/out/search.json" in printed
    assert len(json.loads((tmp_path / "out" / "search.json").read_text())["images"]) == 25


def test_what_takes_the_place_of_something_or_of_somebody_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    composed, decomposed = "Jos\u00e9", "Jose\u0301"
    for name, person in (("a", composed), ("b", decomposed)):
        np.savez(tmp_path / f"{name}.npz", names=np.array([f"{person}/1.jpg"]), embeddings=np.ones((1, 4), np.float32))
    for file in ("a.npz", "a.npz", "b.npz"):
        run_main("index", tmp_path / "g", "--embeddings", tmp_path / file)
    printed = capsys.readouterr().out
    assert printed.count("images replaced by those of the same name: 1, such as Jos") == 1
    assert printed.count("are one name in two Unicode forms") == 1
    run_main("index", tmp_path / "g", "--remove", composed)
    assert Gallery.load(tmp_path / "g").names == ()


def test_embeddings_say_which_weights_made_them(
    synthetic: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = synthetic / "faces" / "heldout"
    other = make_run(tmp_path / "other", seed=1)
    for name, network in (("a", run), ("b", other)):
        run_main("embed", images, "--checkpoint", network, "--device", "cpu", "--out", tmp_path / f"{name}.npz")
    names, embeddings = load_embeddings_npz(tmp_path / "a.npz")
    np.savez(tmp_path / "c.npz", names=np.array(names), embeddings=embeddings)
    run_main("index", tmp_path / "g", "--embeddings", tmp_path / "a.npz")
    for words in (("--embeddings", tmp_path / "b.npz"), ("--images", images, "--checkpoint", other, "--device", "cpu")):
        with pytest.raises(SystemExit):
            run_main("search", tmp_path / "g", *words)
        assert "other weights than" in capsys.readouterr().err
    run_main("search", tmp_path / "g", "--images", images, "--checkpoint", run, "--device", "cpu")
    assert "warning" not in capsys.readouterr().out
    run_main("search", tmp_path / "g", "--embeddings", tmp_path / "c.npz")
    assert "c.npz doesn't say which network it is of" in capsys.readouterr().out


def test_weights_in_a_run_folder_are_judged_by_its_results(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"thresholds": {"open-best-rowden": {"1e-2": 0.9}}}))
    for network in (tmp_path, tmp_path / "model.safetensors"):
        assert Decision(far=0.01).resolve(Gallery(), network)[0] == 0.9


def test_other_weights_than_the_gallerys_are_refused(
    synthetic: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = sorted((synthetic / "faces" / "heldout").iterdir())[0]
    run_main("index", tmp_path / "g", "--checkpoint", run, "--images", first.parent, "--device", "cpu", "--no-pictures")
    other = make_run(tmp_path / "other", seed=1)
    with pytest.raises(SystemExit):
        run_main("search", tmp_path / "g", "--checkpoint", other, "--images", first, "--device", "cpu")
    assert "has other weights" in capsys.readouterr().err


def test_a_network_of_another_width_than_the_gallerys_is_refused_before_it_embeds(
    synthetic: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "e.npz", names=np.array(["a/1.jpg", "b/1.jpg"]), embeddings=np.eye(2, 5, dtype=np.float32))
    run_main("index", tmp_path / "g", "--embeddings", tmp_path / "e.npz")
    images = synthetic / "faces" / "heldout"
    with pytest.raises(SystemExit):
        run_main("search", tmp_path / "g", "--checkpoint", run, "--images", images, "--device", "cpu")
    captured = capsys.readouterr()
    assert "expected embeddings of 5 numbers, as in the gallery, got 16" in captured.err
    assert "embed " not in captured.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["index", "g"], "no gallery in it"),
        (["search", "g", "--images", "x"], "no gallery in it"),
        (["search", "g"], "expected --images or --embeddings"),
        (["search", "g", "--images", "x", "--threshold", "1", "--far", "1"], "expected one of them"),
        (["search", "g", "--images", "x", "--results", "r"], "go with --far"),
        (["search", "g", "--images", "x", "--top", "0"], "--top: expected 1 or more"),
        (["search", "g", "--images", "x", "--threshold", "40"], "--threshold: expected a cosine, -1 to 1, got 40"),
        (["search", "g", "--embeddings", "e", "--checkpoint", "r"], "--checkpoint: has no effect beside --embeddings"),
        (["index", "g", "--embeddings", "e", "--detector", "d"], "--detector: has no effect beside --embeddings"),
    ],
)
def test_what_cannot_be_done_is_said(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_gallery_gives_a_threshold_where_no_evaluation_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 8))
    rows[1::2] = rows[::2] + 0.1 * rng.normal(size=(20, 8))  # two images a person
    names = np.array([f"{image // 2:02d}/{image}.jpg" for image in range(40)])
    np.savez(tmp_path / "e.npz", names=names, embeddings=rows.astype(np.float32))
    run_main("index", tmp_path / "g", "--embeddings", tmp_path / "e.npz")
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    scores = unit @ unit.T
    scores[np.arange(40)[:, None] // 2 == np.arange(40) // 2] = -1
    expected = np.sort(scores.max(axis=1))[-4]  # of 40 images, at FAR 0.1
    share = np.mean(scores.max(axis=1) > expected - 1e-6)  # two images that are each other's best tie
    capsys.readouterr()
    for words in ((), ("--protocol", "gallery")):
        run_main("search", tmp_path / "g", "--embeddings", tmp_path / "e.npz", "--far", "0.1", *words)
        printed = capsys.readouterr().out
        assert f"threshold {expected:.4f}, of the gallery's own images among other people at FAR 0.1" in printed
        assert "40 of 40 faces are known" in printed
        assert f"looked for among the other people, {share:.1%} would be" in printed

    with pytest.raises(SystemExit):
        run_main("search", tmp_path / "g", "--embeddings", tmp_path / "e.npz", "--far", "0.1", "--protocol", "heldout")
    assert "--protocol: expected --results" in capsys.readouterr().err


@pytest.fixture
def photographs(face_data: Path, tmp_path: Path) -> Path:
    """A folder of two people, with an image of noise for one of them."""
    folder = tmp_path / "photographs"
    with tarfile.open(face_data / "lfw_aligned-00.tar") as tar:
        for member in itertools.islice((m for m in tar if m.isfile()), 2):
            tar.extract(member, folder, filter="data")
    person = next(path for path in folder.rglob("*.jpg")).parent
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    cv2.imwrite(str(person / "noise.png"), noise)
    return folder


def test_an_image_without_a_face_is_in_no_gallery_and_is_looked_for_in_none(
    photographs: Path, run: Path, face_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--detector", face_data / "models" / "face_detection_yunet.onnx", "--device", "cpu")
    run_main("index", tmp_path / "g", "--checkpoint", run, "--images", photographs, *words)
    assert not any("noise" in name for name in Gallery.load(tmp_path / "g").names)
    assert "noise.png: no face found\n" in (tmp_path / "g" / "left_out.txt").read_text()
    noise = next(photographs.rglob("noise.png"))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run_main("search", tmp_path / "g", "--images", noise, *words)
    captured = capsys.readouterr()
    assert f"left out: {noise}: no face found" in captured.out
    assert "none of the 1 images can be used" in captured.err


def test_a_search_unlike_the_gallery_is_warned_of(
    photographs: Path, run: Path, face_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detector = face_data / "models" / "face_detection_yunet.onnx"
    words = ("--images", photographs, "--detector", detector, "--device", "cpu")
    run_main("index", tmp_path / "g", "--checkpoint", run, *words)
    run_main("search", tmp_path / "g", "--images", photographs, "--device", "cpu", "--no-mirror")
    printed = capsys.readouterr().out
    assert "warning: the gallery's photographs were aligned; without --detector" in printed
    assert "warning: the gallery was made with mirrored images" in printed


def test_a_far_that_was_not_evaluated_is_refused_with_those_that_were(tmp_path: Path) -> None:
    from facetrain.evaluation.threshold import threshold_from_results

    file = tmp_path / "results.json"
    file.write_text(json.dumps({"thresholds": {"verification": {"1e-3": 0.5}, "open-counts/all": {"1e-3": 0.7}}}))
    assert threshold_from_results(file, 0.001) == (0.7, "open-counts/all")
    assert threshold_from_results(file, 0.001, "verification") == (0.5, "verification")
    with pytest.raises(ValueError, match="there is: verification at FAR 1e-3, open-counts/all at FAR 1e-3"):
        threshold_from_results(file, 0.01)
    file.write_text("[]")
    with pytest.raises(ValueError, match=r"expected the results\.json"):
        threshold_from_results(file, 0.01)
