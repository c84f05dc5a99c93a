"""How long the protocols of LFW take on 13,233 embeddings, beside other people's code for parts of them.

    pip install -e .[benchmarks] -c constraints.txt
    python benchmarks/evaluation.py --lists FOLDER [--quick] [--json FILE] [--width 512]

FOLDER holds LFW's pairs.txt, lfw_ytf_596_subjects.txt and blufr_lfw_config.mat, whose image names the embeddings bear;
the embeddings themselves are drawn: a centre for each person and an offset for each image. Each peer computes the same
figure from the same embeddings in the same run; `agree` says whether it comes out the same. Galleries with a million
distractors are measured by benchmarks/distractors.py.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from facetrain.evaluation.blufr import BlufrTrial, blufr_figures, read_blufr, run_blufr
from facetrain.evaluation.identification import best_scores, rank_probes
from facetrain.evaluation.inputs import FaceSet, face_set, read_pairs, unit_vectors
from facetrain.evaluation.lfw import evaluate
from facetrain.evaluation.lists import Request
from facetrain.evaluation.verification import verification_rate

ResultT = TypeVar("ResultT")

OFFSET = 2.0
"""Length of an image's offset from its person, where that of the person is 1."""
SECTIONS_S = 5.0
BLUFR_S = 60.0
NUM_TRIALS = 10
QUICK_TRIALS = 2
TURNS = 3
"""Of what takes a few seconds; the shortest counts."""
SAME = 1e-6
"""Figures that differ by no more than this agree; a peer's arithmetic sums in another order."""


@dataclass(frozen=True)
class Row:
    """A figure by one implementation."""

    what: str
    by: str
    seconds: float
    """By the clock, the shortest of the turns."""
    cpu_s: float
    """Of all threads in that turn; less than threads x seconds where other work took the cores."""
    value: float


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lists", type=Path, required=True, help="folder of LFW's lists")
    parser.add_argument("--width", type=int, default=512, help="width of the embeddings")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_TRIALS} trials of BLUFR, no peer for it")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    names = image_names(args.lists / "blufr_lfw_config.mat")
    faces = face_set(names)
    embeddings = unit_vectors(names, draw(faces, args.width))
    print(f"{len(names):,} embeddings x {args.width}, {torch.get_num_threads()} threads")
    rows = [*whole(args.lists, names, embeddings, quick=args.quick)]
    rows += [*verification(args.lists, faces, embeddings), *identification(faces, embeddings)]
    if not args.quick:
        rows += one_trial(faces, embeddings, read_blufr(args.lists / "blufr_lfw_config.mat", faces)[0])
    print_table(rows)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


def whole(lists: Path, names: list[str], embeddings: NDArray[np.float32], *, quick: bool) -> list[Row]:
    """Time sections 1 to 3 and BLUFR as a user gets them, reading of lists included."""
    request = Request(pairs=lists / "pairs.txt", open_set_people=lists / "lfw_ytf_596_subjects.txt")
    times, evaluation = timed(lambda: evaluate(names, embeddings, request))
    wish = f"sections 1 to 3 (wanted: {SECTIONS_S:.0f} s)"
    rows = [Row(wish, "facetrain", *times, evaluation.results["verification"]["accuracy"])]
    faces = face_set(names)
    num_trials = QUICK_TRIALS if quick else NUM_TRIALS
    times, outcomes = timed(
        lambda: run_blufr(faces, embeddings, read_blufr(lists / "blufr_lfw_config.mat", faces)[:num_trials])
    )
    wish = f"BLUFR, {num_trials} trials (wanted: {BLUFR_S * num_trials / NUM_TRIALS:.0f} s)"
    return [*rows, Row(wish, "facetrain", *times, blufr_figures(outcomes)["vr_at_far_1e-3"]["mean"])]


def verification(lists: Path, faces: FaceSet, embeddings: NDArray[np.float32]) -> list[Row]:
    """VR@FAR=1% of View 2, with scikit-learn's ROC."""
    from sklearn.metrics import roc_curve

    pairs = read_pairs(lists / "pairs.txt")
    a, b = embeddings[pairs.rows(faces).T]
    scores, genuine = np.einsum("nd,nd->n", a, b), pairs.is_genuine
    ours_s, rate = timed(lambda: verification_rate(scores[genuine], scores[~genuine], 1e-2))
    peer_s, (far, vr, _) = timed(lambda: roc_curve(genuine, scores, drop_intermediate=False))
    what = "VR@FAR=1e-2 of 6,000 pairs"
    return [
        Row(what, "facetrain", *ours_s, rate.value),
        Row(what, "scikit-learn roc_curve", *peer_s, vr_where(far, vr, rate.point.far_realised)),
    ]


