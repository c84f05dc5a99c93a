"""Retrieval and clustering of any labelled set of images or embeddings: what `facetrain retrieval` does."""

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from facetrain.command_line import say
from facetrain.config import DataConfig
from facetrain.data.decode import decode_face
from facetrain.data.sources import open_faces
from facetrain.evaluation.clustering import Agreement, cluster
from facetrain.evaluation.embeddings_npz import load_embeddings_npz
from facetrain.evaluation.inputs import unit_vectors
from facetrain.evaluation.report import check_out_folder, write_results
from facetrain.evaluation.retrieval import (
    NEIGHBOURS,
    RECALL_AT,
    Labels,
    Retrieval,
    check_depths,
    check_negatives,
    read_labels,
    retrieve,
    verify_against_negatives,
)
from facetrain.networks import Device, EmbedOptions, embed_all, open_network
from facetrain.world import REPORT_TIMEOUT_S, start_world

NEGATIVES = (1, 9, 99, 999)
"""M of verification against M negatives, as far as there are classes."""

_AGREEMENT = ("nmi", "nmi_geometric", "f1")
_NUMBERED = re.compile(r"(?P<label>.+)_\d+(?:\.\w+)?")


@dataclass(frozen=True, kw_only=True)
class RetrievalSettings:
    """What is measured."""

    recall_at: tuple[int, ...] = ()
    """K of Recall@K; none takes those of `RECALL_AT` that the set has items for."""
    negatives: tuple[int, ...] = ()
    """M of verification against M negatives; none takes those of `NEGATIVES` that the set has classes for."""
    clusterings: int = 10
    """Runs of k-means, each with a seed of its own; 0 leaves clustering out."""
    seed: int = 0
    """Of the negatives and of the first run of k-means."""


def retrieval_of_embeddings(file: Path, settings: RetrievalSettings, *, device: Device, out: Path) -> None:
    """Measure an .npz of `names` and `embeddings`; print a table and write `results.json`.

    The class of `Name/image.jpg` is its folder, that of `Name_0001` what stands before the number.

    Raises:
        ValueError: The file or a setting can't be used.
    """
    names, embeddings = load_embeddings_npz(file)
    check_out_folder(out)
    with start_world(device, REPORT_TIMEOUT_S) as world:  # a launcher's other ranks wait
        world.on_main(lambda: _measure(names, label_names(names), embeddings, settings, world.device, out))


def retrieval_of_checkpoints(
    runs: Sequence[Path],
    images: list[Path],
    settings: RetrievalSettings,
    *,
    options: EmbedOptions,
    out: Path,
) -> None:
    """Embed a folder per class, or tars of that, with runs' networks over all ranks, and measure as above.

    Of several networks, embeddings are concatenated, each of unit length.

    Raises:
        ValueError: The weights, an image or a setting can't be used.
    """
    networks = [open_network(run, options.onnx) for run in runs]
    faces = open_faces(images)

    def decode(image: int, data: DataConfig) -> NDArray[np.uint8]:
        return decode_face(faces.read(image), data, faces.names[image])

    if left_out := faces.describe_skipped():
        say(left_out)
    labels = read_labels(faces.identities)
    check_depths(len(faces.names), recall_at=settings.recall_at)
    check_negatives(labels, settings.negatives)
    check_out_folder(out)
    with start_world(options.device, REPORT_TIMEOUT_S) as world:
        embeddings = embed_all(networks, decode, faces.names, options, world)
        world.on_main(lambda: _measure(faces.names, faces.identities, embeddings, settings, world.device, out))


def label_names(names: Sequence[str]) -> list[str]:
    """Return the class of each image name: its folder, or what stands before its number.

    Raises:
        ValueError: A name has neither.
    """
    labels = []
    for name in names:
        folder, _, image = name.replace("\\", "/").rpartition("/")
        numbered = _NUMBERED.fullmatch(image)
        if not folder and numbered is None:
            raise ValueError(f"names: expected CLASS/IMAGE or CLASS_0001, got {name!r}")
        labels.append(folder if folder else numbered["label"])  # type: ignore[index]
    return labels


def _measure(
    names: Sequence[str],
    classes: Sequence[str],
    embeddings: NDArray[np.float32],
    settings: RetrievalSettings,
    device: torch.device,
    out: Path,
) -> None:
    unit = unit_vectors(names, embeddings)
    labels = read_labels(classes)
    num_items, num_classes = len(labels.label), len(labels.counts)
    neighbours = [k for k in NEIGHBOURS if k < num_items]
    recall_at = settings.recall_at or [k for k in RECALL_AT if k < num_items]
    negatives = settings.negatives or [num for num in NEGATIVES if num < num_classes]
    retrieval = retrieve(unit, labels, recall_at=recall_at, neighbours=neighbours, device=device)
    won = verify_against_negatives(unit, labels, negatives, seed=settings.seed, device=device)
    seeds = range(settings.seed, settings.seed + settings.clusterings)
    write_results(_results(labels, retrieval, won, ()), out)  # clustering can take as long again
    agreements = cluster(unit, labels.label, seeds, device=device)
    results = _results(labels, retrieval, won, agreements)
    write_results(results, out)
    sys.stdout.write(format_retrieval(results))


def _results(
    labels: Labels, retrieval: Retrieval, won: Mapping[int, float], agreements: Sequence[Agreement]
) -> dict[str, Any]:
    """Return the figures as results.json holds them."""
    counts = {"items": len(labels.label), "classes": len(labels.counts)}
    results: dict[str, Any] = {"retrieval": retrieval.figures() | counts}
    results["negatives"] = {
        str(num): {"accuracy": share, "se": math.sqrt(share * (1 - share) / retrieval.num_queries)}
        for num, share in won.items()
    }
    if agreements:
        results["clustering"] = {"runs": len(agreements), "clusters": len(labels.counts)}
        for key in _AGREEMENT:
            values = [getattr(agreement, key) for agreement in agreements]
            results["clustering"][key] = float(np.mean(values))
            if len(values) > 1:
                results["clustering"][f"{key}_std"] = float(np.std(values, ddof=1))
    return results


def format_retrieval(results: Mapping[str, Any]) -> str:
    """Return the figures of results.json as aligned text."""
    retrieval = results["retrieval"]
    lines = [
        f"{retrieval['items']:,} items of {retrieval['classes']:,} classes; {retrieval['queries']:,} queries,"
        " each searched for among all others; ties count against the system",
        *(_line(key, value) for key, value in retrieval.items() if isinstance(value, float)),
        "a class mate beats one item of each of M other classes",
        *(_line(f"M = {num}", rate["accuracy"], rate["se"], "SE") for num, rate in results["negatives"].items()),
    ]
    if "clustering" in results:
        clustering = results["clustering"]
        lines.append(f"k-means into {clustering['clusters']:,} clusters, mean of {clustering['runs']} runs")
        lines += [_line(key, clustering[key], clustering.get(f"{key}_std"), "std") for key in _AGREEMENT]
    return "\n".join(lines) + "\n"


def _line(name: str, share: float, spread: float | None = None, kind: str = "") -> str:
    return f"  {name:18}{100 * share:7.2f}%" + ("" if spread is None else f" +- {100 * spread:.2f} ({kind})")
