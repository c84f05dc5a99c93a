"""Time and memory of the N-pair loss, forward and backward, beside other people's losses of the same value.

    pip install -e .[benchmarks] -c constraints.txt
    OMP_NUM_THREADS=1 python benchmarks/loss.py [--quick] [--json FILE] [--device cuda]

Row-wise: ours against plain cross-entropy on full logits and pytorch-metric-learning's NPairsLoss. Both ways: ours with
`loss.symmetric` against open_clip's ClipLoss. Each loss runs in a process of its own under a memory limit; a loss that
exceeds it is out of memory. The losses take turns, so that a machine's other load meets all of them; times are medians.
Memory is that of a process of its own, whose malloc and BLAS keep nothing for later: what they keep otherwise, 4 to 60
MiB here, differs from run to run.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LIMIT_BYTES = 16 << 30
WIDTH = 512
NORM = 4.0
TURNS = {320: 41, 4096: 7, 8192: 5, 16384: 3, 32768: 1}
QUICK_TURNS = {320: 21, 1024: 7, 2048: 3}
KEEP_NOTHING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MKL_DISABLE_FAST_MM": "1"}
ROW_WISE = ("facetrain", "full logits", "pytorch-metric-learning")
BOTH_WAYS = ("facetrain symmetric", "open_clip ClipLoss")


def main() -> None:
    """Measure, print a table and what was wanted, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small N, in less than a minute")
    parser.add_argument("--tiny", action="store_true", help="one size of no meaning, to see that it runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    records = []
    print(f"D = {WIDTH}, float32, {args.device}; medians of turns; memory beyond the embeddings themselves\n")
    print(f"{'N':>6}  {'loss':26}{'ms':>12}{'x fastest':>11}{'peak MiB':>11}{'x full logits':>15}")
    for pairs, turns in ({64: 1} if args.tiny else QUICK_TURNS if args.quick else TURNS).items():
        for family in (ROW_WISE, BOTH_WAYS):
            found = measure(family, pairs, turns, args.device)
            records += found
            for record in found:
                print(format_row(record, found, records))
        print()
    print("\n".join(wishes(records)))
    if args.json is not None:
        args.json.write_text(json.dumps(records, indent=1) + "\n")


def measure(names: tuple[str, ...], pairs: int, turns: int, device: str) -> list[dict[str, Any]]:
    """Return time, memory and value of each loss at N pairs.

    Raises:
        ValueError: Two losses of the same formula differ by more than rounding.
    """
    os.environ.update(KEEP_NOTHING)  # read by the processes when they start
    sizes = {name: take_turns((name,), pairs, 1, device)[0] for name in names}  # none waits, idle, and is paged out
    for key in KEEP_NOTHING:
        del os.environ[key]
    records = take_turns(names, pairs, turns, device)
    for record in records:
        record["peak_bytes"] = sizes[record["loss"]].get("peak_bytes")
    values = [record["value"] for record in records if "value" in record]
    if max(values) - min(values) > 1e-4 * abs(values[0]):
        raise ValueError(f"N = {pairs}: expected equal losses of {', '.join(names)}, got {values}")
    return records


def take_turns(names: tuple[str, ...], pairs: int, turns: int, device: str) -> list[dict[str, Any]]:
    """Return what the losses answer, one process each, one turn after the other; seconds of every turn."""
    context = multiprocessing.get_context("spawn")
    records, pipes, processes = [], {}, []
    for name in names:
        mine, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, name, pairs, device), daemon=True)
        process.start()
        theirs.close()  # so that a process that is killed gives end-of-file
        processes.append(process)
        pipes[name] = mine
        records.append({"loss": name, "pairs": pairs, "device": device, "seconds": []})
    for _ in range(turns):
        for record in records:
            answer = ask(pipes[record["loss"]]) if "error" not in record else {}
            record["seconds"] += [answer.pop("seconds")] if "seconds" in answer else []
            record |= {key: value for key, value in answer.items() if key not in record}
    for process in processes:
        process.kill()
        process.join()
    return records


def ask(pipe: Connection) -> dict[str, Any]:
    """Let a process take its turn; a killed one was out of memory."""
    try:
        pipe.send("go")
        return pipe.recv()  # type: ignore[no-any-return]
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return {"error": "killed"}


def serve(pipe: Connection, name: str, pairs: int, device: str) -> None:
    """Take turns: forward and backward of one loss, on the same embeddings in every process."""
    import torch
    import torch.nn.functional as F

    try:
        loss = LOSSES[name]()
    except ImportError:
        pipe.recv()
        pipe.send({"error": "not installed"})
        return
    generator = torch.Generator().manual_seed(0)
    common = F.normalize(torch.randn(pairs, WIDTH, generator=generator))
    anchors, positives = (
        NORM * F.normalize(common + 0.05 * torch.randn(pairs, WIDTH, generator=generator)) for _ in range(2)
    )
    del common
    labels = torch.arange(pairs, device=device)
    inputs = [x.to(device).requires_grad_() for x in (anchors, positives)]
    few = [x[:8].detach().requires_grad_() for x in inputs]  # what torch loads at its first call is nobody's memory
    loss(*few, labels[:8]).backward()
    # Data, not address space: torch's CUDA libraries map far more addresses than they fill.
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES))
    first = True
    while pipe.recv():
        before = start_of_peak(device) if first else 0
        for x in inputs:
            x.grad = None
        started_at = time.perf_counter()
        try:
            value = loss(*inputs, labels)
            value.backward()
            answer = {"value": value.item()}  # waits for the device
        except (RuntimeError, MemoryError) as error:
            if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
                raise
            pipe.send({"error": "out of memory"})
            return
        answer["seconds"] = time.perf_counter() - started_at
        if first:
            answer["peak_bytes"] = peak_bytes(device) - before
        first = False
        pipe.send(answer)


