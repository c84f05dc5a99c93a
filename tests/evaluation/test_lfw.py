"""All protocols together: against plain loops on a small set, and on real LFW embeddings with the published counts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from face_lists import tied_set, write_pairs
from numpy.typing import NDArray

from facetrain.evaluation.embeddings_npz import load_embeddings_npz
from facetrain.evaluation.inputs import face_set, read_pairs, unit_vectors
from facetrain.evaluation.lfw import evaluate, metrics
from facetrain.evaluation.lists import Request, read_lists
from facetrain.evaluation.report import report_to_folder

Images = dict[str, list[NDArray[np.float32]]]
Search = tuple[list[NDArray[np.float32]], list[str]]

OPEN_KEYS = {"dir_rank1_at_far_1e-2", "threshold", "far_realised", "gallery", "probes", "impostors"}


def by_person(names: list[str], embeddings: NDArray[np.float32]) -> Images:
    """Each person's embeddings, lowest-numbered image first."""
    people: dict[str, dict[int, NDArray[np.float32]]] = {}
    for name, embedding in zip(names, embeddings, strict=True):
        person, number = Path(name).stem.rsplit("_", 1)
        people.setdefault(person, {})[int(number)] = embedding
    return {person: [images[number] for number in sorted(images)] for person, images in people.items()}


def brute_search(gallery: Images, probe: NDArray[np.float32], person: str) -> tuple[int, float]:
    best = {name: max(float(probe @ face) for face in faces) for name, faces in gallery.items()}
    return 1 + sum(best[name] >= best[person] for name in best if name != person), best[person]


def brute_open(gallery: Images, genuine: Images, impostors: Images) -> dict[str, float]:
    found = [brute_search(gallery, probe, person) for person, probes in genuine.items() for probe in probes]
    enrolled = [face for faces in gallery.values() for face in faces]
    best = [max(float(probe @ face) for face in enrolled) for probes in impostors.values() for probe in probes]
    threshold = sorted(best, reverse=True)[int(0.01 * len(best) + 0.5) - 1]
    return {
        "rank1": sum(rank == 1 for rank, _ in found) / len(found),
        "dir_rank1_at_far_1e-2": sum(rank == 1 and score >= threshold for rank, score in found) / len(found),
        "threshold": threshold,
        "far_realised": sum(score >= threshold for score in best) / len(best),
        "gallery": len(enrolled),
        "probes": len(found),
        "impostors": len(best),
    }


@pytest.mark.parametrize("seed", range(3))
def test_every_protocol_equals_plain_loops(tmp_path: Path, seed: int) -> None:
    names, embeddings = tied_set(seed, num_people=120)
    images = by_person(names, embeddings)
    known = {person for person in images if len(images[person]) > 1 and int(person.split("_")[1]) < 40}
    (tmp_path / "people.txt").write_text("\n".join(sorted(known)))
    pairs = write_pairs(tmp_path / "pairs.txt", names)
    people = tmp_path / "people.txt"
    results = evaluate(names, embeddings, Request(pairs=pairs, open_set_people=people, dataset="drawn")).results

    ranks = [
        brute_search({name: faces[:1] for name, faces in images.items()}, probe, person)[0]
        for person, faces in images.items()
        for probe in faces[1:]
    ]
    shares = {"rank1": np.mean(np.array(ranks) <= 1), "rank5": np.mean(np.array(ranks) <= 5)}
    assert results["closed-full"] == pytest.approx({**shares, "gallery": 120, "probes": len(ranks)})

    others = {person: faces for person, faces in images.items() if person not in known}
    listed = {person: faces for person, faces in images.items() if person in known}
    expected = brute_open({p: f[1:] for p, f in listed.items()}, {p: f[:1] for p, f in listed.items()}, others)
    assert results["open-best-rowden"] == pytest.approx(expected)
    expected = brute_open({p: f[:1] for p, f in listed.items()}, {p: f[1:2] for p, f in listed.items()}, others)
    assert results["open-best-rowden-single"] == pytest.approx(expected)

    gallery = {person: faces[:3] for person, faces in images.items() if len(faces) >= 4}
    genuine = {person: faces[3:] for person, faces in images.items() if len(faces) >= 4}
    for group, counts in {"known-unknown": (2, 3), "unknown-unknown": (1,), "all": (1, 2, 3)}.items():
        impostors = {person: faces for person, faces in images.items() if len(faces) in counts}
        if group == "unknown-unknown":  # 20 people with one image can't show a FAR of 1%
            assert group not in results["open-counts"]
            continue
        expected = brute_open(gallery, genuine, impostors)
        assert results["open-counts"]["rank1"] == pytest.approx(expected.pop("rank1"))
        assert results["open-counts"][group] == pytest.approx(expected)


