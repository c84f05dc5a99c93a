import json
from pathlib import Path

import numpy as np
import pytest
from face_lists import tied_set, write_pairs

from facetrain.cli import main
from facetrain.evaluation.lfw import Evaluation, evaluate
from facetrain.evaluation.lists import Request
from facetrain.evaluation.report import format_table, report_to_folder, write_results

PNG = b"\x89PNG\r\n"


def drawn_evaluation(folder: Path, *, num_people: int = 120, draws: int = 1) -> Evaluation:
    names, embeddings = tied_set(0, num_people=num_people)
    pairs = write_pairs(folder / "pairs.txt", names, per_fold=30)
    people = folder / "people.txt"
    people.write_text("\n".join(f"Person_{person}" for person in range(num_people // 3) if person % 6))
    request = Request(pairs=pairs, open_set_people=people, draws=draws, dataset="drawn")
    evaluation = evaluate(names, embeddings, request)
    report_to_folder(evaluation, folder / "out")
    return evaluation


@pytest.mark.parametrize("draws", [1, 3])
def test_folder_holds_results_and_figures(tmp_path: Path, draws: int) -> None:
    evaluation = drawn_evaluation(tmp_path, draws=draws)
    written = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*"))
    figures = [f"figures/{name}.png" for name in ("cmc", "det", "dir_over_far", "open_scores", "roc", "scores")]
    assert written == [*figures, "report.html", "results.json"]
    assert all(file.read_bytes().startswith(PNG) for file in (tmp_path / "out" / "figures").iterdir())
    written_results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written_results == evaluation.results | {"thresholds": evaluation.thresholds}


def test_a_protocol_that_was_not_run_has_no_figure(tmp_path: Path) -> None:
    names, embeddings = tied_set(0)
    pairs = write_pairs(tmp_path / "pairs.txt", names)
    report_to_folder(evaluate(names, embeddings, Request(pairs=pairs, dataset="drawn")), tmp_path)
    assert sorted(file.stem for file in (tmp_path / "figures").iterdir()) == ["cmc", "det", "roc", "scores"]


@pytest.mark.filterwarnings("error")
def test_a_collapsed_model_can_be_drawn(tmp_path: Path) -> None:
    names, _ = tied_set(0, num_people=120)
    pairs = write_pairs(tmp_path / "pairs.txt", names)
    same = np.ones((len(names), 2), dtype=np.float32)
    report_to_folder(evaluate(names, same, Request(pairs=pairs, dataset="drawn")), tmp_path)
    assert (tmp_path / "figures" / "dir_over_far.png").read_bytes().startswith(PNG)


def test_table_names_every_protocol_and_what_its_figures_rest_on(tmp_path: Path) -> None:
    evaluation = drawn_evaluation(tmp_path)
    table = format_table(evaluation)
    rate = evaluation.open["open-best-rowden"][0].dir_at_far(1e-2)
    (row,) = [line.split() for line in table.splitlines() if line.split()[:1] == ["open-best-rowden"]]
    assert row[5:] == [
        f"{100 * rate.value:.2f}%",
        f"{100 * rate.se:.2f}",
        f"{rate.point.threshold:.4f}",
        f"{rate.point.far_realised:.6f}",
        str(rate.point.num_tied),
    ]
    assert rate.point.num_tied > 1
    assert "verification, 4 folds" in table
    assert "standard error" in table
    assert "rests on" in table or evaluation.verification.vr_at_far["1e-2"].point.num_accepted >= 10
    assert "not run: closed-surrogate needs the 5,749 people of LFW" in table
    for name in [*evaluation.closed, *evaluation.open]:
        assert f"  {name} " in table


def test_draws_stand_as_mean_and_std(tmp_path: Path) -> None:
    table = format_table(drawn_evaluation(tmp_path, draws=3))
    (row,) = [line for line in table.splitlines() if line.startswith("  open-best-rowden ")]
    assert row.endswith("mean +- std of 3 draws")
    assert row.count("+-") == 3


def test_results_are_replaced_whole(tmp_path: Path) -> None:
    write_results({"a": 1}, tmp_path)
    with pytest.raises(ValueError, match="Out of range float values"):
        write_results({"a": float("nan")}, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_evaluating_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, embeddings = tied_set(0)
    pairs = write_pairs(tmp_path / "pairs.txt", names)
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    evaluate(names, embeddings, Request(pairs=pairs, dataset="drawn"))
    assert not list(empty.iterdir())


def test_people_whose_images_lie_in_several_folders_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names, embeddings = tied_set(0)
    pairs = write_pairs(tmp_path / "pairs.txt", names)
    for folders, is_said in ((1, False), (2, True)):
        scattered = [f"part{number % folders}/{Path(name).name}" for number, name in enumerate(names)]
        np.savez(tmp_path / "e.npz", names=np.array(scattered), embeddings=embeddings)
        lists = ["--pairs", str(pairs), "--dataset", "drawn"]
        main(["lfw", "--embeddings", str(tmp_path / "e.npz"), *lists, "--out", str(tmp_path / f"out{folders}")])
        assert ("lie in part0 and in part1, and count as one person's" in capsys.readouterr().out) == is_said
