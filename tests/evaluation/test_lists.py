from pathlib import Path

import numpy as np
import pytest
from face_lists import tied_set, write_pairs

from facetrain.evaluation.embeddings_npz import load_embeddings_npz
from facetrain.evaluation.inputs import face_set, read_development_pairs
from facetrain.evaluation.lfw import evaluate
from facetrain.evaluation.lists import Request, read_lists
from facetrain.evaluation.protocols import SURROGATE_PEOPLE
from facetrain.evaluation.report import format_table

NAMES = ["A_0001", "A_0002", "B_0001", "B_0002", "C_0001"]


def closed_lists(folder: Path, gallery: str, probes: str) -> Request:
    (folder / "gallery.txt").write_text(gallery)
    (folder / "probes.txt").write_text(probes)
    return Request(closed_lists=(folder / "gallery.txt", folder / "probes.txt"), dataset="drawn")


def test_closed_best_rowden_is_what_its_lists_say(tmp_path: Path) -> None:
    embeddings = np.array([[1, 0], [0.8, 0.6], [0, 1], [0.96, 0.28], [0.6, 0.8]], dtype=np.float32)
    request = closed_lists(tmp_path, "A_0002\nB/B_0001.jpg\nC_0001\n", "A_0001.jpg\nB_0002\n")
    evaluation = evaluate(NAMES, embeddings, request)
    # A_0001 scores 0.8 with A, 0 with B, 0.6 with C; B_0002 scores 0.936 with A, 0.28 with B, 0.8 with C.
    expected = {"rank1": 0.5, "rank5": 1.0, "gallery": 3, "probes": 2}
    assert evaluation.results["closed-best-rowden"] == expected
    assert evaluation.closed["closed-best-rowden"][0].ranks.tolist() == [1, 3]
    assert "closed-best-rowden" in format_table(evaluation)
    assert "closed-best-rowden" not in evaluation.not_run


@pytest.mark.parametrize(
    ("gallery", "probes", "message"),
    [
        ("A_0001\nD_0001", "A_0002", r"gallery\.txt:2: image D_0001 is not in the set"),
        ("A_0001\nB_0001\nx/A_0001.png", "A_0002", r"gallery\.txt:3: image x/A_0001\.png stands twice"),
        ("A_0001\n\nB_0001", "A_0002", r"gallery\.txt:2: expected an image name such as Name_0001, got ''"),
        ("A_0001", "A_0001", r"probes\.txt: expected no image of .*gallery\.txt, got A_0001"),
        ("A_0001", "A_0002\nB_0001", r"probes\.txt: expected people of .*gallery\.txt alone, got B"),
        ("A_0001", "", r"probes\.txt: expected image names, one a line, got an empty file"),
    ],
)
def test_closed_lists_that_do_not_fit_are_refused(tmp_path: Path, gallery: str, probes: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_lists(NAMES, closed_lists(tmp_path, gallery, probes))


def test_pairs_of_one_fold_are_refused_before_there_are_embeddings(tmp_path: Path) -> None:
    (tmp_path / "pairs.txt").write_text("1\t1\nA\t1\t2\nA\t1\tB\t1\n")
    with pytest.raises(ValueError, match=r"pairs\.txt: expected two folds or more, .* got 1"):
        read_lists(NAMES, Request(pairs=tmp_path / "pairs.txt", dataset="drawn"))


def test_view_1_is_a_figure_without_view_2(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("1\nA\t1\t2\nA\t1\tC\t1\n")
    (tmp_path / "test.txt").write_text("1\nB\t1\t2\nA\t2\tC\t1\n")
    embeddings = np.array([[1, 0], [0.8, 0.6], [0, 1], [0.6, 0.8], [0.6, -0.8]], dtype=np.float32)
    request = Request(view1=(tmp_path / "train.txt", tmp_path / "test.txt"), dataset="drawn")
    evaluation = evaluate(NAMES, embeddings, request)
    # Trained on 0.8 (genuine) and 0.6; the test pairs score 0.8 (genuine) and 0.
    assert evaluation.results["view1"] == {"accuracy": 1.0, "se": 0.0, "threshold": pytest.approx(0.7), "pairs": 2}
    assert "verification" not in evaluation.results
    assert evaluation.not_run["verification"] == "needs a list of pairs"
    assert "view 1, 2 pairs" in format_table(evaluation)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10\t300\n", r"train\.txt:1: expected the number of genuine pairs, got '10\\t300'"),
        ("", r"train\.txt:1: expected the number of genuine pairs, got ''"),
        ("0\n", "expected the number of genuine pairs, got '0'"),
        ("2\nA\t1\t2\nA\t1\tC\t1\n", r"train\.txt: expected 4 pairs after the first line, got 2"),
        ("1\nA\t1\t2\nA\t1\t2\n", r"train\.txt:3: expected an impostor pair"),
    ],
)
def test_a_malformed_development_list_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "train.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_development_pairs(tmp_path / "train.txt")


def test_view_1_names_an_image_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "view.txt").write_text("1\nA\t1\t2\nA\t1\tD\t4\n")
    with pytest.raises(ValueError, match=r"view\.txt:3: image D_0004 is not in the set"):
        read_lists(NAMES, Request(view1=(tmp_path / "view.txt", tmp_path / "view.txt"), dataset="drawn"))


def test_insightfaces_figures_stand_beside_the_exact_ones(tmp_path: Path) -> None:
    names, embeddings = tied_set(0)
    pairs = write_pairs(tmp_path / "pairs.txt", names)
    exact = evaluate(names, embeddings, Request(pairs=pairs, dataset="drawn"))
    both = evaluate(names, embeddings, Request(pairs=pairs, dataset="drawn", convention="insightface"))
    figures = both.results.pop("verification-insightface")
    assert list(figures) == ["accuracy", "std", "vr_at_far_1e-3", "vr_at_far_1e-3_std", "far_realised"]
    assert "verification-insightface" not in exact.results
    assert both.results["verification"] == exact.results["verification"]
    assert f"Accuracy-Flip  {figures['accuracy']:.5f}+-{figures['std']:.5f}" in format_table(both)


def test_the_lists_of_lfw_have_their_counts(face_data: Path, tmp_path: Path) -> None:
    lists = face_data / "protocols"
    names, embeddings = load_embeddings_npz(face_data / "lfw_embeddings_mobilefacenet.npz")
    faces = face_set(names)
    listed = set((lists / "lfw_ytf_596_subjects.txt").read_text().split())
    others = [person for person in faces.people if person not in listed][: SURROGATE_PEOPLE - 596]
    lowest: dict[str, int] = {}
    for name, number in faces.row_of:
        lowest[name] = min(number, lowest.get(name, number))
    gallery = [f"{person}_{lowest[person]:04d}" for person in (*sorted(listed), *others)]
    probes = [f"{name}_{number:04d}" for name, number in faces.row_of if name in listed and number != lowest[name]]
    (tmp_path / "gallery.txt").write_text("\n".join(gallery))
    (tmp_path / "probes.txt").write_text("\n".join(probes))
    request = Request(
        view1=(lists / "pairsDevTrain.txt", lists / "pairsDevTest.txt"),
        closed_lists=(tmp_path / "gallery.txt", tmp_path / "probes.txt"),
    )
    results = evaluate(names, embeddings, request).results
    closed = results["closed-best-rowden"]
    assert (closed["gallery"], closed["probes"]) == (4249, 3143)
    assert closed["rank1"] > results["closed-full"]["rank1"]
    assert results["view1"]["pairs"] == 1000
    assert results["view1"]["accuracy"] > 0.98
