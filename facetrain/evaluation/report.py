"""What a person reads of an evaluation: a table on the terminal, and in a folder results.json, figures and a page."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from facetrain.evaluation.blufr import BlufrOutcome, blufr_figures
from facetrain.evaluation.conventions import InsightFaceFigures
from facetrain.evaluation.figures import save_figures
from facetrain.evaluation.groups import group_rows
from facetrain.evaluation.html_report import ReadPicture, write_html
from facetrain.evaluation.identification import ClosedSet, OpenSet
from facetrain.evaluation.lfw import OPEN_SET_FAR, Evaluation
from facetrain.evaluation.threshold import NETWORK_KEY
from facetrain.evaluation.verification import Verification, View1
from facetrain.whole_file import write_text

FEW_IMPOSTORS = 10
"""A rate whose threshold lets fewer impostors through than this gets a note."""


def report_to_folder(
    evaluation: Evaluation,
    out: Path,
    *,
    subject: str = "",
    network_sha256: str = "",
    read_picture: ReadPicture | None = None,
) -> None:
    """Print the table, and write `results.json`, `report.html` and `figures/*.png` into the folder `out`.

    Arguments are those of `write_html`; `network_sha256` is the checksum of the weights, where it is one network.
    """
    of_network = {NETWORK_KEY: network_sha256} if network_sha256 else {}
    # First what took hours to compute.
    write_results(evaluation.results | {"thresholds": evaluation.thresholds} | of_network, out)
    sys.stdout.write(format_table(evaluation))
    sys.stdout.flush()
    write_report(evaluation, out, subject=subject, read_picture=read_picture)


def check_out_folder(out: Path) -> None:
    """Refuse a folder that can't take a report, before anything is computed.

    Raises:
        ValueError: It is a file, or a run folder, whose results.json says that training has ended.
    """
    if (out / "config.yaml").exists():
        raise ValueError(f"--out: {out} is a run folder, which keeps its own results.json; expected another folder")
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--out: {out}: expected a folder that can be written to, {there} isn't one")


def write_report(
    evaluation: Evaluation, out: Path, *, subject: str = "", read_picture: ReadPicture | None = None
) -> None:
    """Write `report.html` and `figures/*.png` into the folder `out`, made if missing; see `write_html`."""
    figures = save_figures(evaluation, out / "figures")
    write_html(evaluation, out / "report.html", figures=figures, subject=subject, read_picture=read_picture)


def write_results(results: Mapping[str, Any], out: Path, name: str = "results.json") -> None:
    """Write a JSON file into the folder `out`, made if missing; it is replaced whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / name, json.dumps(results, indent=2, allow_nan=False) + "\n")


def format_table(evaluation: Evaluation) -> str:
    """Return the figures as aligned text; every one stands under the name of its protocol."""
    people = f" of {evaluation.num_people:,} people" if evaluation.num_people else ""
    head = f"{evaluation.dataset}: {evaluation.num_images:,} images{people}, embeddings {evaluation.embedding_dim} wide"
    blocks = [
        [head, *_alignment_lines(evaluation)],
        _verification_lines(evaluation.verification) if evaluation.verification else [],
        aligned(list(group_rows(evaluation.groups))) if evaluation.groups else [],
        _insightface_lines(evaluation.insightface) if evaluation.insightface else [],
        _view1_lines(evaluation.view1) if evaluation.view1 else [],
        _closed_lines(evaluation) if evaluation.closed else [],
        _open_lines(evaluation) if evaluation.open else [],
        _blufr_lines(evaluation.blufr) if evaluation.blufr else [],
        _interval_lines(evaluation) if evaluation.intervals else [],
        [f"distractors: {evaluation.distractors.describe()}"] if evaluation.distractors else [],
        [f"not run: {name} {needs}" for name, needs in evaluation.not_run.items()],
    ]
    return "\n\n".join("\n".join(lines) for lines in blocks if lines) + "\n"


def describe_not_aligned(names: Sequence[str], num_images: int) -> str:
    """Say how many photographs had no face to align, and the first of them."""
    named = f": {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else ""
    return f"faces not found, centre taken instead: {len(names)} of {num_images:,}{named}"


def _alignment_lines(evaluation: Evaluation) -> list[str]:
    names = evaluation.not_aligned
    return [] if names is None else [f"  {describe_not_aligned(names, evaluation.num_images)}"]


def _verification_lines(outcome: Verification) -> list[str]:
    spread = f"+- {100 * outcome.se:.2f} standard error (population std {100 * outcome.std:.2f})"
    lines = [
        f"verification, {len(outcome.fold_accuracies)} folds",
        f"  accuracy       {_percent(outcome.accuracy)} {spread}",
    ]
    for name, rate in outcome.vr_at_far.items():
        point = rate.point
        rests = f", rests on {point.num_accepted} impostor pairs" if point.num_accepted < FEW_IMPOSTORS else ""
        lines.append(
            f"  VR@FAR={name}    {_percent(rate.value)} +- {100 * rate.se:.2f}; threshold {point.threshold:.4f}, "
            f"FAR realised {point.far_realised:.6f}, {point.num_tied} tied{rests}"
        )
    return [*lines, f"  EER            {_percent(outcome.eer)}", f"  AUC            {outcome.auc:.5f}"]


