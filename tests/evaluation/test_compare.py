import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from face_lists import tied_set, write_pairs
from numpy.typing import NDArray

from facetrain.cli import main
from facetrain.evaluation.compare import compare, sign_flip_p_value
from facetrain.evaluation.lists import Request


def drawn(folder: Path) -> tuple[list[str], NDArray[np.float32], Request]:
    names, embeddings = tied_set(0, num_people=60)
    pairs = write_pairs(folder / "pairs.txt", names, per_fold=30)
    return names, embeddings, Request(pairs=pairs, dataset="drawn", bootstrap=200)


def spoiled(names: list[str], embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    """The embeddings, with the faces of three people replaced by others."""
    rng = np.random.default_rng(1)
    who = [row for row, name in enumerate(names) if name.split("/")[0] in ("Person_5", "Person_11", "Person_17")]
    spoiled = embeddings.copy()
    spoiled[who] = rng.choice([-0.5, 0.5], (len(who), 4))
    return spoiled


def test_embeddings_equal_to_themselves_do_not_differ(tmp_path: Path) -> None:
    names, embeddings, request = drawn(tmp_path)
    for d in compare(names, embeddings, embeddings, request):
        assert (d.a, d.low, d.high, d.p_value) == (d.b, 0.0, 0.0, 1.0)
        assert not d.more_in_a
        assert not d.more_in_b


def test_a_difference_names_the_people_behind_it(tmp_path: Path) -> None:
    names, _, request = drawn(tmp_path)
    rng = np.random.default_rng(0)
    person = [name.split("/")[0] for name in names]
    own = {name: rng.standard_normal(8) for name in sorted(set(person))}
    good = np.array([own[name] for name in person], dtype=np.float32)  # everybody is found
    bad = good.copy()
    bad[[name.startswith("Person_17/") for name in names]] = good[person.index("Person_3")]
    by_figure = {d.figure: d for d in compare(names, good, bad, request)}
    d = by_figure["closed-full/rank1"]
    assert (d.a, d.unit) == (1.0, "people")
    assert d.b < d.a
    assert set(d.more_in_a) == {"Person_17", "Person_3"}
    assert d.more_in_a["Person_17"] == 5  # six images, one of them in the gallery
    assert not d.more_in_b
    assert d.low <= d.b - d.a <= d.high <= 0
    back = {d.figure: d for d in compare(names, bad, good, request)}["closed-full/rank1"]
    assert (back.more_in_b, back.p_value) == (d.more_in_a, d.p_value)
    assert (back.low, back.high) == pytest.approx((-d.high, -d.low))
    assert by_figure["verification/accuracy"].unit == "folds"


@pytest.mark.parametrize("differences", [[1, 2, -1], [3.0], [1, 1, 1, 1, -2, 0, 0], [0, 0], [0.5, -0.5, 1.5]])
def test_few_sign_flips_are_all_tried(differences: list[float]) -> None:
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product([1, -1], repeat=len(differences))]
    expected = np.mean([s >= abs(sum(differences)) for s in sums])
    assert sign_flip_p_value(np.array(differences, dtype=float), np.random.default_rng(0)) == expected


def test_many_sign_flips_agree_with_the_binomial_test() -> None:
    differences = np.repeat([1.0, -1.0], [38, 22])
    p_value = sign_flip_p_value(differences, np.random.default_rng(0))
    binomial = 2 * sum(math.comb(60, k) for k in range(38, 61)) / 2**60
    assert p_value == pytest.approx(binomial, abs=0.008)
    assert sign_flip_p_value(np.ones(100), np.random.default_rng(0)) == 1 / 10_001


def test_the_command_compares_two_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names, embeddings, request = drawn(tmp_path)
    np.savez(tmp_path / "a.npz", names=np.array(names), embeddings=embeddings)
    order = np.random.default_rng(0).permutation(len(names))  # the order of a file doesn't matter
    stems = np.array([Path(names[i]).stem for i in order])
    np.savez(tmp_path / "b.npz", names=stems, embeddings=spoiled(names, embeddings)[order])
    words = ["compare", str(tmp_path / "a.npz"), str(tmp_path / "b.npz"), "--dataset", "drawn", "--bootstrap", "200"]
    main([*words, "--pairs", str(request.pairs), "--out", str(tmp_path / "out")])
    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    expected = {d.figure: d for d in compare(names, embeddings, spoiled(names, embeddings), request)}
    assert set(written) == set(expected) >= {"verification/accuracy", "closed-full/rank1"}
    d = expected["closed-full/rank1"]
    assert (written["closed-full/rank1"]["b"], written["closed-full/rank1"]["p_value"]) == (d.b, d.p_value)
    out = capsys.readouterr().out
    assert f"{100 * (d.b - d.a):+.2f}" in out
    d = expected["verification/vr_at_far_1e-2"]
    (person,) = d.more_in_b
    assert f"vr_at_far_1e-2: A is right on nobody more often; B is right more often on 1: {person} +1" in out


def test_files_of_other_images_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names, embeddings, _ = drawn(tmp_path)
    np.savez(tmp_path / "a.npz", names=np.array(names), embeddings=embeddings)
    np.savez(tmp_path / "b.npz", names=np.array(names[1:]), embeddings=embeddings[1:])
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path / "a.npz"), str(tmp_path / "b.npz"), "--dataset", "drawn"])
    assert f"b.npz: {Path(names[0]).stem} is missing; expected the same" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        main(["compare", "a.npz", "b.npz", "--dataset", "drawn", "--out", str(tmp_path / "file" / "out")])
    assert "--out: " in capsys.readouterr().err


def test_a_fault_of_one_side_says_which(tmp_path: Path) -> None:
    names, embeddings, request = drawn(tmp_path)
    zero = embeddings.copy()
    zero[7] = 0
    with pytest.raises(ValueError, match=f"B: embeddings: all zeros for {names[7]}"):
        compare(names, embeddings, zero, request)