def test_what_cannot_run_says_what_it_needs(tmp_path: Path) -> None:
    names, embeddings = tied_set(0)
    pairs = write_pairs(tmp_path / "pairs.txt", names)
    evaluation = evaluate(names, embeddings, Request(pairs=pairs, dataset="drawn"))
    assert list(evaluation.results) == ["verification", "closed-full"]
    assert dict(evaluation.not_run) == {
        "closed-best-rowden": "needs list files of its gallery and its probes",
        "closed-surrogate": "needs the 5,749 people of LFW",
        "open-best-rowden": "needs the list of open-set people",
        "open-best-rowden-single": "needs the list of open-set people",
        "open-counts/known-unknown": "needs more impostor probes for a FAR of 1% than 20",
        "open-counts/unknown-unknown": "needs more impostor probes for a FAR of 1% than 4",
        "open-counts/all": "needs more impostor probes for a FAR of 1% than 24",
    }


def test_a_set_of_single_images_still_verifies(tmp_path: Path) -> None:
    names = [f"P{person}_{number:04d}" for person in range(2) for number in range(2)]
    (tmp_path / "pairs.txt").write_text("2\t1\nP0\t0\t1\nP0\t0\tP1\t0\nP1\t0\t1\nP0\t1\tP1\t1\n")
    embeddings = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], dtype=np.float32)
    evaluation = evaluate(names, embeddings, Request(pairs=tmp_path / "pairs.txt", dataset="two"))
    assert evaluation.results["closed-full"] == {"rank1": 1.0, "rank5": 1.0, "gallery": 2, "probes": 2}
    assert evaluation.not_run["open-counts"] == "needs people with enough images for a gallery and a genuine probe"


def test_a_collapsed_model_identifies_nobody(tmp_path: Path) -> None:
    names, _ = tied_set(0, num_people=120)
    pairs = write_pairs(tmp_path / "pairs.txt", names)
    collapsed = np.repeat(np.random.default_rng(0).standard_normal((1, 37)), len(names), axis=0).astype(np.float32)
    results = evaluate(names, collapsed, Request(pairs=pairs, dataset="drawn")).results
    assert results["verification"]["accuracy"] == 0.5
    assert results["closed-full"]["rank1"] == 0.0
    assert results["open-counts"]["rank1"] == 0.0
    assert results["open-counts"]["all"]["far_realised"] == 1.0
    assert results["open-counts"]["all"]["dir_rank1_at_far_1e-2"] == 0.0


def test_draws_give_means_and_depend_on_the_seed_alone(tmp_path: Path) -> None:
    names, embeddings = tied_set(0, num_people=120)
    people = tmp_path / "people.txt"
    people.write_text("\n".join(f"Person_{person}" for person in range(40) if person % 6))
    pairs = write_pairs(tmp_path / "pairs.txt", names)

    def open_set(order: NDArray[np.int64], seed: int) -> dict[str, float]:
        evaluation = evaluate(
            [names[i] for i in order],
            embeddings[order],
            Request(pairs=pairs, open_set_people=people, draws=5, dataset="drawn", seed=seed),
        )
        figures: dict[str, float] = evaluation.results["open-best-rowden"]
        draws = [draw.rank1 for draw in evaluation.open["open-best-rowden"]]
        assert (figures["rank1"], figures["rank1_std"]) == (np.mean(draws), np.std(draws, ddof=1))
        return figures

    order = np.arange(len(names))
    figures = open_set(order, seed=3)
    averaged = ["rank1", "dir_rank1_at_far_1e-2", "threshold", "far_realised"]
    stds = [f"{key}_std" for key in averaged]
    assert set(figures) == {*averaged, *stds, "draws", "gallery", "probes", "impostors"}
    assert figures == open_set(order[::-1], seed=3)
    assert figures != open_set(order, seed=4)


