"""An estimate as one screen of text, and as JSON."""

import dataclasses
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from facetrain.config import Config
from facetrain.estimate.model import Estimate


def format_estimate(config: Config, found: Estimate, *, fitting_micro_pairs: int | None) -> str:
    """Return the estimate as aligned text of about 40 lines.

    Args:
        config: The run.
        found: Its estimate.
        fitting_micro_pairs: Where it doesn't fit into a GPU, the `train.micro_pairs` that would.
    """
    lines = [*_head(config, found), "", *_memory_and_time(found), ""]
    if found.collectives:
        lines += [*_collectives(found), ""]
    lines.append(
        f"{found.images_per_s:,.0f} images/s, {found.step_s * 1e3:.1f} ms a step; bottleneck: {found.bottleneck}"
        f" ({found.seconds[found.bottleneck] / found.step_s:.0%} of a step)"
    )
    if not found.fits:
        with_what = " with train.overlap=false" if config.train.overlap else ""
        smaller = f"train.micro_pairs={fitting_micro_pairs} would{with_what}"
        advice = smaller if fitting_micro_pairs else "nor would one pair at a time"
        lines.append(f"does not fit into {found.cluster.gpu_memory_gb:g} GB; {advice}")
    return "\n".join(lines)


def estimate_record(config: Config, found: Estimate) -> dict[str, Any]:
    """Return everything that was estimated, and from what, as plain values: bytes, seconds, counts."""
    W = found.cluster.world_size
    return {
        "config": config.flat(),
        "cluster": dataclasses.asdict(found.cluster),
        "network": dataclasses.asdict(found.network),
        "flops_per_image": found.flops_per_image,
        "schedule": dataclasses.asdict(found.schedule),
        "memory_bytes": dataclasses.asdict(found.memory) | {"total": found.memory.total_bytes, "fits": found.fits},
        "collectives": [
            dataclasses.asdict(c) | {"sent_bytes": c.sent_bytes(W), "seconds": c.seconds(found.cluster)}
            for c in found.collectives
        ],
        "mining_mode": found.mining_mode,
        "seconds": dict(found.seconds),
        "step_s": found.step_s,
        "images_per_s": found.images_per_s,
        "bottleneck": found.bottleneck,
    }


def _head(config: Config, found: Estimate) -> Iterator[str]:
    cluster, train, network = found.cluster, config.train, found.network
    schedule = found.schedule
    in_chunks = f" in {schedule.backwards} chunks" if schedule.is_chunked else ""
    yield (
        f"{cluster.nodes} x {cluster.gpus_per_node} GPUs: {train.global_pairs} pairs a step, {schedule.pairs} on"
        f" each{in_chunks}; ZeRO {train.zero_stage}, {train.precision}, {train.optimizer}, mining {found.mining_mode}"
    )
    yield (
        f"{config.model.name} at {config.data.image_px} px: {network.parameters / 1e6:.2f} million parameters,"
        f" {found.flops_per_image / 1e9:.2f} GFLOP an image forward, D = {network.embedding_dim}"
    )


def _memory_and_time(found: Estimate) -> Iterator[str]:
    """Yield two tables side by side."""
    memory = found.memory
    left = [("memory of a GPU", "MB"), *_megabytes(memory.kept), *_megabytes(memory.in_step)]
    left.append(("fullest moment", f"{memory.total_bytes / 1e6:,.0f}"))
    if memory.in_mining:
        left.append(("(a mining round instead of a step", f"{sum(memory.in_mining.values()) / 1e6:,.0f})"))
    right = [("time of a step", "ms", "share")]
    right += [(part, f"{s * 1e3:.2f}", f"{s / found.step_s:.0%}") for part, s in found.seconds.items()]
    for row, other in zip_longest(left, right):
        (name, value), (part, time, share) = row or ("", ""), other or ("", "", "")
        yield f"{name:37}{value:>9}      {part:24}{time:>10}{share:>7}".rstrip()


def _megabytes(parts: Any) -> list[tuple[str, str]]:
    return [(part, f"{num_bytes / 1e6:,.1f}") for part, num_bytes in parts.items()]


def _collectives(found: Estimate) -> Iterator[str]:
    """Yield a line for all collectives of one kind, with what they are in a step together."""
    yield f"{'collectives of a step':52}{'calls':>8}{'payload MB':>12}{'sent MB':>12}{'ms':>10}"
    rows: dict[tuple[str, str], list[float]] = {}
    for c in found.collectives:
        row = rows.setdefault((f"{c.part}: {c.carries}", c.operation), [0.0, 0.0, 0.0, 0.0])
        once = (1, c.payload_bytes / 1e6, c.sent_bytes(found.cluster.world_size) / 1e6, 1e3 * c.seconds(found.cluster))
        for i, value in enumerate(once):
            row[i] += c.calls_per_step * value
    for (name, operation), (calls, payload, sent, time) in rows.items():
        yield f"{name:37}{operation:15}{calls:>8.4g}{payload:>12,.3f}{sent:>12,.3f}{time:>10.3f}"
