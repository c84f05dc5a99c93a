"""Groups of people apart, against counts by hand."""

from pathlib import Path

import numpy as np
import pytest

from facetrain.cli import main
from facetrain.evaluation.groups import read_groups
from facetrain.evaluation.inputs import face_set
from facetrain.evaluation.lfw import evaluate
from facetrain.evaluation.lists import Request

ANGLES = {"Ann": (0, 10), "Bob": (60, 70), "Cid": (120, 170), "Dot": (200, 215)}  # degrees; Cid's images are far apart


def write_set(folder: Path) -> tuple[list[str], np.ndarray]:
    """Two folds of two genuine and two impostor pairs, one of these within the group f."""
    (folder / "pairs.txt").write_text(
        "2 2\nAnn 1 2\nBob 1 2\nAnn 1 Dot 1\nBob 1 Cid 1\nCid 1 2\nDot 1 2\nAnn 2 Bob 1\nCid 2 Dot 1\n"
    )
    (folder / "groups.csv").write_text("person,sex,age\nAnn,f,\nDot,f,old\nBob,m,young\nNobody,m,old\n")
    names = [f"{person}_{number:04d}" for person in ANGLES for number in (1, 2)]
    degrees = np.array([angle for both in ANGLES.values() for angle in both])
    return names, np.stack([np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))], axis=1).astype(np.float32)


def test_pairs_are_counted_at_the_threshold_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, embeddings = write_set(tmp_path)
    monkeypatch.setattr("facetrain.evaluation.verification.FARS", {"1e-2": 0.25})  # four impostor pairs resolve no less
    request = Request(pairs=tmp_path / "pairs.txt", groups=tmp_path / "groups.csv", dataset="drawn")
    evaluation = evaluate(names, embeddings, request)
    assert evaluation.verification is not None
    # Impostor scores are cos 160, 60, 50 and 30: the threshold is cos 30, which Cid's 50 degrees don't reach.
    assert evaluation.verification.vr_at_far["1e-2"].point.threshold == pytest.approx(np.cos(np.deg2rad(30)))
    assert evaluation.results["groups"] == {
        "sex": {
            "f": {"people": 2, "genuine": 2, "impostors": 1, "vr_at_far_1e-2": 1.0, "far_at_far_1e-2": 0.0},
            "m": {"people": 1, "genuine": 1, "impostors": 0, "vr_at_far_1e-2": 1.0},
        },
        "age": {
            "old": {"people": 1, "genuine": 1, "impostors": 0, "vr_at_far_1e-2": 1.0},
            "young": {"people": 1, "genuine": 1, "impostors": 0, "vr_at_far_1e-2": 1.0},
        },
    }


def test_the_command_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names, embeddings = write_set(tmp_path)
    np.savez(tmp_path / "e.npz", names=np.array(names), embeddings=embeddings)
    words = ["lfw", "--embeddings", "e.npz", "--pairs", "pairs.txt", "--groups", "groups.csv", "--out", "out"]
    words = [str(tmp_path / word) if "." in word or word == "out" else word for word in words]
    main([*words, "--dataset", "drawn"])
    assert "sex: f" in capsys.readouterr().out
    assert "sex: f" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ":1: expected a header"),
        ("name,sex\n", ":1: expected a header"),
        ("person\nAnn\n", ":1: expected a header"),
        ("person,sex\nAnn\n", ":2: expected 2 columns, got 1"),
        ("person,sex\nAnn,f\nAnn,m\n", ":3: person 'Ann' stands twice"),
        ("person,sex\nEve,f\n", "such as Ann, got none"),
        ('person,sex\n"Ann,f\n', "expected a CSV"),
    ],
)
def test_what_is_no_list_of_groups_is_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "g.csv").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_groups(tmp_path / "g.csv", face_set(["Ann_0001"]))


def test_groups_go_with_pairs() -> None:
    with pytest.raises(ValueError, match="goes with a list of pairs"):
        Request(groups=Path("g.csv"))