def test_inputs_are_checked_before_anything_is_embedded(tmp_path: Path) -> None:
    names, _ = tied_set(0)
    pairs = write_pairs(tmp_path / "pairs.txt", names)
    read_lists(names, Request(pairs=pairs, dataset="drawn"))
    with pytest.raises(ValueError, match=r"lfw: expected 13,233 images \(--dataset NAME for another set\), got 84"):
        read_lists(names, Request(pairs=pairs))
    with pytest.raises(ValueError, match="is not in the set"):
        read_lists(names[:20], Request(pairs=pairs, dataset="drawn"))
    with pytest.raises(ValueError, match="draws: expected 1 or more, got 0"):
        Request(pairs=pairs, draws=0)


@pytest.fixture
def lfw(face_data: Path) -> tuple[tuple[str, ...], NDArray[np.float32], dict[str, Any]]:
    lists = {
        "pairs": face_data / "protocols" / "pairs.txt",
        "open_set_people": face_data / "protocols" / "lfw_ytf_596_subjects.txt",
    }
    return *load_embeddings_npz(face_data / "lfw_embeddings_mobilefacenet.npz"), lists


def check_schema(results: dict[str, Any]) -> None:
    """Check what results.json holds of each protocol."""
    verification = {"accuracy", "se", "std", "vr_at_far_1e-2", "vr_at_far_1e-3", "eer", "auc"}
    assert {protocol: set(figures) for protocol, figures in results.items()} == {
        "verification": verification,
        "closed-full": {"rank1", "rank5", "gallery", "probes"},
        "closed-surrogate": {"rank1", "rank1_std", "rank5", "rank5_std", "draws", "gallery", "probes"},
        "open-best-rowden": {"rank1"} | OPEN_KEYS,
        "open-best-rowden-single": {"rank1"} | OPEN_KEYS,
        "open-counts": {"rank1", "known-unknown", "unknown-unknown", "all"},
    }
    for group in ("known-unknown", "unknown-unknown", "all"):
        assert set(results["open-counts"][group]) == OPEN_KEYS


def check_counts(results: dict[str, Any]) -> None:
    def counts(figures: dict[str, Any]) -> tuple[int, ...]:
        return tuple(figures[key] for key in ("gallery", "probes", "impostors") if key in figures)

    assert counts(results["closed-full"]) == (5749, 7484)
    assert counts(results["closed-surrogate"]) == (4249, 3143)
    assert counts(results["open-best-rowden"]) == (3143, 596, 9494)
    assert counts(results["open-best-rowden-single"]) == (596, 596, 9494)
    assert counts(results["open-counts"]["known-unknown"]) == (1830, 4903, 2431)
    assert counts(results["open-counts"]["unknown-unknown"]) == (1830, 4903, 4069)
    assert counts(results["open-counts"]["all"]) == (1830, 4903, 6500)