def identification(faces: FaceSet, embeddings: NDArray[np.float32]) -> list[Row]:
    """Rank-1 of closed-full, with FAISS and with pytorch-metric-learning."""
    import faiss
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    faiss.omp_set_num_threads(torch.get_num_threads())
    gallery, probes = faces.place == 0, faces.place > 0
    given = embeddings[probes], faces.person[probes], embeddings[gallery], faces.person[gallery]

    def flat() -> float:
        index = faiss.IndexFlatIP(embeddings.shape[1])
        index.add(given[2])
        _, nearest = index.search(given[0], 1)
        return float(np.mean(given[3][nearest[:, 0]] == given[1]))

    def metric_learning() -> float:
        calculator = AccuracyCalculator(include=("precision_at_1",), k=1, device=torch.device("cpu"))
        tensors = [torch.from_numpy(array) for array in given]
        return float(calculator.get_accuracy(*tensors, ref_includes_query=False)["precision_at_1"])

    def ours() -> float:
        return float(np.mean(rank_probes(*given)[0] <= 1))

    def best() -> float:
        return float(best_scores(given[0], given[2]).astype(np.float64).mean())

    def flat_best() -> float:
        index = faiss.IndexFlatIP(embeddings.shape[1])
        index.add(given[2])
        return float(index.search(given[0], 1)[0].astype(np.float64).mean())

    peers: dict[str, dict[str, Callable[[], float]]] = {
        f"rank-1 of {len(given[0]):,} probes in {len(given[2]):,}": {
            "facetrain": ours,
            "FAISS flat": flat,
            "pytorch-metric-learning": metric_learning,
        },
        "mean best score of the same": {"facetrain": best, "FAISS flat": flat_best},
    }
    rows = []
    for what, calls in peers.items():
        for by, call in calls.items():
            times, value = timed(call, TURNS)
            rows.append(Row(what, by, *times, value))
    return rows


def one_trial(faces: FaceSet, embeddings: NDArray[np.float32], trial: BlufrTrial) -> list[Row]:
    """VR@FAR=0.1% over all pairs of a trial of BLUFR, with a full matrix and scikit-learn's ROC."""
    from sklearn.metrics import roc_curve

    def peer() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        test, person = embeddings[trial.test], faces.person[trial.test]
        above = np.triu_indices(len(test), 1)
        scores, genuine = (test @ test.T)[above], person[above[0]] == person[above[1]]
        far, vr, _ = roc_curve(genuine, scores, drop_intermediate=False)
        return far, vr

    ours_s, (outcome,) = timed(lambda: run_blufr(faces, embeddings, [trial]))
    peer_s, (far, vr) = timed(peer)
    what = f"BLUFR trial 1: VR@FAR=0.1% of {outcome.verification.point.num_impostors:,} impostor pairs"
    return [
        Row(what, "facetrain, with DIR and rank-1", *ours_s, outcome.verification.value),
        Row(what, "numpy and scikit-learn", *peer_s, vr_where(far, vr, outcome.verification.point.far_realised)),
    ]


def image_names(config: Path) -> list[str]:
    """Return the image list of BLUFR, which is all of LFW."""
    from scipy.io import loadmat

    return [str(cell.item()) for cell in loadmat(config)["imageList"].ravel()]


def draw(faces: FaceSet, width: int) -> NDArray[np.float32]:
    """Return an embedding for each image, [n, width]."""
    rng = np.random.default_rng(0)
    people = rng.standard_normal((len(faces.people), width), dtype=np.float32)
    return people[faces.person] + np.float32(OFFSET) * rng.standard_normal((len(faces.names), width), dtype=np.float32)


def vr_where(far: NDArray[np.float64], vr: NDArray[np.float64], realised: float) -> float:
    """Return the VR of the highest threshold with this FAR, which is an impostor's score; lower ones gain genuine."""
    return float(vr[np.isclose(far, realised, rtol=1e-12, atol=0.0)].min())


def timed(call: Callable[[], ResultT], turns: int = 1) -> tuple[tuple[float, float], ResultT]:
    """Return what a call takes at its shortest, in seconds by the clock and of the CPU, and what it returns."""
    times = []
    for _ in range(turns):
        clock, cpu = time.perf_counter(), time.process_time()
        result = call()
        times.append((time.perf_counter() - clock, time.process_time() - cpu))
    return min(times), result


def print_table(rows: list[Row]) -> None:
    """Print the rows, each peer beside ours."""
    print(f"\n{'what':72}{'by':32}{'s':>8}{'CPU s':>8}{'x ours':>8}  agree")
    for what, group in itertools.groupby(rows, key=lambda row: row.what):
        ours, *peers = group
        print(f"{what:72}{ours.by:32}{ours.seconds:8.2f}{ours.cpu_s:8.2f}")
        for row in peers:
            agree = "yes" if abs(row.value - ours.value) <= SAME else f"{row.value:.6f} != {ours.value:.6f}"
            print(f"{'':72}{row.by:32}{row.seconds:8.2f}{row.cpu_s:8.2f}{row.seconds / ours.seconds:8.1f}  {agree}")


if __name__ == "__main__":
    main()
