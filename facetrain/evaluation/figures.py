"""Curves of an evaluation as PNG files: ROC, DET, DIR over FAR, CMC, and how scores are distributed."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from facetrain.evaluation.lfw import OPEN_SET_FAR, Evaluation
from facetrain.evaluation.threshold import FloatArray
from facetrain.figure import COLOURS, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_RANK = 20
"""Last rank of the CMC."""
FINEST_FAR = 1e-3
"""Where the FAR axis of DIR begins; further left a handful of impostor probes decides."""
NUM_BINS = 80
"""Bins of a histogram of scores."""

_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_MARKERS = "os^Dv"

Drawing = Callable[["Axes", Evaluation], None]


def save_figures(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write roc, det, scores, dir_over_far, open_scores and cmc as PNG into the folder, and return their paths.

    The folder is made if missing. A figure whose protocols were not run is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, Drawing] = {}
    if evaluation.verification:
        drawings |= {"roc": _draw_roc, "det": _draw_det, "scores": _draw_scores}
    if evaluation.open:
        drawings |= {"dir_over_far": _draw_dir, "open_scores": _draw_open_scores}
    if evaluation.closed:
        drawings["cmc"] = _draw_cmc
    return [_save(folder / f"{name}.png", draw, evaluation) for name, draw in drawings.items()]


def _draw_roc(axes: "Axes", evaluation: Evaluation) -> None:
    outcome = evaluation.verification
    assert outcome is not None  # save_figures leaves it out otherwise
    shown = outcome.roc.far > 0  # what a log axis can show
    far, vr = outcome.roc.far[shown], outcome.roc.vr[shown]
    axes.step(far, vr, where="post", color=COLOURS[0], label=f"verification: AUC {outcome.auc:.4f}")
    for number, (name, rate) in enumerate(outcome.vr_at_far.items(), start=1):
        style: dict[str, Any] = {"color": COLOURS[number], "marker": _MARKERS[number], "linestyle": "none"}
        axes.plot(rate.point.far_realised, rate.value, label=f"VR@FAR={name}: {rate.value:.2%}", zorder=3, **style)
    axes.set(xlabel="false accept rate (FAR)", ylabel="verification rate (VR)")
    axes.set_title(f"{evaluation.dataset}: verification, ROC")
    _log_far(axes, from_far=float(far[0]))
    _fit_rates(axes, float(vr[0]), 1.0)


def _draw_det(axes: "Axes", evaluation: Evaluation) -> None:
    outcome = evaluation.verification
    assert outcome is not None  # as above
    missed = 1.0 - outcome.roc.vr
    shown = (outcome.roc.far > 0) & (missed > 0)  # what log axes can show
    axes.step(outcome.roc.far[shown], missed[shown], where="post", color=COLOURS[0], label="verification")
    axes.axline((0.01, 0.01), (0.1, 0.1), color="0.4", linewidth=0.8, zorder=0)
    if outcome.eer > 0:
        axes.plot(outcome.eer, outcome.eer, "o", color=COLOURS[1], label=f"EER: {outcome.eer:.2%}")
    axes.set(xlabel="false accept rate (FAR)", ylabel="false reject rate (FRR = 1 - VR)", yscale="log")
    axes.set_title(f"{evaluation.dataset}: verification, DET")
    num_genuine = int(np.count_nonzero(outcome.is_genuine))
    _log_far(axes, from_far=1 / (len(outcome.scores) - num_genuine))
    axes.set_ylim(min(1 / num_genuine, 0.1), 1.0)


def _draw_scores(axes: "Axes", evaluation: Evaluation) -> None:
    outcome = evaluation.verification
    assert outcome is not None  # as above
    _draw_histograms(
        axes,
        genuine=("genuine pairs", outcome.scores[outcome.is_genuine]),
        impostor=("impostor pairs", outcome.scores[~outcome.is_genuine]),
        thresholds={f"FAR={name}": rate.point.threshold for name, rate in outcome.vr_at_far.items()},
    )
    axes.set_title(f"{evaluation.dataset}: verification, scores")


def _draw_open_scores(axes: "Axes", evaluation: Evaluation) -> None:
    name, (draw, *_) = next(iter(evaluation.open.items()))
    _draw_histograms(
        axes,
        genuine=("genuine probes: own person", draw.own_scores),
        impostor=("impostor probes: best of the gallery", draw.impostor_scores),
        thresholds={f"FAR={OPEN_SET_FAR:.0%}": draw.dir_at_far(OPEN_SET_FAR).point.threshold},
    )
    axes.set_title(f"{evaluation.dataset}: {name}, scores")


def _draw_histograms(
    axes: "Axes",
    *,
    genuine: tuple[str, FloatArray],
    impostor: tuple[str, FloatArray],
    thresholds: Mapping[str, float],
) -> None:
    """Draw both kinds of scores, each as shares of its own number, over the same bins."""
    both = np.concatenate([genuine[1], impostor[1]])
    bins = np.linspace(both.min() - 1e-3, both.max() + 1e-3, NUM_BINS + 1)
    for number, (label, scores) in enumerate((genuine, impostor)):
        shares = np.histogram(scores, bins)[0] / len(scores)
        axes.stairs(shares, bins, fill=True, alpha=0.35, color=COLOURS[number])
        axes.stairs(shares, bins, color=COLOURS[number], label=f"{label} ({len(scores):,})")
    for number, (label, threshold) in enumerate(thresholds.items()):
        axes.axvline(threshold, color="0.2", linewidth=1, linestyle=_DASHES[number], label=f"threshold of {label}")
    axes.set(xlabel="score (cosine similarity)", ylabel="share of the pairs or probes of a kind")
    axes.set_ylim(0, 1.35 * axes.dataLim.ymax)  # room for the legend


def _draw_dir(axes: "Axes", evaluation: Evaluation) -> None:
    from_far = max(FINEST_FAR, min(1 / len(draws[0].impostor_scores) for draws in evaluation.open.values()))
    rates_in_sight = []
    for number, (name, draws) in enumerate(evaluation.open.items()):
        rate = np.mean([draw.dir_at_far(OPEN_SET_FAR).value for draw in draws])
        of_draws = f", mean of {len(draws)} draws" if len(draws) > 1 else ""
        label = f"{name}: {rate:.2%} at FAR {OPEN_SET_FAR:.0%}{of_draws}"
        for draw in draws:
            style: dict[str, Any] = {**_style(number), "alpha": len(draws) ** -0.5}
            far, dir_rate = draw.dir_curve()
            axes.step(far, dir_rate, where="post", label=label, **style)
            rates_in_sight.append(dir_rate[far >= from_far])
            label = "_only the first draw stands in the legend"
    axes.axvline(OPEN_SET_FAR, color="0.4", linewidth=0.8, zorder=0)
    axes.set(xlabel="false accept rate (FAR)", ylabel="detection and identification rate (DIR), rank 1")
    axes.set_title(f"{evaluation.dataset}: open-set identification, DIR over FAR")
    _log_far(axes, from_far=from_far)
    shown = np.concatenate(rates_in_sight)
    _fit_rates(axes, float(shown.min()), float(shown.max()))


def _draw_cmc(axes: "Axes", evaluation: Evaluation) -> None:
    ranks = np.arange(1, MAX_RANK + 1)
    for number, (name, draws) in enumerate(evaluation.closed.items()):
        rates = np.array([draw.cmc(MAX_RANK) for draw in draws])
        mean = rates.mean(axis=0)
        of_draws = f", mean and range of {len(draws)} draws" if len(draws) > 1 else ""
        label = f"{name}: rank-1 {mean[0]:.2%}{of_draws}"
        axes.plot(ranks, mean, marker=_MARKERS[number], markersize=4, label=label, **_style(number))
        axes.fill_between(ranks, rates.min(axis=0), rates.max(axis=0), color=COLOURS[number], alpha=0.15, linewidth=0)
    axes.set(xlabel="rank", ylabel="probes whose person has this rank or better", xticks=[1, 5, 10, 15, 20])
    axes.set_title(f"{evaluation.dataset}: closed-set identification, CMC")
    outcomes = [draw for draws in evaluation.closed.values() for draw in draws]
    lowest, highest = min(draw.rank_rate(1) for draw in outcomes), max(draw.rank_rate(MAX_RANK) for draw in outcomes)
    _fit_rates(axes, lowest, highest)


def _style(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number], "linestyle": _DASHES[number]}


def _log_far(axes: "Axes", *, from_far: float) -> None:
    axes.set_xscale("log")
    axes.set_xlim(min(from_far, 0.1), 1.0)  # also where all impostor scores tie and 1 is the only FAR


def _fit_rates(axes: "Axes", lowest: float, highest: float) -> None:
    """Show all rates: from 0 where the lowest is below 50%, up to 100% where the highest is above."""
    bottom = min(max(lowest - 0.08 * (1.0 - lowest), 0.0), 0.99) if lowest > 0.5 else 0.0
    top = 1.0 if highest > 0.5 else max(highest, 0.01)
    axes.set_ylim(bottom, top + 0.03 * (top - bottom))


def _save(path: Path, draw: Drawing, evaluation: Evaluation) -> Path:
    def draw_rates(axes: "Axes") -> None:
        draw(axes, evaluation)
        axes.yaxis.set_major_formatter(lambda rate, _: f"{100 * rate:.4g}%")
        axes.legend(loc="best", framealpha=0.9)

    return save_figure(path, draw_rates)