def test_lfw_gives_the_published_counts_and_the_figures_of_a_strong_model(
    lfw: tuple[tuple[str, ...], NDArray[np.float32], dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names, embeddings, lists = lfw
    evaluation = evaluate(names, embeddings, Request(**lists))
    report_to_folder(evaluation, tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results == evaluation.results | {"thresholds": evaluation.thresholds}
    assert set(results.pop("thresholds")) <= set(results) | {f"open-counts/{kind}" for kind in results["open-counts"]}
    check_schema(results)
    check_counts(results)
    assert 0.992 <= results["verification"]["accuracy"] <= 0.993
    assert results["open-best-rowden"]["far_realised"] == 95 / 9494
    assert results["closed-full"]["rank1"] < results["closed-surrogate"]["rank1"]
    flat = metrics(evaluation)
    assert flat["lfw/open-best-rowden/dir_rank1_at_far_1e-2"] == results["open-best-rowden"]["dir_rank1_at_far_1e-2"]
    assert flat["lfw/open-counts/all/impostors"] == 6500.0
    table = capsys.readouterr().out
    for protocol in results:
        assert protocol in table
    assert "rests on 3 impostor pairs" in table
    assert "not run: closed-best-rowden needs list files" in table


def test_lfw_that_is_not_whole_is_refused(
    lfw: tuple[tuple[str, ...], NDArray[np.float32], dict[str, Any]], tmp_path: Path
) -> None:
    names, _, lists = lfw
    without = [name for name in names if Path(name).stem != "Akhmed_Zakayev_0003"]
    with pytest.raises(ValueError, match=r"1 of 13,233 images are missing, Akhmed_Zakayev_0003 \(.*pairs\.txt:3\)"):
        read_lists(without, Request(**lists))
    with pytest.raises(ValueError, match=r"lfw: expected 13,233 images .*, got 13,234"):
        read_lists([*names, "Nobody_0001"], Request(**lists))
    renamed = [name.replace("AJ_Cook", "A_J_Cook_Jr") for name in names]
    read_lists(renamed, Request(**lists))
    merged = [name.replace("AJ_Lamas_0001", "AJ_Cook_0002") for name in names]
    with pytest.raises(ValueError, match=r"lfw: expected 5,749 people, got 5,748"):
        read_lists(merged, Request(**lists))
    people = lists["open_set_people"].read_text().split()
    (tmp_path / "people.txt").write_text("\n".join(people[1:]))
    with pytest.raises(ValueError, match=r"people\.txt: open-best-rowden: expected 596 people, got 595"):
        read_lists(names, Request(**{**lists, "open_set_people": tmp_path / "people.txt"}))
    lines = lists["pairs"].read_text().splitlines()
    (tmp_path / "pairs.txt").write_text("\n".join(["5\t300", *lines[1:3001]]))
    assert len(read_pairs(tmp_path / "pairs.txt").pairs) == 3000
    with pytest.raises(ValueError, match=r"View 2 of LFW: expected 10 folds, got 5"):
        read_lists(names, Request(**{**lists, "pairs": tmp_path / "pairs.txt"}))


def test_the_surrogate_is_the_mean_and_std_of_its_galleries(
    lfw: tuple[tuple[str, ...], NDArray[np.float32], dict[str, Any]],
) -> None:
    names, embeddings, lists = lfw
    evaluation = evaluate(names, embeddings, Request(**lists, draws=3, seed=5))
    draws = evaluation.closed["closed-surrogate"]
    faces, unit = face_set(names), unit_vectors(names, embeddings)
    listed = np.isin(faces.people, lists["open_set_people"].read_text().split())
    rates = []
    for number, draw in enumerate(draws):
        others = np.random.default_rng([5, number]).choice(np.flatnonzero(~listed), 4249 - 596, replace=False)
        enrolled = listed | np.isin(np.arange(5749), others)
        gallery = (faces.place == 0) & enrolled[faces.person]
        probes = (faces.place > 0) & listed[faces.person]
        scores, own = unit[probes] @ unit[gallery].T, faces.person[probes, None] == faces.person[gallery]
        beaten_by = ((scores >= scores[own][:, None] - 1e-6) & ~own).sum(axis=1)
        # The matrix product here may round otherwise: what is nearly a tie may go either way.
        assert np.mean(draw.ranks == 1 + beaten_by) > 0.999
        rates.append(draw.rank_rate(1))
    figures = evaluation.results["closed-surrogate"]
    assert (figures["rank1"], figures["rank1_std"]) == (np.mean(rates), np.std(rates, ddof=1))
    assert figures["draws"] == evaluation.results["open-best-rowden"]["draws"] == 3
