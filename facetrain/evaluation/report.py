"""What a person reads of an evaluation: a table on the terminal, and in a folder results.json, figures and a page."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrain.evaluation.distractors import DistractorScores
from facetrain.evaluation.figures import save_figures
from facetrain.evaluation.html_report import ReadPicture, write_html
from facetrain.evaluation.identification import ClosedSet, OpenSet
from facetrain.evaluation.lfw import OPEN_SET_FAR, Evaluation, evaluate

FEW_IMPOSTORS = 10
"""A rate whose threshold lets fewer impostors through than this gets a note."""


def evaluate_to_folder(
    names: Sequence[str],
    embeddings: NDArray[np.float32],
    *,
    pairs: Path,
    open_set_people: Path | None,
    out: Path,
    draws: int = 1,
    dataset: str = "lfw",
    seed: int = 0,
    distractors: DistractorScores | None = None,
    subject: str = "",
    read_picture: ReadPicture | None = None,
) -> Evaluation:
    """Evaluate, print the table, and write `results.json`, `report.html` and `figures/*.png` into the folder `out`.

    Arguments and errors are those of `evaluate`; `subject` and `read_picture` are those of `write_html`.
    """
    evaluation = evaluate(
        names,
        embeddings,
        pairs=pairs,
        open_set_people=open_set_people,
        draws=draws,
        dataset=dataset,
        seed=seed,
        distractors=distractors,
    )
    write_report(evaluation, out, subject=subject, read_picture=read_picture)
    write_results(evaluation.results, out)
    sys.stdout.write(format_table(evaluation))
    return evaluation


def write_report(
    evaluation: Evaluation, out: Path, *, subject: str = "", read_picture: ReadPicture | None = None
) -> None:
    """Write `report.html` and `figures/*.png` into the folder `out`, made if missing; see `write_html`."""
    figures = save_figures(evaluation, out / "figures")
    write_html(evaluation, out / "report.html", figures=figures, subject=subject, read_picture=read_picture)


def write_results(results: Mapping[str, Any], out: Path) -> None:
    """Write `results.json` into the folder `out`, made if missing; the file is replaced whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    unfinished = out / f".results.json.{os.getpid()}"
    unfinished.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    unfinished.replace(out / "results.json")


def format_table(evaluation: Evaluation) -> str:
    """Return the figures as aligned text; every one stands under the name of its protocol."""
    lines = [
        f"{evaluation.dataset}: {evaluation.num_images:,} images of {evaluation.num_people:,} people, "
        f"embeddings {evaluation.embedding_dim} wide",
        "",
        *_verification_lines(evaluation),
        "",
        *_closed_lines(evaluation),
        "",
        *_open_lines(evaluation),
    ]
    if evaluation.distractors:
        lines += ["", f"distractors: {evaluation.distractors.describe()}"]
    if evaluation.not_run:
        lines.append("")
        lines += [f"not run: {name} {needs}" for name, needs in evaluation.not_run.items()]
    return "\n".join(lines) + "\n"


def _verification_lines(evaluation: Evaluation) -> list[str]:
    outcome = evaluation.verification
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


def _closed_lines(evaluation: Evaluation) -> list[str]:
    rows = [["closed-set identification", "gallery", "probes", "rank-1", "rank-5", ""]]
    for name, draws in evaluation.closed.items():
        rank_rates = [_mean_std([draw.rank_rate(rank) for draw in draws]) for rank in (1, 5)]
        rows.append([f"  {name}", f"{draws[0].gallery:,}", f"{len(draws[0].ranks):,}", *rank_rates, _draws(draws)])
    return _aligned(rows)


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
    return [*_aligned(rows), f"  {note}"]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
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
