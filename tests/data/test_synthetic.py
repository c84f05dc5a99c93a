import json
import time
from itertools import combinations, pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from facetrain.data.synthetic import SyntheticSummary, synthesize
from facetrain.data.synthetic.face import draw_face
from facetrain.data.synthetic.traits import draw_capture, draw_traits

SMALL = {"num_identities": 3, "images_per_identity": 2, "heldout_identities": 20, "heldout_images": 4, "image_px": 32}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "faces"
    synthesize(out, **SMALL, workers=1)
    return out


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many held-out people as by default, small."""
    out = tmp_path_factory.mktemp("synthetic") / "heldout"
    synthesize(out, num_identities=1, images_per_identity=2, image_px=56, workers=1)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_pairs(out: Path) -> list[tuple[str, str, bool, int]]:
    """The two images, whether the pair is genuine, and its fold."""
    lines = (out / "heldout_pairs.txt").read_text().splitlines()
    folds, per_fold = map(int, lines[0].split("\t"))
    assert len(lines) == 1 + folds * 2 * per_fold
    pairs = []
    for number, line in enumerate(lines[1:]):
        words = line.split("\t")
        genuine = number // per_fold % 2 == 0
        assert len(words) == (3 if genuine else 4)
        names = (words[0], words[0]) if genuine else (words[0], words[2])
        first, second = (
            f"{name}/{name}_{int(k):04d}.jpg" for name, k in zip(names, (words[1], words[-1]), strict=True)
        )
        pairs.append((first, second, genuine, number // (2 * per_fold)))
    return pairs


def best_accuracy(embeddings: np.ndarray, pairs: list[tuple[int, int, bool]]) -> float:
    """The accuracy of cosine scores at the one threshold that suits these very pairs best."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    a, b, genuine = (np.array(column) for column in zip(*pairs, strict=True))
    order = np.argsort(-(unit[a] * unit[b]).sum(axis=1))
    accepted = np.concatenate([[0], np.cumsum(np.where(genuine[order], 1, -1))])
    return float((accepted.max() + (~genuine).sum()) / len(pairs))


@pytest.fixture(scope="module")
def verification(heldout: Path) -> tuple[np.ndarray, list[tuple[int, int, bool]]]:
    pairs = read_pairs(heldout)
    names = sorted({name for pair in pairs for name in pair[:2]})
    number = {name: i for i, name in enumerate(names)}
    images = np.stack([cv2.imread(str(heldout / "heldout" / name)) for name in names])
    return images, [(number[first], number[second], genuine) for first, second, genuine, _ in pairs]


def test_a_face_is_a_function_of_seed_identity_and_image() -> None:
    face = draw_face(draw_traits(3, 5), draw_capture(3, 5, 2), 64)
    assert face.shape == (64, 64, 3)
    assert face.dtype == np.uint8
    np.testing.assert_array_equal(face, draw_face(draw_traits(3, 5), draw_capture(3, 5, 2), 64))
    for seed, identity, image in ((4, 5, 2), (3, 6, 2), (3, 5, 3)):
        other = draw_face(draw_traits(seed, identity), draw_capture(seed, identity, image), 64)
        assert np.abs(face.astype(int) - other).mean() > 5
    assert draw_traits(3, 5) != draw_traits(3, 6)


@pytest.mark.parametrize("image_px", [16, 100, 112, 225])
def test_faces_of_any_side_are_drawn(image_px: int) -> None:
    for identity in range(12):
        face = draw_face(draw_traits(0, identity), draw_capture(0, identity, 0), image_px)
        assert face.shape == (image_px, image_px, 3)
        assert face.std() > 10


def test_layout_is_a_folder_per_person_with_lfw_names(small: Path) -> None:
    files = contents(small)
    train = sorted(name for name in files if name.startswith("train/"))
    assert train == [f"train/p{p:05d}/{k:03d}.jpg" for p in (1, 2, 3) for k in (1, 2)]
    assert "heldout/Person_00001/Person_00001_0004.jpg" in files
    assert {name for name in files if "/" not in name} == {"heldout_pairs.txt", "heldout_people.txt", "synthetic.json"}
    assert all(cv2.imread(str(small / name)).shape == (32, 32, 3) for name in train)
    assert not small.with_name("faces.unfinished").exists()


def test_workers_and_a_second_run_give_the_same_bytes(small: Path, tmp_path: Path) -> None:
    before = contents(small)
    synthesize(small, **SMALL, workers=1)
    synthesize(tmp_path / "again", **SMALL, workers=2)
    assert contents(small) == before
    assert contents(tmp_path / "again") == before


