"""Draws docs/figures/scaling.png: memory of a GPU and images/s from 1 to 4,096 GPUs, by `facetrain estimate`.

Run it from the repository's folder: `python docs/scaling_figure.py`; it takes a minute.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from facetrain.command_line import load_config
from facetrain.config import Config
from facetrain.estimate.cluster import Cluster
from facetrain.estimate.model import Estimate, estimate

WORLD_SIZES = [2**k for k in range(13)]
IDENTITIES = 2_000_000
COLOURS = {
    "network": "#0072B2",
    "loss": "#56B4E9",
    "update": "#999999",
    "embeddings": "#009E73",
    "batch statistics": "#CC79A7",
    "gradients": "#D55E00",
    "parameters": "#E69F00",
    "running statistics": "#F0E442",
    "mining": "#8C6BB1",
    "waiting for images": "#000000",
    "weights": "#0072B2",
    "optimizer state": "#E69F00",
    "optimizer's share of weights": "#F0E442",
    "activations": "#009E73",
    "bucket of gradients": "#CC79A7",
    "loss or reduction beside them": "#56B4E9",
    "images": "#999999",
    "mining table": "#8C6BB1",
}
"""One colour per part, with which people of any colour vision can tell them apart (Okabe and Ito, 2008)."""


def main() -> None:
    """Draw iResNet-50 with a fixed share per GPU, and with a fixed batch that GradCache cuts into chunks."""
    base = load_config(Path("configs/casia_iresnet50.yaml"))
    free = replace(
        base, model=replace(base.model, norm="group", sync_batchnorm=False), mining=replace(base.mining, mode="off")
    )
    columns = {
        "128 pairs on every GPU: the batch grows": lambda config, W: run(config, 128 * W, None, W),
        "N = 65,536 in chunks of 128: the share shrinks": lambda config, W: run(
            config, 65_536, min(128, 65_536 // W), W
        ),
    }
    figure = Figure(figsize=(12, 11), dpi=100, layout="constrained")
    axes = figure.subplots(3, 2, sharex=True, sharey="row")
    for column, (title, estimate_at) in enumerate(columns.items()):
        found, without = ([estimate_at(config, W) for W in WORLD_SIZES] for config in (base, free))
        axes[0, column].set_title(title)
        draw_memory(axes[0, column], found)
        draw_speed(axes[1, column], found, without)
        draw_shares(axes[2, column], found)
        axes[2, column].set(xlabel="GPUs, 8 of a machine")
    for row in axes:
        row[1].legend(*unique_labels(row), frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    target = Path(__file__).parent / "figures" / "scaling.png"
    figure.savefig(target)


def run(base: Config, global_pairs: int, micro_pairs: int | None, world_size: int) -> Estimate:
    """Return the estimate of a variant of the config; mining's candidates keep pace with the batch."""
    config = replace(
        base,
        train=replace(base.train, global_pairs=global_pairs, micro_pairs=micro_pairs),
        mining=replace(base.mining, candidates=max(base.mining.candidates, 2 * global_pairs)),
    )
    nodes = max(1, world_size // 8)
    return estimate(config, Cluster(nodes=nodes, gpus_per_node=world_size // nodes), identities=IDENTITIES)


def draw_memory(plot: Any, found: list[Estimate]) -> None:
    """Stack the parts of a GPU's memory."""
    parts = list(dict.fromkeys(part for e in found for part in (e.memory.kept | e.memory.in_step)))
    heights = [[(e.memory.kept | e.memory.in_step).get(part, 0) / 1e9 for e in found] for part in parts]
    plot.stackplot(WORLD_SIZES, heights, labels=parts, colors=[COLOURS[part] for part in parts])
    plot.plot(WORLD_SIZES, [sum(e.memory.in_mining.values()) / 1e9 for e in found], "k--", label="a mining round")
    plot.set(xscale="log", ylabel="memory of a GPU, GB")
    plot.set_xticks(WORLD_SIZES, [f"{W // 1024}k" if W >= 1024 else f"{W}" for W in WORLD_SIZES])
    plot.minorticks_off()


def draw_speed(plot: Any, found: list[Estimate], without: list[Estimate]) -> None:
    """Draw images/s over the colour of what bounds them."""
    speeds = [e.images_per_s for e in found]
    plot.plot(WORLD_SIZES, [speeds[0] * W for W in WORLD_SIZES], "k:", label="in proportion to one GPU")
    plot.plot(WORLD_SIZES, speeds, "k.-", label="images/s")
    label = "with GroupNorm, random classes"
    plot.plot(WORLD_SIZES, [e.images_per_s for e in without], "k--", label=label)
    for W, e in zip(WORLD_SIZES, found, strict=True):
        plot.axvspan(
            W / 2**0.5, W * 2**0.5, color=COLOURS[e.bottleneck], alpha=0.25, lw=0, label=f"bound by {e.bottleneck}"
        )
    plot.set(yscale="log", ylabel="images/s", xlim=(WORLD_SIZES[0] / 2**0.5, WORLD_SIZES[-1] * 2**0.5))


def draw_shares(plot: Any, found: list[Estimate]) -> None:
    """Stack the shares of a step's time."""
    parts = list(dict.fromkeys(part for e in found for part in e.seconds))
    heights = [[100 * e.seconds.get(part, 0.0) / e.step_s for e in found] for part in parts]
    plot.stackplot(WORLD_SIZES, heights, labels=parts, colors=[COLOURS[part] for part in parts])
    plot.set(ylabel="share of a step, percent", ylim=(0, 100))


def unique_labels(row: Any) -> tuple[list[Any], list[str]]:
    """Return the handles and labels of a row of plots, each label once."""
    by_label = {}
    for plot in row:
        by_label |= dict(zip(*reversed(plot.get_legend_handles_labels()), strict=True))
    return list(by_label.values()), list(by_label)


if __name__ == "__main__":
    main()