def _insightface_lines(figures: InsightFaceFigures) -> list[str]:
    return [
        "verification as InsightFace prints it: squared distances on a grid, population std",
        f"  Accuracy-Flip  {figures.accuracy:.5f}+-{figures.std:.5f}",
        f"  VAL@FAR=1e-3   {figures.vr:.5f}+-{figures.vr_std:.5f} at FAR {figures.far:.5f}",
    ]


def _view1_lines(outcome: View1) -> list[str]:
    figures = outcome.figures()
    return [
        f"view 1, {outcome.num_pairs:,} pairs, threshold {outcome.threshold:.4f} from its training list",
        f"  accuracy       {_percent(outcome.accuracy)} +- {100 * figures['se']:.2f} standard error",
    ]


def _closed_lines(evaluation: Evaluation) -> list[str]:
    rows = [["closed-set identification", "gallery", "probes", "rank-1", "rank-5", ""]]
    for name, draws in evaluation.closed.items():
        rank_rates = [_mean_std([draw.rank_rate(rank) for draw in draws]) for rank in (1, 5)]
        rows.append([f"  {name}", f"{draws[0].gallery:,}", f"{len(draws[0].ranks):,}", *rank_rates, _draws(draws)])
    return aligned(rows)


def _open_lines(evaluation: Evaluation) -> list[str]:
    head = [
        "gallery",
        "probes",
        "impostors",
        "rank-1",
        f"DIR@FAR={OPEN_SET_FAR:.0%}",
        "SE",
        "threshold",
        "FAR realised",
        "tied",
        "",
    ]
    rows = [["open-set identification", *head]]
    for name, draws in evaluation.open.items():
        rates = [draw.dir_at_far(OPEN_SET_FAR) for draw in draws]
        rows.append(
            [
                f"  {name}",
                f"{draws[0].gallery:,}",
                f"{len(draws[0].ranks):,}",
                f"{len(draws[0].impostor_scores):,}",
                _mean_std([draw.rank1 for draw in draws]),
                _mean_std([rate.value for rate in rates]),
                f"{100 * float(np.mean([rate.se for rate in rates])):.2f}",
                f"{np.mean([rate.point.threshold for rate in rates]):.4f}",
                f"{np.mean([rate.point.far_realised for rate in rates]):.6f}",
                str(max(rate.point.num_tied for rate in rates)),
                _draws(draws),
            ]
        )
    note = (
        "DIR is of rank 1, SE its binomial standard error; tied: impostor scores that equal the threshold (1: no tie)"
    )
    return [*aligned(rows), f"  {note}"]


def _blufr_lines(outcomes: Sequence[BlufrOutcome]) -> list[str]:
    summary = blufr_figures(outcomes)
    head = [
        "blufr",
        "VR@FAR=0.1%",
        f"DIR@FAR={OPEN_SET_FAR:.0%}",
        "rank-1",
        "genuine pairs",
        "impostor pairs",
        "genuine",
    ]
    rows = [[*head, "impostors"]]
    for number, outcome in enumerate(outcomes, start=1):
        counts = (
            outcome.verification.num_genuine,
            outcome.verification.point.num_impostors,
            len(outcome.identification.ranks),
            len(outcome.identification.impostor_scores),
        )
        figures = [_percent(figure["trials"][number - 1]) for figure in summary.values()]
        rows.append([f"  trial {number}", *figures, *(f"{count:,}" for count in counts)])
    for name, key in (("mean", "mean"), ("std", "std"), ("mean - std", "mean_minus_std")):
        rows.append([f"  {name}", *(_percent(figure[key]) for figure in summary.values()), *[""] * 4])
    return [*aligned(rows), "  DIR is of rank 1; genuine and impostors are probes, as many as the trial has"]


def _interval_lines(evaluation: Evaluation) -> list[str]:
    rows = [["95% intervals over people (bootstrap)", "from", "to"]]
    rows += [[f"  {key}", _percent(low), _percent(high)] for key, (low, high) in evaluation.intervals.items()]
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines, the first column to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    ]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}%"


def _mean_std(values: Sequence[float]) -> str:
    mean = _percent(float(np.mean(values)))
    return mean if len(values) == 1 else f"{mean} +- {100 * float(np.std(values, ddof=1)):.2f}"


def _draws(draws: Sequence[ClosedSet] | Sequence[OpenSet]) -> str:
    return "" if len(draws) == 1 else f"mean +- std of {len(draws)} draws"
