"""Draws docs/figures/methods.png from the lines of benchmarks/methods.py: quality over N, and over images seen.

Run it from the repository's folder: `python docs/methods_figure.py methods.jsonl`.
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

SHOWN = ("triplet random", "triplet semi-hard", "npair-ovo", "npair-mc 96", "group", "softmax")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""One colour per method, told apart by the colour-blind. Source: Okabe and Ito, 2008."""
FIGURES = ("LFW verification", "rank-1", "DIR@FAR=1%")


def main(file: Path) -> None:
    """Draw the runs of seed 0."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    first = {
        line["run"]["method"]: line for line in lines if (line["run"]["stage"], line["run"]["seed"]) == ("final", 0)
    }
    figure = Figure(figsize=(12, 4.2), dpi=120, layout="constrained")
    over_n, over_images, overfitting = figure.subplots(1, 3)
    draw_over_n(over_n, first)
    for method, colour in zip(SHOWN, COLOURS, strict=True):
        if method in first:
            draw_curves(over_images, overfitting, first[method]["curve"], method, colour)
    over_images.set(title="Common held-out triplet loss", xlabel="training images seen", yscale="log")
    overfitting.set(title="Recall@1, held out (solid) and trained on (dotted)", xlabel="training images seen")
    over_images.legend()
    for axes in (over_n, over_images, overfitting):
        axes.grid(color="0.88")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig("docs/figures/methods.png")


def draw_over_n(axes: Any, finals: dict[str, Any]) -> None:
    """Draw the figures of LFW over the pairs of a batch."""
    pairs = {int(method.split()[1]): line for method, line in finals.items() if is_npair(method)}
    for name, colour in zip(FIGURES, COLOURS, strict=False):
        axes.plot(sorted(pairs), [pairs[n][name] for n in sorted(pairs)], "o-", color=colour, label=name)
    axes.set(title="npair-mc on LFW, the same images seen", xlabel="N, pairs of a batch", ylim=(0, 1))
    axes.legend()


def is_npair(method: str) -> bool:
    """Return whether a method is npair-mc with so many pairs, and nothing else."""
    words = method.split()
    return len(words) == 2 and words[0] == "npair-mc" and words[1].isdigit()


def draw_curves(loss: Any, recall: Any, curve: list[dict[str, Any]], method: str, colour: str) -> None:
    """Draw what a method's checkpoints gave."""
    images = [point["images"] for point in curve]
    loss.plot(images, [point["triplet_loss"] for point in curve], ".-", color=colour, label=method)
    for key, style in (("heldout_recall_at_1", "-"), ("train_recall_at_1", ":")):
        recall.plot(images, [point[key] for point in curve], style, color=colour)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
