"""Draws docs/figures/result.png from what `bash launch/quickstart.sh` left below quickstart/.

Run it from the repository's folder: `python docs/result_figure.py`.
"""

import json
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.image import imread

PEOPLE, IMAGES = 6, 6
MEASURES = {
    "verification\naccuracy": "synthetic/verification/accuracy",
    "closed-full\nrank-1": "synthetic/closed-full/rank1",
    "open-best-rowden\nrank-1": "synthetic/open-best-rowden/rank1",
    "open-best-rowden\nDIR@FAR=1%": "synthetic/open-best-rowden/dir_rank1_at_far_1e-2",
}


def main() -> None:
    """Draw people that the network never trained on, a row each, beside how well it tells such people apart."""
    figure = Figure(figsize=(11, 4.6), dpi=110, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.3))
    folders = [f for f in sorted(Path("quickstart/faces/heldout").iterdir()) if len(list(f.iterdir())) >= IMAGES]
    axes = left.subplots(PEOPLE, IMAGES, gridspec_kw={"wspace": 0, "hspace": 0})
    for row, folder in zip(axes, folders, strict=False):
        for cell, image in zip(row, sorted(folder.iterdir()), strict=False):
            cell.imshow(imread(image))
            cell.set_axis_off()

    plot = right.subplots()
    records = [json.loads(line) for line in Path("quickstart/run/metrics.jsonl").read_text().splitlines()]
    judged = [record for record in records if MEASURES["verification\naccuracy"] in record]
    bars_of = {"untrained": (-0.2, "0.75", judged[0]), "trained": (0.2, "#0072B2", judged[-1])}
    for name, (offset, colour, record) in bars_of.items():
        shares = [100 * record[key] for key in MEASURES.values()]
        bars = plot.bar([x + offset for x in range(len(shares))], shares, 0.38, color=colour, label=name)
        plot.bar_label(bars, fmt="%.1f", fontsize=9)
    plot.set_xticks(range(len(MEASURES)), list(MEASURES))
    plot.set(ylabel="percent", ylim=(0, 105), title="200 drawn people that the network never trained on")
    plot.spines[["top", "right"]].set_visible(False)
    plot.legend(frameon=False)
    target = Path(__file__).parent / "figures" / "result.png"
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target)


if __name__ == "__main__":
    main()
