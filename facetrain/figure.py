"""Drawing on axes, to a PNG file.

Sole importer of matplotlib, through its object interface, so that no global state and no display is touched.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
"""Told apart by the colour-blind. Source: Okabe and Ito, 2008."""


def save_figure(path: Path, draw: "Callable[[Axes], None]") -> Path:
    """Let `draw` draw on one pair of axes, in the one look that all figures share, and return the path of the PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    axes.grid(which="major", color="0.88")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return path
