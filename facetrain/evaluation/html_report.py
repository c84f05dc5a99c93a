"""An evaluation as one HTML page that opens anywhere: figures and what they mean, curves, the hardest pairs."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from facetrain import __version__
from facetrain.evaluation.definitions import DEFINITIONS, PUBLISHED, Published, definition
from facetrain.evaluation.html_page import Html, box, explained, folded, page, picture, section, table, text
from facetrain.evaluation.inputs import ImageKey, image_name
from facetrain.evaluation.lfw import OPEN_SET_FAR, Evaluation, metrics

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

_PUBLISHED_CLOSED_SET = ("closed-best-rowden", "closed-surrogate", "closed-full")
"""What stands beside the published closed set, the nearest first."""


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
        section("Verification", *_verification(evaluation)),
        section("Identification", *_crowd(evaluation), *_closed_set(evaluation), *_open_set(evaluation)),
        section("Curves", box("figures", shown)),
        section("Hardest pairs", *_hardest_pairs(evaluation, read_picture)),
        section("Beside published figures", *_published(evaluation)),
        *_not_run(evaluation),
        section("Every figure", folded("As metric keys, fractions", _all_figures(evaluation))),
        text(f"facetrain {__version__}. Scores are cosine similarities.", "footer"),
    ]
    file.write_text(page(f"{evaluation.dataset}: face evaluation", parts), encoding="utf-8")


def _head(evaluation: Evaluation, subject: str) -> list[Html]:
    counts = (
        f"{evaluation.num_images:,} images of {evaluation.num_people:,} people,"
        f" embeddings {evaluation.embedding_dim} wide"
    )
    outcome = evaluation.verification
    tiles = [
        _tile("verification accuracy", _percent([outcome.accuracy], outcome.se), "mean and standard error of folds")
    ]
    for name in _PUBLISHED_CLOSED_SET:
        if name in evaluation.closed:
            tiles.append(_tile("rank-1", _percent([draw.rank_rate(1) for draw in evaluation.closed[name]]), name))
            break
    for name, draws in evaluation.open.items():
        rates = [draw.dir_at_far(OPEN_SET_FAR) for draw in draws]
        tiles.append(_tile(f"DIR@FAR={OPEN_SET_FAR:.0%}", _percent([rate.value for rate in rates], rates[0].se), name))
        break
    return [
        text(f"Face evaluation: {evaluation.dataset}", "h1"),
        text(f"{subject}: {counts}" if subject else counts, css="quiet"),
        box("tiles", tiles),
    ]


def _tile(measure: str, value: str, basis: str) -> Html:
    return box("tile", [text(measure), text(value, css="value"), text(basis, css="quiet")])


def _verification(evaluation: Evaluation) -> list[Html]:
    outcome = evaluation.verification
    about = explained("accuracy", DEFINITIONS["verification"])
    rows = [[about, _percent([outcome.accuracy], outcome.se), f"population std of the folds {100 * outcome.std:.2f}"]]
    for name, rate in outcome.vr_at_far.items():
        point = rate.point
        basis = (
            f"threshold {point.threshold:.4f}; FAR realised {point.far_realised:.6f}"
            f" ({point.num_accepted:,} of {point.num_impostors:,}, {point.num_tied:,} tied)"
        )
        rows.append([explained(f"VR@FAR={name}", DEFINITIONS["VR@FAR"]), _percent([rate.value], rate.se), basis])
    rows.append([explained("EER", DEFINITIONS["EER"]), _percent([outcome.eer]), ""])
    rows.append([explained("AUC", DEFINITIONS["AUC"]), f"{outcome.auc:.5f}", ""])
    folds = [
        [str(fold), _percent([accuracy]), f"{threshold:.4f}"]
        for fold, (accuracy, threshold) in enumerate(
            zip(outcome.fold_accuracies, outcome.fold_thresholds, strict=True), start=1
        )
    ]
    pairs = evaluation.pairs
    return [
        text(f"{len(outcome.scores):,} pairs in {pairs.num_folds} folds, {pairs.path.name}", css="quiet"),
        table(["measure", "figure", "rests on"], rows),
        folded("Each fold", table(["fold", "accuracy", "threshold"], folds)),
    ]


def _crowd(evaluation: Evaluation) -> list[Html]:
    crowd = evaluation.distractors
    return [text(f"With distractors: {crowd.describe()}.")] if crowd else []


def _closed_set(evaluation: Evaluation) -> list[Html]:
    if not evaluation.closed:
        return []
    rows = [
        [
            explained(name, definition(name)),
            f"{draws[0].gallery:,}",
            f"{len(draws[0].ranks):,}",
            *(_percent([draw.rank_rate(rank) for draw in draws]) for rank in (1, 5)),
            _draws(draws),
        ]
        for name, draws in evaluation.closed.items()
    ]
    return [
        text("Closed set: who of the gallery is it?", "h3"),
        table(["protocol", "gallery", "probes", "rank-1", "rank-5", ""], rows),
        folded("What a rank is", text(DEFINITIONS["rank"])),
    ]


def _open_set(evaluation: Evaluation) -> list[Html]:
    if not evaluation.open:
        return []
    rows = []
    for name, draws in evaluation.open.items():
        rates = [draw.dir_at_far(OPEN_SET_FAR) for draw in draws]
        rows.append(
            [
                explained(name, definition(name)),
                f"{draws[0].gallery:,}",
                f"{len(draws[0].ranks):,}",
                f"{len(draws[0].impostor_scores):,}",
                _percent([draw.rank1 for draw in draws]),
                _percent([rate.value for rate in rates], float(np.mean([rate.se for rate in rates]))),
                f"{np.mean([rate.point.threshold for rate in rates]):.4f}",
                f"{np.mean([rate.point.far_realised for rate in rates]):.6f}",
                str(max(rate.point.num_tied for rate in rates)),
                _draws(draws),
            ]
        )
    measure = f"DIR@FAR={OPEN_SET_FAR:.0%}"
    columns = ["gallery", "probes", "impostors", "rank-1", measure, "threshold", "FAR realised", "tied", ""]
    return [
        text("Open set: who is it, if anybody?", "h3"),
        table(["protocol", *columns], rows),
        folded(f"What {measure} is", text(DEFINITIONS["DIR@FAR"])),
    ]


def _not_run(evaluation: Evaluation) -> list[Html]:
    lines = "".join(text(f"{name} {needs}", "li") for name, needs in evaluation.not_run.items())
    return [section("Not run", Html(f"<ul>{lines}</ul>"))] if lines else []


def _hardest_pairs(evaluation: Evaluation, read_picture: ReadPicture | None) -> list[Html]:
    outcome = evaluation.verification
    genuine, impostor = np.flatnonzero(outcome.is_genuine), np.flatnonzero(~outcome.is_genuine)
    hardest = {
        "Genuine pairs with the lowest scores": genuine[np.argsort(outcome.scores[genuine], kind="stable")],
        "Impostor pairs with the highest scores": impostor[np.argsort(-outcome.scores[impostor], kind="stable")],
    }
    parts = [text("Mislabelled images end up here first: look before blaming the network.", css="quiet")]
    for title, pairs in hardest.items():
        cards = [_pair(evaluation, pair, read_picture) for pair in pairs[:NUM_HARDEST].tolist()]
        parts += [text(title, "h3"), box("pairs", cards)]
    return parts


def _pair(evaluation: Evaluation, pair: int, read_picture: ReadPicture | None) -> Html:
    keys = evaluation.pairs.pairs[pair]
    lines = [text(f"score {evaluation.verification.scores[pair]:.4f}", css="score")]
    lines += [text(image_name(key)) for key in keys]
    if read_picture is None:
        return box("pair", lines)
    faces = [picture(read_picture(key), "image/jpeg", image_name(key)) for key in keys]
    return box("pair", [box("faces", faces), *lines])


def _published(evaluation: Evaluation) -> list[Html]:
    if evaluation.dataset != "lfw":
        return [text(f"None: published figures are of LFW, and this set is {evaluation.dataset}.")]
    closed = next((name for name in _PUBLISHED_CLOSED_SET if name in evaluation.closed), None)
    own = [
        Html('<span class="this">this evaluation</span>'),
        _percent([evaluation.verification.accuracy], evaluation.verification.se),
        f"{_percent([draw.rank_rate(1) for draw in evaluation.closed[closed]])} ({closed})" if closed else "not run",
        _own_open_set(evaluation),
    ]
    return [
        text(
            "The published networks were trained on CASIA-WebFace, and identified on the private lists of Best-Rowden"
            " et al. Verification compares like with like; rank-1 does only under closed-best-rowden; the published"
            " DIR@FAR=1% is that of open-best-rowden."
        ),
        table(["model", "verification", "rank-1", "DIR@FAR=1%"], [own, *map(_published_row, PUBLISHED)]),
        text("Source: Sohn, NeurIPS 2016, for triplet and N-pair.", css="quiet"),
    ]


def _own_open_set(evaluation: Evaluation) -> str:
    if "open-best-rowden" not in evaluation.open:
        return "not run"
    rates = [draw.dir_at_far(OPEN_SET_FAR) for draw in evaluation.open["open-best-rowden"]]
    return f"{_percent([rate.value for rate in rates], rates[0].se)} (open-best-rowden)"


def _published_row(row: Published) -> list[str]:
    se = "" if row.verification_se is None else f" ± {row.verification_se:.2f}"
    others = ["not published" if figure is None else f"{figure:.2f}%" for figure in (row.rank1, row.dir_at_far)]
    return [row.model, f"{row.verification:.2f}%{se}", *others]


def _all_figures(evaluation: Evaluation) -> Html:
    return table(["key", "value"], [[key, f"{value:.6g}"] for key, value in metrics(evaluation).items()])


def _percent(fractions: Sequence[float], se: float | None = None) -> str:
    """Return a fraction with its standard error, or the mean and sample standard deviation of several draws."""
    spread = float(np.std(fractions, ddof=1)) if len(fractions) > 1 else se
    mean = f"{100 * float(np.mean(fractions)):.2f}%"
    return mean if spread is None else f"{mean} ± {100 * spread:.2f}"


def _draws(draws: Sequence[object]) -> str:
    return "" if len(draws) == 1 else f"± is the std of {len(draws)} draws"
