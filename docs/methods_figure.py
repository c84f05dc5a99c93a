"""Draws docs/figures/methods.png from the lines of benchmarks/methods.py: over N, over images seen, and overfitting.

Run it from the repository's folder: `python docs/methods_figure.py methods.jsonl`.
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

SHOWN = ("softmax", "group", "triplet random", "triplet semi-hard", "npair-ovo", "npair-mc 96", "npair-angular")
COLOURS = ("#000000", "#E69F00", "#0072B2", "#56B4E9", "#009E73", "#D55E00", "#CC79A7")
"""One colour per method, told apart by the colour-blind. Source: Okabe and Ito, 2008."""
FIGURES = ("LFW verification", "rank-1", "DIR@FAR=1%")


def main(file: Path) -> None:
    """Draw the runs of seed 0."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    first = {
        line["run"]["method"]: line for line in lines if (line["run"]["stage"], line["run"]["seed"]) == ("final", 0)
    }
    figure = Figure(figsize=(13, 4.6), dpi=120, layout="constrained")
    over_n, over_images, overfitting = figure.subplots(1, 3, width_ratios=(2, 3, 3))
    draw_over_n(over_n, first)
    draw_over_images(over_images, first)
    draw_overfitting(overfitting, first)
    for axes in (over_n, over_images, overfitting):
        axes.grid(color="0.88")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig("docs/figures/methods.png")


def draw_over_n(axes: Any, finals: dict[str, Any]) -> None:
    """Draw the figures of LFW over the pairs of a batch."""
    pairs = {int(method.split()[1]): line for method, line in finals.items() if is_npair(method)}
    for name, colour in zip(FIGURES, COLOURS[2::2], strict=False):
        axes.plot(sorted(pairs), [100 * pairs[n][name] for n in sorted(pairs)], "o-", color=colour, label=name)
    axes.set(title="npair-mc on LFW, %", xlabel="N, pairs of a batch; as many images seen", ylim=(0, 100))
    axes.set_xticks(sorted(pairs))
    axes.legend(loc="center right")


def draw_over_images(axes: Any, finals: dict[str, Any]) -> None:
    """Draw how the triplet loss of held-out people falls."""
    for method, colour in zip(SHOWN, COLOURS, strict=True):
        curve = finals[method]["curve"]
        images = [point["images"] / 1000 for point in curve]
        axes.plot(images, [point["triplet_loss"] for point in curve], ".-", color=colour, label=method)
    axes.set(title="Triplet loss of held-out people", xlabel="training images seen, thousands", ylim=(0, None))
    axes.legend(ncols=2, loc="upper right", fontsize="small")


def draw_overfitting(axes: Any, finals: dict[str, Any]) -> None:
    """Draw each method's last Recall@1 of people that it was trained on, and of people that it wasn't."""
    last = {method: line["curve"][-1] for method, line in finals.items()}
    methods = sorted(last, key=lambda method: last[method]["heldout_recall_at_1"])
    held_out, trained = (
        [100 * last[method][key] for method in methods] for key in ("heldout_recall_at_1", "train_recall_at_1")
    )
    axes.hlines(methods, held_out, trained, color="0.7")
    axes.plot(held_out, methods, "o", color=COLOURS[5], label="held out")
    axes.plot(trained, methods, "o", color=COLOURS[2], label="trained on")
    axes.set(title="Recall@1 at the end, %", xlim=(0, None))
    axes.legend(loc="lower right")


def is_npair(method: str) -> bool:
    """Return whether a method is npair-mc with so many pairs, and nothing else."""
    words = method.split()
    return len(words) == 2 and words[0] == "npair-mc" and words[1].isdigit()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