def start_of_peak(device: str) -> int:
    """Return the bytes in use, from which the peak is counted anew."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def peak_bytes(device: str) -> int:
    """Return the most bytes in use since `start_of_peak`."""
    import torch

    return torch.cuda.max_memory_allocated() if device == "cuda" else status_bytes("VmHWM")


def status_bytes(key: str) -> int:
    """Return an entry of this process's /proc status."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def facetrain_loss(symmetric: bool) -> Callable[..., Any]:
    """Return our loss, as a step calls it, without the penalty that the others don't have."""
    from facetrain.config import LossConfig
    from facetrain.losses.npair import NPairLoss
    from facetrain.world import World

    loss = NPairLoss(LossConfig(l2_weight=0.0, symmetric=symmetric), World())
    return lambda anchors, positives, labels: loss(anchors, positives, labels).total


def full_logits_loss() -> Callable[..., Any]:
    """Return the cross-entropy that everybody writes first."""
    import torch.nn.functional as F

    return lambda anchors, positives, labels: F.cross_entropy(anchors @ positives.T, labels)


def metric_learning_loss() -> Callable[..., Any]:
    """Return pytorch-metric-learning's NPairsLoss on inner products."""
    import torch
    from pytorch_metric_learning.distances import DotProductSimilarity
    from pytorch_metric_learning.losses import NPairsLoss

    loss = NPairsLoss(distance=DotProductSimilarity(normalize_embeddings=False))
    return lambda anchors, positives, labels: loss(torch.cat([anchors, positives]), labels.repeat(2))


def clip_loss() -> Callable[..., Any]:
    """Return open_clip's loss at a scale of 1."""
    from open_clip.loss import ClipLoss

    loss = ClipLoss()
    return lambda anchors, positives, labels: loss(anchors, positives, 1.0)


LOSSES: dict[str, Callable[[], Callable[..., Any]]] = {
    "facetrain": lambda: facetrain_loss(symmetric=False),
    "full logits": full_logits_loss,
    "pytorch-metric-learning": metric_learning_loss,
    "facetrain symmetric": lambda: facetrain_loss(symmetric=True),
    "open_clip ClipLoss": clip_loss,
}


def seconds_of(record: dict[str, Any]) -> float:
    """Return the median time of a loss; infinity where it has none."""
    return statistics.median(record["seconds"]) if record["seconds"] else float("inf")


def format_row(record: dict[str, Any], family: list[dict[str, Any]], records: list[dict[str, Any]]) -> str:
    """Return a line of the table, beside the fastest of its family and the memory of full logits."""
    head = f"{record['pairs']:>6}  {record['loss']:26}"
    if not record["seconds"]:
        return head + f"{record['error']:>12}"
    full = next(r for r in records if r["loss"] == "full logits" and r["pairs"] == record["pairs"])
    share = f"{record['peak_bytes'] / full['peak_bytes']:.3f}" if full["peak_bytes"] else "-"
    times = seconds_of(record), min(seconds_of(other) for other in family)
    return (
        head + f"{1e3 * times[0]:>12,.2f}{times[0] / times[1]:>11.2f}{record['peak_bytes'] / 2**20:>11,.1f}{share:>15}"
    )


def wishes(records: list[dict[str, Any]]) -> list[str]:
    """Return a line for each thing that was wanted, and whether it is so."""
    by_case = {(r["loss"], r["pairs"]): r for r in records}
    lines = []
    for ours, peers in ((ROW_WISE[0], ROW_WISE[1:]), (BOTH_WAYS[0], BOTH_WAYS[1:])):
        ratios = {
            pairs: seconds_of(record) / min(seconds_of(by_case[peer, pairs]) for peer in peers)
            for (name, pairs), record in by_case.items()
            if name == ours
        }
        worst = max(ratios, key=lambda pairs: ratios[pairs])
        lines.append(
            verdict(f"{ours}: time at most 1.05 of the fastest peer's, worst at N = {worst}", ratios[worst], 1.05)
        )
    if ("facetrain", 8192) in by_case:
        ours, full = by_case["facetrain", 8192], by_case["full logits", 8192]
        share = ours["peak_bytes"] / full["peak_bytes"]
        lines.append(verdict("N = 8192: memory at most 1/8 of full logits'", share, 1 / 8))
    if ("facetrain", 32768) in by_case:
        extra_mib = by_case["facetrain", 32768]["peak_bytes"] / 2**20
        lines.append(verdict("N = 32768: at most 300 MiB beyond the embeddings", extra_mib, 300.0))
    return lines


def verdict(wish: str, value: float, bound: float) -> str:
    """Return a wish with what was found."""
    return f"{'met    ' if value <= bound else 'NOT MET'}  {wish}: {value:.3g}"


if __name__ == "__main__":
    main()
