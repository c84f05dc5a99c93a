"""Retrieval and clustering against plain loops, on scores with many ties, and against other libraries without ties."""

import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import facetrain
from numpy.typing import NDArray

from facetrain.evaluation.clustering import agreement, cluster
from facetrain.evaluation.inputs import unit_vectors
from facetrain.evaluation.retrieval import read_labels, retrieve, verify_against_negatives
from facetrain.retrieve import label_names
from facetrain.search import k_means

KS = (1, 2, 3, 5, 10)


def corners(rng: np.random.Generator, num: int) -> NDArray[np.float32]:
    """Unit vectors whose inner products are exact, so that ties are ties."""
    return (rng.choice([-1, 1], (num, 4)) / 2).astype(np.float32)


def clouds(seed: int, num: int, num_classes: int, width: int = 16) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Unit vectors around a centre for each class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(num_classes, size=num)
    vectors = rng.standard_normal((num_classes, width))[labels] + rng.standard_normal((num, width))
    return unit_vectors([str(row) for row in range(num)], vectors.astype(np.float32)), labels


def brute_force(embeddings: NDArray[np.float32], labels: NDArray[np.int64]) -> dict[str, float]:
    scores = embeddings @ embeddings.T
    rows = []
    for query, label in enumerate(labels.tolist()):
        others = [item for item in range(len(labels)) if item != query]
        num_mates = sum(labels[item] == label for item in others)
        if not num_mates:
            continue
        others.sort(key=lambda item: (-scores[query, item], labels[item] == label))  # a mate comes last of its ties
        hits = [bool(labels[item] == label) for item in others]
        row = {f"recall_at_{k}": float(any(hits[:k])) for k in KS}
        row["r_precision"] = sum(hits[:num_mates]) / num_mates
        precisions = [sum(hits[: i + 1]) / (i + 1) for i in range(num_mates) if hits[i]]
        row["map_at_r"] = sum(precisions) / num_mates
        for k in KS:
            least = scores[query, others[k - 1]]
            votes = Counter(int(labels[item]) for item in others if scores[query, item] >= least)
            own = votes.pop(label, 0)
            row[f"knn_{k}_accuracy"] = float(own > max(votes.values(), default=0))
        rows.append(row)
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]} | {"queries": len(rows)}


@pytest.mark.parametrize("seed", range(12))
def test_every_figure_equals_plain_loops_with_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    embeddings, labels = corners(rng, 80), rng.integers(2 + 3 * seed, size=80)
    got = retrieve(embeddings, read_labels(labels), recall_at=KS, neighbours=KS).figures()
    assert got == pytest.approx(brute_force(embeddings, labels))


@pytest.mark.parametrize("seed", range(3))
def test_every_figure_equals_plain_loops_without_ties(seed: int) -> None:
    embeddings, labels = clouds(seed, 150, 20)
    got = retrieve(embeddings, read_labels(labels), recall_at=KS, neighbours=KS).figures()
    assert got == pytest.approx(brute_force(embeddings, labels))