def test_heldout_people_do_not_depend_on_the_training_set(small: Path, tmp_path: Path) -> None:
    synthesize(tmp_path / "faces", **(SMALL | {"num_identities": 1}), workers=1)
    assert contents(tmp_path / "faces" / "heldout") == contents(small / "heldout")


def test_an_unfinished_run_is_started_over(small: Path, tmp_path: Path) -> None:
    left_over = tmp_path / "faces.unfinished" / "train" / "p00001"
    left_over.mkdir(parents=True)
    (left_over / "001.jpg").write_bytes(b"half an im")
    (tmp_path / "faces").mkdir()
    synthesize(tmp_path / "faces", **SMALL, workers=1)
    assert contents(tmp_path / "faces") == contents(small)


def test_pairs_are_distinct_existing_and_disjoint_in_people_between_folds(heldout: Path) -> None:
    pairs = read_pairs(heldout)
    assert len(pairs) == 10 * 2 * 126
    assert len({pair[:2] for pair in pairs}) == len(pairs)
    people: dict[int, set[str]] = {}
    for first, second, genuine, fold in pairs:
        owners = {name.split("/")[0] for name in (first, second)}
        assert len(owners) == (1 if genuine else 2)
        assert first != second
        assert (heldout / "heldout" / first).is_file()
        assert (heldout / "heldout" / second).is_file()
        people.setdefault(fold, set()).update(owners)
    assert sorted(people) == list(range(10))
    assert not any(people[a] & people[b] for a, b in combinations(range(10), 2))


def test_heldout_people_have_one_to_many_images_and_gallery_people_two_or_more(heldout: Path) -> None:
    counts = {folder.name: len(list(folder.iterdir())) for folder in (heldout / "heldout").iterdir()}
    assert len(counts) == 200
    assert set(counts.values()) == {1, 2, 3, 4, 5, 6}
    people = (heldout / "heldout_people.txt").read_text().splitlines()
    assert len(set(people)) == len(people) == 66
    assert min(counts[name] for name in people) >= 2


def test_summary_counts_what_was_written(small: Path) -> None:
    summary = synthesize(small, **SMALL)
    heldout = [name for name in contents(small) if name.startswith("heldout/")]
    assert summary == SyntheticSummary(
        num_train_images=6, num_heldout_images=len(heldout), num_pairs=len(read_pairs(small)), num_open_set_people=6
    )
    assert json.loads((small / "synthetic.json").read_text())["arguments"]["image_px"] == 32


def test_raw_pixels_stay_below_60_percent(verification: tuple[np.ndarray, list[tuple[int, int, bool]]]) -> None:
    images, pairs = verification
    for pixels in (images.astype(np.float32), images.astype(np.float32).mean(axis=3)):
        flat = pixels.reshape(len(pixels), -1)
        assert best_accuracy(flat - flat.mean(axis=1, keepdims=True), pairs) < 0.6
        assert best_accuracy(flat - flat.mean(axis=0), pairs) < 0.6


def test_an_untrained_network_stays_below_60_percent(
    verification: tuple[np.ndarray, list[tuple[int, int, bool]]],
) -> None:
    images, pairs = verification
    torch.manual_seed(0)
    widths = (3, 16, 32, 64, 128)
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths):
        layers += [nn.Conv2d(width_in, width_out, 3, stride=2, padding=1), nn.BatchNorm2d(width_out), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(128)).eval()
    with torch.no_grad():
        embeddings = network(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1).numpy()
    assert best_accuracy(embeddings, pairs) < 0.6


def test_drawing_is_fast() -> None:
    """About 200 faces a second and core; the bound leaves room for busy machines."""
    begun_at = time.process_time()
    for identity in range(30):
        draw_face(draw_traits(0, identity), draw_capture(0, identity, 0), 112)
    assert 30 / (time.process_time() - begun_at) > 40


def test_a_folder_of_other_arguments_is_refused(small: Path) -> None:
    with pytest.raises(ValueError, match=r"faces: holds other synthetic faces \(seed 0 instead of 1\)"):
        synthesize(small, **SMALL, seed=1)


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        synthesize(tmp_path, **SMALL)
    with pytest.raises(ValueError, match=r"thesis\.tex: expected a new or empty folder"):
        synthesize(tmp_path / "thesis.tex", **SMALL)


def test_the_working_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^\.: expected a folder that takes its place .*, such as faces, which"):
        synthesize(Path("."), **SMALL)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("num_identities", 0),
        ("heldout_identities", 19),
        ("heldout_images", 1),
        ("image_px", 8),
        ("seed", -1),
        ("workers", 0),
    ],
)
def test_arguments_out_of_bounds_are_named(tmp_path: Path, argument: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"synth: {argument}: expected .*, got {value}"):
        synthesize(tmp_path / "faces", **(SMALL | {argument: value}))
    assert not (tmp_path / "faces").exists()
