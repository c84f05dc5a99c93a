"""BLUFR against plain loops on drawn trials, and on LFW with the benchmark's own trials and counts."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from face_lists import tied_set
from numpy.typing import NDArray
from scipy.io import savemat

from facetrain.evaluation.blufr import blufr_figures, read_blufr, run_blufr
from facetrain.evaluation.embeddings_npz import load_embeddings_npz
from facetrain.evaluation.inputs import face_set, unit_vectors
from facetrain.evaluation.lfw import evaluate, metrics
from facetrain.evaluation.lists import Request
from facetrain.evaluation.report import format_table


def cells(arrays: list[Any]) -> NDArray[Any]:
    """A MATLAB cell array."""
    column = np.empty((len(arrays), 1), dtype=object)
    for row, array in enumerate(arrays):
        column[row, 0] = array
    return column


def draw_trials(names: list[str], *, num_trials: int = 3) -> dict[str, Any]:
    """Trials like the benchmark's: test images, one gallery image of some people, all other test images as probes."""
    rng = np.random.default_rng(0)
    images = sorted(Path(name).name for name in names)
    person = np.array([image.rsplit("_", 1)[0] for image in images])
    labels = np.unique(person, return_inverse=True)[1] + 1
    lists: dict[str, list[Any]] = {"testIndex": [], "galIndex": [], "probIndex": []}
    for _ in range(num_trials):
        test = np.sort(rng.choice(len(images), 3 * len(images) // 4, replace=False)) + 1
        people = rng.choice(np.unique(labels[test - 1]), 30, replace=False)
        gallery = np.array([next(i for i in test if labels[i - 1] == p) for p in people])
        for key, index in zip(lists, (test, gallery, np.setdiff1d(test, gallery)), strict=True):
            lists[key].append(index.astype(np.uint16)[:, None])
    config = {key: cells(index) for key, index in lists.items()}
    return config | {"imageList": cells([np.array([image]) for image in images]), "labels": labels[:, None]}


def write_config(file: Path, config: dict[str, Any]) -> Path:
    savemat(file, config)
    return file


def strangers_alone(config: dict[str, Any]) -> None:
    """Leave no probe of anybody in the gallery of the second trial."""
    person = config["labels"].ravel()
    enrolled = person[config["galIndex"][1, 0].ravel() - 1]
    probes = config["probIndex"][1, 0].ravel()
    config["probIndex"][1, 0] = probes[~np.isin(person[probes - 1], enrolled)][:, None]


def brute_trial(config: dict[str, Any], trial: int, embedding: dict[str, NDArray[np.float32]]) -> dict[str, float]:
    images = [str(cell.item()) for cell in config["imageList"].ravel()]
    index = {key: [int(i) - 1 for i in config[key][trial, 0].ravel()] for key in ("testIndex", "galIndex", "probIndex")}
    person = [image.rsplit("_", 1)[0] for image in images]
    score = {
        (i, j): float(embedding[images[i]] @ embedding[images[j]])
        for i, j in itertools.product(range(len(images)), repeat=2)
    }
    pairs = list(itertools.combinations(index["testIndex"], 2))
    impostor = sorted((score[p] for p in pairs if person[p[0]] != person[p[1]]), reverse=True)
    genuine = [score[p] for p in pairs if person[p[0]] == person[p[1]]]
    threshold = impostor[math.floor(0.001 * len(impostor) + 0.5) - 1]
    enrolled = {person[g]: g for g in index["galIndex"]}
    best = {i: {name: score[i, g] for name, g in enrolled.items()} for i in index["probIndex"]}
    others = sorted((max(best[i].values()) for i in best if person[i] not in enrolled), reverse=True)
    tau = others[math.floor(0.01 * len(others) + 0.5) - 1]
    known = [i for i in best if person[i] in enrolled]
    own = [best[i][person[i]] for i in known]
    first = [
        all(value < mine for name, value in best[i].items() if name != person[i])
        for i, mine in zip(known, own, strict=True)
    ]
    return {
        "vr_at_far_1e-3": sum(value >= threshold for value in genuine) / len(genuine),
        "dir_rank1_at_far_1e-2": sum(f and mine >= tau for f, mine in zip(first, own, strict=True)) / len(known),
        "rank1": sum(first) / len(known),
    }


def test_trials_equal_plain_loops(tmp_path: Path) -> None:
    names, embeddings = tied_set(0, num_people=80)
    config = draw_trials(names)
    file = write_config(tmp_path / "config.mat", config)
    evaluation = evaluate(names, embeddings, Request(blufr=file, dataset="drawn"))
    embedding = {Path(name).name: vector for name, vector in zip(names, embeddings, strict=True)}
    trials = [brute_trial(config, trial, embedding) for trial in range(3)]
    results = evaluation.results["blufr"]
    assert list(results) == ["vr_at_far_1e-3", "dir_rank1_at_far_1e-2", "rank1"]
    for key, figure in results.items():
        values = [trial[key] for trial in trials]
        mean, std = np.mean(values), np.std(values, ddof=1)
        assert list(figure) == ["mean", "std", "mean_minus_std", "trials"]
        assert figure["trials"] == values
        assert [figure[name] for name in ("mean", "std", "mean_minus_std")] == pytest.approx([mean, std, mean - std])
    assert metrics(evaluation)["drawn/blufr/rank1/mean"] == results["rank1"]["mean"]
    table = format_table(evaluation)
    assert "mean - std" in table
    (row,) = [line.split() for line in table.splitlines() if line.startswith("  trial 3 ")]
    assert row[2:5] == [f"{100 * value:.2f}%" for value in trials[2].values()]


def test_a_collapsed_model_identifies_nobody_in_blufr(tmp_path: Path) -> None:
    names, _ = tied_set(0, num_people=80)
    file = write_config(tmp_path / "config.mat", draw_trials(names, num_trials=2))
    faces = face_set(names)
    same = unit_vectors(names, np.ones((len(names), 37), dtype=np.float32))
    outcomes = run_blufr(faces, same, read_blufr(file, faces))
    figures = blufr_figures(outcomes)
    assert figures["rank1"]["mean"] == 0.0
    assert outcomes[0].verification.point.far_realised == 1.0
    assert outcomes[0].verification.point.num_tied == outcomes[0].verification.point.num_impostors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("galIndex"), "config.mat: expected BLUFR's lists .*; galIndex is missing"),
        (lambda c: c.update(testIndex=c["testIndex"][:2]), "as many trials in each list"),
        (lambda c: c["imageList"].__setitem__((5, 0), np.array(["Nobody_0001.jpg"])), "Nobody_0001 is not in the set"),
        (lambda c: c["imageList"].__setitem__((5, 0), c["imageList"][4, 0]), "imageList: image .* stands 2 times"),
        (lambda c: c["imageList"].__setitem__((5, 0), np.array(["five"])), "imageList: expected image names"),
        (lambda c: c["labels"].__setitem__((0, 0), 77), "labels: expected one label for each person"),
        (lambda c: c.update(labels=c["labels"][:-1]), "expected a label for each of"),
        (lambda c: c["galIndex"].__setitem__((1, 0), np.array([[0]])), "galIndex of trial 2: expected .* from 1 to"),
        (lambda c: c["probIndex"].__setitem__((0, 0), np.array([[9999]])), "probIndex of trial 1: expected .* from 1"),
        (lambda c: c["probIndex"].__setitem__((2, 0), c["galIndex"][2, 0]), "trial 3: expected no image of the gall"),
        (strangers_alone, "probIndex of trial 2: expected a person of the gallery, got none"),
        (lambda c: c["testIndex"].__setitem__((0, 0), np.array([[1.5]])), "testIndex of trial 1: expected different"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    names, _ = tied_set(0, num_people=80)
    config = draw_trials(names)
    change(config)
    with pytest.raises(ValueError, match=message):
        read_blufr(write_config(tmp_path / "config.mat", config), face_set(names))


def test_two_gallery_images_of_a_person_are_refused(tmp_path: Path) -> None:
    names, _ = tied_set(0, num_people=80)
    config = draw_trials(names)
    labels = config["labels"].ravel()
    person = np.flatnonzero(np.bincount(labels) > 1)[0]
    config["galIndex"][0, 0] = np.flatnonzero(labels == person)[:2, None] + 1
    with pytest.raises(ValueError, match="galIndex of trial 1: expected one image a person"):
        read_blufr(write_config(tmp_path / "config.mat", config), face_set(names))


def test_files_that_are_no_config_are_refused(tmp_path: Path) -> None:
    names, _ = tied_set(0, num_people=80)
    whole = write_config(tmp_path / "whole.mat", draw_trials(names)).read_bytes()
    (tmp_path / "short.mat").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.mat").write_text("not a matrix\n" * 20)
    (tmp_path / "empty.mat").touch()
    # The head of version 7.3: that text up to byte 124, then the version and the byte order.
    (tmp_path / "new.mat").write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + b"\x89HDF\r\n\x1a\n" * 64)
    for file, message in {
        "short.mat": "not a readable .mat file",
        "text.mat": "not a readable .mat file",
        "empty.mat": "not a readable .mat file",
        "new.mat": "got version 7.3",
    }.items():
        with pytest.raises(ValueError, match=f"{file}: .*{message}"):
            read_blufr(tmp_path / file, face_set(names))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_blufr(tmp_path / "nowhere.mat", face_set(names))


def test_the_benchmarks_own_trials_have_its_counts(face_data: Path) -> None:
    names, embeddings = load_embeddings_npz(face_data / "lfw_embeddings_mobilefacenet.npz")
    faces = face_set(names)
    trials = read_blufr(face_data / "protocols" / "blufr_lfw_config.mat", faces)
    assert len(trials) == 10
    assert {len(trial.gallery) for trial in trials} == {1000}
    first, second = run_blufr(faces, unit_vectors(names, embeddings), trials[:2])
    assert first.verification.num_genuine == 231_834
    assert first.verification.point.num_impostors == 52_612_506
    assert first.verification.point.num_accepted == 52_613
    counts = [(len(o.identification.ranks), len(o.identification.impostor_scores)) for o in (first, second)]
    assert counts == [(4832, 4449), (3943, 4862)]
    assert all(value > 0.9 for value in first.figures().values())