def test_a_collapsed_model_finds_nothing() -> None:
    face = np.random.default_rng(0).standard_normal((1, 37)).astype(np.float32)
    same = unit_vectors(["x"] * 300, np.repeat(face, 300, axis=0))
    labels = read_labels(np.arange(300) // 3)
    assert retrieve(same, labels, recall_at=(1, 100, 297, 298)).figures() == {
        "recall_at_1": 0.0,
        "recall_at_100": 0.0,
        "recall_at_297": 0.0,
        "recall_at_298": 1.0,
        "map_at_r": 0.0,
        "r_precision": 0.0,
        "knn_1_accuracy": 0.0,
        "knn_5_accuracy": 0.0,
        "queries": 300,
    }
    assert verify_against_negatives(same, labels, [1, 99]) == {1: 0.0, 99: 0.0}


def test_an_item_that_is_alone_in_its_class_is_no_query_but_is_in_the_way() -> None:
    embeddings = np.array([[1, 0], [0, 1], [1, 0]], dtype=np.float32)
    outcome = retrieve(embeddings, read_labels(["a", "a", "b"]), recall_at=(1, 2), neighbours=(1,))
    assert outcome.num_queries == 2
    # The first finds b; the second has a and b at the same score, and b counts as before a.
    assert outcome.figures()["recall_at_1"] == 0.0
    assert outcome.figures()["recall_at_2"] == 1.0


def test_against_all_other_classes_the_best_of_them_decides() -> None:
    rng = np.random.default_rng(0)
    faces = corners(rng, 12)
    labels = read_labels(np.repeat(np.arange(12), 2))  # both items of a class are alike, so that no draw matters
    is_unique = [(faces == face).all(axis=1).sum() == 1 for face in faces]
    assert 0 < np.mean(is_unique) < 1
    won = verify_against_negatives(np.repeat(faces, 2, axis=0), labels, [11])
    assert won == {11: pytest.approx(np.mean(is_unique))}


def test_against_one_negative_the_chance_is_that_of_all_draws() -> None:
    embeddings, labels = clouds(3, 400, 25, width=4)
    scores, chances = embeddings @ embeddings.T, []
    for query, label in enumerate(labels):
        mates = [item for item in np.flatnonzero(labels == label) if item != query]
        others = [np.flatnonzero(labels == other) for other in range(25) if other != label]
        # A class is drawn first, then one of its items.
        wins = [np.mean([np.mean(scores[query, o] < scores[query, mate]) for o in others]) for mate in mates]
        chances.append(np.mean(wins))
    draws = [verify_against_negatives(embeddings, read_labels(labels), [1], seed=seed)[1] for seed in range(20)]
    assert np.mean(draws) == pytest.approx(np.mean(chances), abs=4 * 0.5 / np.sqrt(400 * 20))
    assert np.std(draws) > 0


def test_more_negatives_are_never_easier_and_draws_depend_on_the_seed_alone() -> None:
    embeddings, labels = clouds(0, 300, 30)
    won = verify_against_negatives(embeddings, read_labels(labels), [1, 5, 29])
    assert won[1] >= won[5] >= won[29]
    assert won == verify_against_negatives(embeddings, read_labels(labels), [1, 5, 29])
    assert won != verify_against_negatives(embeddings, read_labels(labels), [1, 5, 29], seed=1)


def brute_f1(labels: list[int], clusters: list[int]) -> float:
    pairs = list(combinations(range(len(labels)), 2))
    same_class = [labels[a] == labels[b] for a, b in pairs]
    same_cluster = [clusters[a] == clusters[b] for a, b in pairs]
    both = sum(x and y for x, y in zip(same_class, same_cluster, strict=True))
    precision, recall = both / max(sum(same_cluster), 1), both / max(sum(same_class), 1)
    return 2 * precision * recall / (precision + recall) if both else 0.0


@pytest.mark.parametrize("seed", range(5))
def test_f1_is_over_all_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, clusters = rng.integers(6, size=60), rng.integers(9, size=60)
    assert agreement(labels, clusters).f1 == pytest.approx(brute_f1(labels.tolist(), clusters.tolist()))


def test_agreement_of_simple_clusterings() -> None:
    labels = np.array([0, 0, 1, 1])
    perfect, nothing, single = (agreement(labels, np.array(x)) for x in ([7, 7, 3, 3], [0, 1, 0, 1], [0, 0, 0, 0]))
    assert (perfect.nmi, perfect.nmi_geometric, perfect.f1) == pytest.approx((1, 1, 1))
    assert (nothing.nmi, nothing.nmi_geometric, nothing.f1) == pytest.approx((0, 0, 0))
    assert (single.nmi, single.nmi_geometric, single.f1) == pytest.approx((0, 0, 0.5))
    # Entropies log 2 and 2 log 2, of which log 2 is shared.
    fine = agreement(labels, np.arange(4))
    assert (fine.nmi, fine.nmi_geometric) == pytest.approx((1 / 1.5, 1 / np.sqrt(2)))


def test_k_means_ends_where_every_item_is_with_the_nearest_mean() -> None:
    embeddings, _ = clouds(0, 300, 8)
    items = torch.from_numpy(embeddings)
    clusters = k_means(items, 8, seed=0)
    means = torch.stack([items[clusters == number].mean(dim=0) for number in range(8)])
    assert torch.equal(torch.cdist(items, means).argmin(dim=1), clusters)
    assert torch.equal(k_means(items, 8, seed=0), clusters)
    assert torch.equal(k_means(items, 300, seed=1).sort().values, torch.arange(300))


def test_k_means_leaves_no_cluster_empty() -> None:
    items = torch.tensor([[0.0], [0.0], [0.0], [1.0], [2.0], [3.0]])
    for seed in range(20):
        assert k_means(items, 4, seed=seed).unique().numel() == 4
    with pytest.raises(ValueError, match="num_clusters: expected 1 to the number of items, 6, got 7"):
        k_means(items, 7, seed=0)


def test_well_separated_classes_are_found() -> None:
    embeddings, labels = clouds(1, 200, 3, width=64)
    (found,) = cluster(embeddings, labels, [0])
    assert found.nmi > 0.9
    assert found.f1 > 0.9


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["a", "a"], "expected two classes or more, and two items or more of one, got 2 items of 1"),
        (["a", "b", "c"], "got 3 items of 3"),
    ],
)
def test_labels_that_nothing_can_be_measured_with_are_refused(classes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_labels(classes)


def test_numbers_out_of_bounds_are_refused() -> None:
    embeddings, labels = clouds(0, 20, 3)
    with pytest.raises(ValueError, match=r"recall_at: expected 1 to 19, the number of others, got \[1, 20\]"):
        retrieve(embeddings, read_labels(labels), recall_at=(1, 20))
    with pytest.raises(ValueError, match=r"negatives: expected 1 to 2, the number of other classes, got \[0\]"):
        verify_against_negatives(embeddings, read_labels(labels), [0])


def test_a_class_is_the_folder_or_what_stands_before_the_number() -> None:
    names = ["Al_Gore/1.jpg", "lfw/Al_Gore/Al_Gore_0002.jpg", "Al_Gore_0003", "Al_Gore_0004.png"]
    assert label_names(names) == ["Al_Gore", "lfw/Al_Gore", "Al_Gore", "Al_Gore"]
    with pytest.raises(ValueError, match=r"names: expected CLASS/IMAGE or CLASS_0001, got 'face\.jpg'"):
        label_names(["face.jpg"])


def test_the_command_writes_results_and_prints_a_table(tmp_path: Path) -> None:
    embeddings, labels = clouds(0, 120, 12)
    names = [f"class_{label}/{row}.jpg" for row, label in enumerate(labels)]
    np.savez(tmp_path / "e.npz", names=np.array(names), embeddings=embeddings)
    words = ("--embeddings", tmp_path / "e.npz", "--out", tmp_path / "out", "--clusterings", "3")
    done = facetrain("retrieval", *words, "--negatives", "1", "11", "--recall-at", "1", "10")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    expected = retrieve(embeddings, read_labels(labels), recall_at=(1, 10)).figures()
    assert results["retrieval"] == pytest.approx(expected | {"items": 120, "classes": 12})
    assert set(results["negatives"]) == {"1", "11"}
    assert set(results["clustering"]) == {
        *("runs", "clusters", "nmi", "nmi_std", "nmi_geometric", "nmi_geometric_std", "f1", "f1_std")
    }
    assert "120 items of 12 classes; 120 queries" in done.stdout
    assert f"{100 * expected['recall_at_1']:.2f}%" in done.stdout


@pytest.mark.slow  # importing them takes longer than all other tests of this file
def test_other_libraries_agree() -> None:
    calculators = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    inference = pytest.importorskip("pytorch_metric_learning.utils.inference")
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    metrics = pytest.importorskip("sklearn.metrics")
    neighbors = pytest.importorskip("sklearn.neighbors")
    embeddings, labels = clouds(0, 500, 40)
    labels[0] = 77  # alone in its class
    included = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    knn = inference.CustomKNN(distances.CosineSimilarity())  # its default needs FAISS
    calculator = calculators.AccuracyCalculator(
        include=included, k="max_bin_count", device=torch.device("cpu"), knn_func=knn
    )
    theirs = calculator.get_accuracy(torch.from_numpy(embeddings), torch.from_numpy(labels))
    ours = retrieve(embeddings, read_labels(labels), recall_at=(1,)).figures()
    assert ours["recall_at_1"] == pytest.approx(theirs["precision_at_1"])
    assert ours["r_precision"] == pytest.approx(theirs["r_precision"])
    assert ours["map_at_r"] == pytest.approx(theirs["mean_average_precision_at_r"])

    (clusters,) = [k_means(torch.from_numpy(embeddings), 40, seed=0).numpy()]
    found = agreement(labels, clusters)
    for method, nmi in (("arithmetic", found.nmi), ("geometric", found.nmi_geometric)):
        assert nmi == pytest.approx(metrics.normalized_mutual_info_score(labels, clusters, average_method=method))

    # Leave one out with one neighbour: no votes can tie.
    right = []
    for query in np.flatnonzero(labels != 77):
        others = np.arange(500) != query
        knn = neighbors.KNeighborsClassifier(1, metric="cosine").fit(embeddings[others], labels[others])
        right.append(knn.predict(embeddings[query : query + 1])[0] == labels[query])
    assert ours["knn_1_accuracy"] == pytest.approx(np.mean(right))
