"""An evaluation as one HTML page that opens anywhere: figures and what they mean, curves, the hardest pairs."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from facetrain import __version__
from facetrain.evaluation.groups import group_rows
from facetrain.evaluation.html_page import Html, box, folded, page, picture, section, table, text
from facetrain.evaluation.html_tables import (
    DIR_NAME,
    PUBLISHED_CLOSED_SET,
    blufr_table,
    closed_set_table,
    figures_table,
    insightface_table,
    interval_table,
    open_set_table,
    percent,
    published_table,
    verification_tables,
    view1_table,
)
from facetrain.evaluation.inputs import ImageKey, PairList, image_name
from facetrain.evaluation.lfw import OPEN_SET_FAR, Evaluation
from facetrain.evaluation.verification import Verification

ReadPicture = Callable[[ImageKey], bytes]
"""Gives the JPEG of an image of the evaluated set."""

NUM_HARDEST = 12
"""Genuine pairs, and as many impostor pairs, that are shown."""

_FIGURES = {
    "roc": "Verification: verification rate over false accept rate",
    "det": "Verification: false reject rate over false accept rate",
    "scores": "Verification: scores of genuine and of impostor pairs",
    "dir_over_far": "Open set: detection and identification rate over false accept rate",
    "open_scores": "Open set: scores of genuine and of impostor probes",
    "cmc": "Closed set: share of probes whose person has a rank or better",
}
"""What a figure shows, by the name of its file."""


def write_html(
    evaluation: Evaluation,
    file: Path,
    *,
    figures: Sequence[Path],
    subject: str = "",
    read_picture: ReadPicture | None = None,
) -> None:
    """Write the report, one file that needs no other.

    Args:
        evaluation: What to show.
        file: Where to; its folder exists.
        figures: PNG files as `save_figures` names them.
        subject: What was evaluated, such as the path of a checkpoint.
        read_picture: Gives the pictures of the hardest pairs; without it they stand as names and scores.
    """
    shown = [picture(figure.read_bytes(), "image/png", _FIGURES.get(figure.stem, figure.stem)) for figure in figures]
    parts = [
        *_head(evaluation, subject),
        *_sections(evaluation, shown, read_picture),
        text(f"facetrain {__version__}. Scores are cosine similarities.", "footer"),
    ]
    file.write_text(page(f"{evaluation.dataset}: face evaluation", parts), encoding="utf-8")


def _sections(evaluation: Evaluation, figures: list[Html], read_picture: ReadPicture | None) -> Iterator[Html]:
    """Yield a section for all that was run."""
    outcome, pairs = evaluation.verification, evaluation.pairs
    verification = verification_tables(outcome, pairs) if outcome and pairs else []
    verification += insightface_table(evaluation.insightface) if evaluation.insightface else []
    verification += view1_table(evaluation.view1) if evaluation.view1 else []
    if verification:
        yield section("Verification", *verification)
    if evaluation.groups:
        head, *rows = group_rows(evaluation.groups)
        note = text("Pairs within a group that are accepted at the one threshold of the whole set.", css="quiet")
        yield section("Groups", note, table(head, rows))
    if evaluation.closed or evaluation.open:
        crowd = evaluation.distractors
        about = [text(f"With distractors: {crowd.describe()}.")] if crowd else []
        yield section("Identification", *about, *closed_set_table(evaluation), *open_set_table(evaluation))
    if evaluation.blufr:
        yield section("BLUFR", *blufr_table(evaluation.blufr))
    if figures:
        yield section("Curves", box("figures", figures))
    if outcome and pairs:
        yield section("Hardest pairs", *_hardest_pairs(outcome, pairs, read_picture))
    yield section("Beside published figures", *published_table(evaluation))
    if evaluation.not_run:
        lines = "".join(text(f"{name} {needs}", "li") for name, needs in evaluation.not_run.items())
        yield section("Not run", Html(f"<ul>{lines}</ul>"))
    all_figures = folded("As metric keys, fractions", figures_table(evaluation))
    yield section("Every figure", *interval_table(evaluation), all_figures)


def _head(evaluation: Evaluation, subject: str) -> list[Html]:
    people = f" of {evaluation.num_people:,} people" if evaluation.num_people else ""
    counts = f"{evaluation.num_images:,} images{people}, embeddings {evaluation.embedding_dim} wide"
    if evaluation.not_aligned is not None:
        counts += f"; faces not found, centre taken instead: {len(evaluation.not_aligned):,}"
    outcome, tiles = evaluation.verification, []
    if outcome:
        accuracy = percent([outcome.accuracy], outcome.se)
        tiles.append(_tile("verification accuracy", accuracy, "mean and standard error of the folds"))
    crowd = f", {evaluation.distractors.count:,} distractors" if evaluation.distractors else ""
    for name in PUBLISHED_CLOSED_SET:
        if name in evaluation.closed:
            tiles.append(
                _tile("rank-1", percent([draw.rank_rate(1) for draw in evaluation.closed[name]]), name + crowd)
            )
            break
    for name, draws in evaluation.open.items():
        rates = [draw.dir_at_far(OPEN_SET_FAR) for draw in draws]
        tiles.append(_tile(DIR_NAME, percent([rate.value for rate in rates], rates[0].se), name + crowd))
        break
    return [
        text(f"Face evaluation: {evaluation.dataset}", "h1"),
        text(f"{subject}: {counts}" if subject else counts, css="quiet"),
        box("tiles", tiles),
    ]


def _tile(measure: str, value: str, basis: str) -> Html:
    return box("tile", [text(measure), text(value, css="value"), text(basis, css="quiet")])


def _hardest_pairs(outcome: Verification, pairs: PairList, read_picture: ReadPicture | None) -> list[Html]:
    genuine, impostor = np.flatnonzero(outcome.is_genuine), np.flatnonzero(~outcome.is_genuine)
    hardest = {
        "Genuine pairs with the lowest scores": genuine[np.argsort(outcome.scores[genuine], kind="stable")],
        "Impostor pairs with the highest scores": impostor[np.argsort(-outcome.scores[impostor], kind="stable")],
    }
    parts = [text("Mislabelled images end up here first: look before blaming the network.", css="quiet")]
    for title, order in hardest.items():
        cards = [_pair(pairs.pairs[n], outcome.scores[n], read_picture) for n in order[:NUM_HARDEST].tolist()]
        parts += [text(title, "h3"), box("pairs", cards)]
    return parts


def _pair(keys: tuple[ImageKey, ImageKey], score: float, read_picture: ReadPicture | None) -> Html:
    lines = [text(f"score {score:.4f}", css="score")]
    lines += [text(image_name(key)) for key in keys]
    if read_picture is None:
        return box("pair", lines)
    try:
        faces = [picture(read_picture(key), "image/jpeg", image_name(key)) for key in keys]
    except ValueError as error:  # an image that can't be decoded costs its picture, not the report
        return box("pair", [*lines, text(str(error), css="quiet")])
    return box("pair", [box("faces", faces), *lines])
