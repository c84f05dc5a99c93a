from pathlib import Path

import numpy as np
import pytest
from face_lists import tied_set, write_pairs

from facetrain.evaluation.embeddings_npz import load_embeddings_npz
from facetrain.evaluation.inputs import face_set, read_pairs, read_people, unit_vectors

GOOD_PAIRS = ["2\t1", "A\t1\t2", "A\t1\tB\t1", "B\t1\t2", "B\t2\tA\t2"]
RAGGED = np.array([np.ones(2), np.ones(3)], dtype=object)
NAMES = ["A_0001", "A_0002", "B_0001", "B_0002", "C_0001"]


def test_names_lose_folder_and_suffix() -> None:
    faces = face_set(["x/J.Lo/J.Lo_0002.jpg", "J.Lo_1", "Al_Gore_Jr_0010.png", r"C:\faces\Al_Gore_Jr_0009.jpeg"])
    assert faces.people == ("Al_Gore_Jr", "J.Lo")
    assert dict(faces.row_of) == {("J.Lo", 2): 0, ("J.Lo", 1): 1, ("Al_Gore_Jr", 10): 2, ("Al_Gore_Jr", 9): 3}
    assert faces.person.tolist() == [1, 1, 0, 0]
    assert faces.num_images.tolist() == [2, 2]


def test_place_orders_a_persons_images_by_number() -> None:
    faces = face_set(["B_0010", "A_0003", "B_0002", "A_0001", "B_0009"])
    assert faces.place.tolist() == [2, 1, 0, 0, 1]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "images: expected image names such as Name_0001, got none"),
        (["A_0001", "b.jpg"], "images: expected an image name such as Name_0001, got 'b.jpg'"),
        (["A_0001", "B_0001", "x/A_0001.jpg"], "images: A_0001 stands twice"),
    ],
)
def test_names_that_cannot_be_used_are_named(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        face_set(names)


def test_embeddings_are_scaled_to_unit_length() -> None:
    embeddings = np.array([[3.0, 4.0], [1e-30, 0.0], [0.0, -1e30]], dtype=np.float32)
    assert unit_vectors(["a", "b", "c"], embeddings).tolist() == [
        [pytest.approx(0.6), pytest.approx(0.8)],
        [1.0, 0.0],
        [0.0, -1.0],
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [([0.0, 0.0], "all zeros for B_0001"), ([np.nan, 1.0], "NaN or infinite for B_0001"), ([1.0, np.inf], "B_0001")],
)
def test_unusable_embeddings_are_named(row: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unit_vectors(["A_0001", "B_0001"], np.array([[1.0, 0.0], row], dtype=np.float32))


def test_embeddings_and_names_must_be_as_many() -> None:
    with pytest.raises(ValueError, match=r"one row for each of 2 names, got shape \(3, 4\)"):
        unit_vectors(["A_0001", "B_0001"], np.ones((3, 4), dtype=np.float32))


def test_pairs_are_read_in_folds(tmp_path: Path) -> None:
    file = tmp_path / "pairs.txt"
    file.write_text("\n".join([*GOOD_PAIRS, "", ""]))
    pair_list = read_pairs(file)
    assert pair_list.pairs[:2] == ((("A", 1), ("A", 2)), (("A", 1), ("B", 1)))
    assert pair_list.is_genuine.tolist() == [True, False, True, False]
    assert pair_list.fold.tolist() == [0, 0, 1, 1]
    assert pair_list.rows(face_set(NAMES)).tolist() == [[0, 1], [0, 2], [2, 3], [3, 1]]


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (1, "10", r"pairs.txt:1: expected the number of folds and of pairs in each, got '10'"),
        (1, "0\t300", "pairs.txt:1: expected the number of folds"),
        (1, "3\t1", "pairs.txt: expected 6 pairs after the first line, got 4"),
        (2, "A 1", "pairs.txt:2: expected a genuine pair, 'name i j', got 'A 1'"),
        (2, "A\t1\tB\t1", "pairs.txt:2: expected a genuine pair"),
        (3, "A\tone\tB\t1", "pairs.txt:3: expected an impostor pair, 'name1 i name2 j'"),
        (3, "A\t1\tA\t2", "pairs.txt:3: expected two people, got"),
        (4, "B\t2\t2", "pairs.txt:4: expected two images, got"),
        (4, "", "pairs.txt:4: expected a genuine pair"),
    ],
)
def test_a_malformed_line_of_pairs_is_named(tmp_path: Path, line: int, text: str, message: str) -> None:
    file = tmp_path / "pairs.txt"
    file.write_text("\n".join(text if number == line else good for number, good in enumerate(GOOD_PAIRS, start=1)))
    with pytest.raises(ValueError, match=message):
        read_pairs(file)


