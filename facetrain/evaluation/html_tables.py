"""The tables of the HTML report: what was measured, under which protocol, and what that is, one click away."""

from collections.abc import Sequence

import numpy as np

from facetrain.evaluation.blufr import BlufrOutcome, blufr_figures
from facetrain.evaluation.conventions import InsightFaceFigures
from facetrain.evaluation.definitions import DEFINITIONS, PUBLISHED, Published, definition
from facetrain.evaluation.html_page import Html, explained, folded, table, text
from facetrain.evaluation.inputs import PairList
from facetrain.evaluation.lfw import OPEN_SET_FAR, Evaluation, metrics
from facetrain.evaluation.verification import Verification, View1

DIR_NAME = f"DIR@FAR={OPEN_SET_FAR:.0%}"

PUBLISHED_CLOSED_SET = ("closed-best-rowden", "closed-surrogate", "closed-full")
"""What stands beside the published closed set, the nearest first."""


def verification_tables(outcome: Verification, pairs: PairList) -> list[Html]:
    """Return accuracy and rates of verification, and each fold."""
    about = explained("accuracy", DEFINITIONS["verification"])
    rows = [[about, percent([outcome.accuracy], outcome.se), f"population std of the folds {100 * outcome.std:.2f}"]]
    for name, rate in outcome.vr_at_far.items():
        point = rate.point
        basis = (
            f"threshold {point.threshold:.4f}; FAR realised {point.far_realised:.6f}"
            f" ({point.num_accepted:,} of {point.num_impostors:,}, {point.num_tied:,} tied)"
        )
        rows.append([explained(f"VR@FAR={name}", DEFINITIONS["VR@FAR"]), percent([rate.value], rate.se), basis])
    rows.append([explained("EER", DEFINITIONS["EER"]), percent([outcome.eer]), ""])
    rows.append([explained("AUC", DEFINITIONS["AUC"]), f"{outcome.auc:.5f}", ""])
    folds = [
        [str(fold), percent([accuracy]), f"{threshold:.4f}"]
        for fold, (accuracy, threshold) in enumerate(
            zip(outcome.fold_accuracies, outcome.fold_thresholds, strict=True), start=1
        )
    ]
    return [
        text(f"{len(outcome.scores):,} pairs in {pairs.num_folds} folds, {pairs.path.name}", css="quiet"),
        table(["measure", "figure", "rests on"], rows),
        folded("Each fold", table(["fold", "accuracy", "threshold"], folds)),
    ]


def closed_set_table(evaluation: Evaluation) -> list[Html]:
    """Return rank-1 and rank-5 by protocol; nothing where none was run."""
    if not evaluation.closed:
        return []
    rows = [
        [
            explained(name, definition(name)),
            f"{draws[0].gallery:,}",
            f"{len(draws[0].ranks):,}",
            *(percent([draw.rank_rate(rank) for draw in draws]) for rank in (1, 5)),
            _draws(draws),
        ]
        for name, draws in evaluation.closed.items()
    ]
    return [
        text("Closed set: who of the gallery is it?", "h3"),
        table(["protocol", "gallery", "probes", "rank-1", "rank-5", ""], rows),
        folded("What a rank is", text(DEFINITIONS["rank"])),
    ]


def open_set_table(evaluation: Evaluation) -> list[Html]:
    """Return DIR by protocol; nothing where none was run."""
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
                percent([draw.rank1 for draw in draws]),
                percent([rate.value for rate in rates], float(np.mean([rate.se for rate in rates]))),
                f"{np.mean([rate.point.threshold for rate in rates]):.4f}",
                f"{np.mean([rate.point.far_realised for rate in rates]):.6f}",
                str(max(rate.point.num_tied for rate in rates)),
                _draws(draws),
            ]
        )
    columns = ["gallery", "probes", "impostors", "rank-1", DIR_NAME, "threshold", "FAR realised", "tied", ""]
    return [
        text("Open set: who is it, if anybody?", "h3"),
        table(["protocol", *columns], rows),
        folded(f"What {DIR_NAME} is", text(DEFINITIONS["DIR@FAR"])),
    ]