def test_names_between_tabs_may_hold_blanks(tmp_path: Path) -> None:
    file = tmp_path / "pairs.txt"
    file.write_text("1 1\nAnn Example\t1\t2\nAnn Example\t1\tBob 3\t4\n")
    assert read_pairs(file).pairs == (
        (("Ann Example", 1), ("Ann Example", 2)),
        (("Ann Example", 1), ("Bob 3", 4)),
    )


def test_files_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "pairs.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"pairs\.txt: expected a text file"):
        read_pairs(tmp_path / "pairs.txt")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"empty\.txt:1: expected the number of folds"):
        read_pairs(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match=r"empty\.txt: expected names of people, one a line, got an empty file"):
        read_people(tmp_path / "empty.txt", face_set(NAMES))


def test_pairs_naming_a_missing_image_say_the_line(tmp_path: Path) -> None:
    names, _ = tied_set(0)
    file = write_pairs(tmp_path / "pairs.txt", names)
    pair_list = read_pairs(file)
    (person, number), _ = pair_list.pairs[7]
    left = [name for name in names if not name.endswith(f"/{person}_{number:04d}.jpg")]
    first = next(i for i, pair in enumerate(pair_list.pairs) if (person, number) in pair)
    with pytest.raises(ValueError, match=rf"pairs\.txt:{first + 2}: image {person}_{number:04d} is not in the set"):
        pair_list.rows(face_set(left))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A\nD\n", "people.txt:2: person 'D' is not in the set"),
        ("A\nB\nA\n", "people.txt:3: person 'A' stands twice"),
        ("A\nC\n", "people.txt:2: person 'C' has one image in the set, expected two or more"),
    ],
)
def test_a_wrong_line_of_people_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "people.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_people(tmp_path / "people.txt", face_set(NAMES))


def test_npz_in_float16_becomes_float32(tmp_path: Path) -> None:
    np.savez(tmp_path / "e.npz", names=np.array(["A_0001", "B_0001"]), embeddings=np.eye(2, dtype=np.float16))
    names, embeddings = load_embeddings_npz(tmp_path / "e.npz")
    assert names == ("A_0001", "B_0001")
    assert embeddings.dtype == np.float32


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"names": np.array(["A_0001"])}, "expected the arrays 'names' and 'embeddings'"),
        ({"names": np.array([1]), "embeddings": np.eye(1)}, "expected 'names' to be a list of strings, got int64"),
        ({"names": np.array(["A"]), "embeddings": np.eye(2)}, r"expected 'embeddings' to be floats \[1, D\]"),
        ({"names": np.array(["A"]), "embeddings": np.eye(1, dtype=int)}, r"floats \[1, D\], one row a name, got int64"),
        ({"names": np.array(["A"], dtype=object), "embeddings": np.eye(1)}, "not a readable .npz file"),
        ({"names": np.array(["A", "B"]), "embeddings": RAGGED}, "rows whose widths differ"),
        ({"names": np.array(["A", "B", "A"]), "embeddings": np.eye(3)}, "expected every image once, A stands twice"),
    ],
)
def test_an_npz_of_other_arrays_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "e.npz", **arrays)
    with pytest.raises(ValueError, match=rf"e\.npz: .*{message}"):
        load_embeddings_npz(tmp_path / "e.npz")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_npz_is_one_line(tmp_path: Path, share: float) -> None:
    np.savez_compressed(tmp_path / "e.npz", names=np.array(["A_0001"] * 99), embeddings=np.random.rand(99, 8))
    whole = (tmp_path / "e.npz").read_bytes()
    (tmp_path / "e.npz").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"e\.npz: not an \.npz file, or truncated") as caught:
        load_embeddings_npz(tmp_path / "e.npz")
    assert "\n" not in str(caught.value)


def test_a_damaged_npz_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "e.npz", names=np.array(["A_0001"] * 99), embeddings=np.random.rand(99, 8))
    whole = bytearray((tmp_path / "e.npz").read_bytes())
    whole[len(whole) // 2] ^= 0xFF
    (tmp_path / "e.npz").write_bytes(whole)
    with pytest.raises(ValueError, match=r"e\.npz: not a readable \.npz file: "):
        load_embeddings_npz(tmp_path / "e.npz")


def test_an_npy_and_a_text_file_are_no_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", np.eye(3))
    (tmp_path / "e.txt").write_text("A_0001 0.3")
    for file in ("e.npy", "e.txt"):
        with pytest.raises(ValueError, match=f"{file}: not an .npz file"):
            load_embeddings_npz(tmp_path / file)