def insightface_table(figures: InsightFaceFigures) -> list[Html]:
    """Return verification as InsightFace prints it."""
    rows = [
        ["Accuracy-Flip", f"{figures.accuracy:.5f} +- {figures.std:.5f}"],
        ["VAL@FAR=1e-3", f"{figures.vr:.5f} +- {figures.vr_std:.5f} at FAR {figures.far:.5f}"],
    ]
    return [text("As InsightFace prints it", "h3"), table(["measure", "figure"], rows), _about("insightface")]


def view1_table(outcome: View1) -> list[Html]:
    """Return the figures of View 1."""
    rows = [["accuracy", percent([outcome.accuracy], outcome.figures()["se"]), f"{outcome.threshold:.4f}"]]
    return [text("View 1", "h3"), table(["measure", "figure", "threshold"], rows), _about("view1")]


def blufr_table(outcomes: Sequence[BlufrOutcome]) -> list[Html]:
    """Return each trial of BLUFR, their mean and std, and the benchmark's own mean - std."""
    columns = list(blufr_figures(outcomes).values())
    rows = [
        [f"trial {number}", *(percent([column["trials"][number - 1]]) for column in columns)]
        for number in range(1, len(outcomes) + 1)
    ]
    for name, key in (("mean", "mean"), ("std", "std"), ("mean - std", "mean_minus_std")):
        rows.append([name, *(percent([column[key]]) for column in columns)])
    return [table(["", "VR@FAR=0.1%", DIR_NAME, "rank-1"], rows), _about("blufr")]


def interval_table(evaluation: Evaluation) -> list[Html]:
    """Return the intervals of all figures that have one; nothing where none was asked for."""
    rows = [[key, percent([low]), percent([high])] for key, (low, high) in evaluation.intervals.items()]
    return [folded("95% intervals over people (bootstrap)", table(["figure", "from", "to"], rows))] if rows else []


def published_table(evaluation: Evaluation) -> list[Html]:
    """Return this evaluation beside published ones; they are of LFW, so that other sets have none."""
    if evaluation.dataset != "lfw":
        return [text(f"None: published figures are of LFW, and this set is {evaluation.dataset}.")]
    if evaluation.distractors:
        return [text("None: published galleries hold no distractors.")]
    closed = next((name for name in PUBLISHED_CLOSED_SET if name in evaluation.closed), None)
    own = [
        Html('<span class="this">this evaluation</span>'),
        _own_verification(evaluation),
        f"{percent([draw.rank_rate(1) for draw in evaluation.closed[closed]])} ({closed})" if closed else "not run",
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


def _own_verification(evaluation: Evaluation) -> str:
    outcome = evaluation.verification
    return percent([outcome.accuracy], outcome.se) if outcome else "not run"


def _own_open_set(evaluation: Evaluation) -> str:
    if "open-best-rowden" not in evaluation.open:
        return "not run"
    rates = [draw.dir_at_far(OPEN_SET_FAR) for draw in evaluation.open["open-best-rowden"]]
    return f"{percent([rate.value for rate in rates], rates[0].se)} (open-best-rowden)"


def _published_row(row: Published) -> list[str]:
    se = "" if row.verification_se is None else f" ± {row.verification_se:.2f}"
    others = ["not published" if figure is None else f"{figure:.2f}%" for figure in (row.rank1, row.dir_at_far)]
    return [row.model, f"{row.verification:.2f}%{se}", *others]


def figures_table(evaluation: Evaluation) -> Html:
    """Return every figure under its metric key."""
    return table(["key", "value"], [[key, f"{value:.6g}"] for key, value in metrics(evaluation).items()])


def percent(fractions: Sequence[float], se: float | None = None) -> str:
    """Return a fraction with its standard error, or the mean and sample standard deviation of several draws."""
    spread = float(np.std(fractions, ddof=1)) if len(fractions) > 1 else se
    mean = f"{100 * float(np.mean(fractions)):.2f}%"
    return mean if spread is None else f"{mean} ± {100 * spread:.2f}"


def _about(name: str) -> Html:
    return folded("What this is", text(DEFINITIONS[name]))


def _draws(draws: Sequence[object]) -> str:
    return "" if len(draws) == 1 else f"± is the std of {len(draws)} draws"
