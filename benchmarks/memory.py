"""The global batch that fits: peak memory of a step against N, at once and in chunks (GradCache).

    OMP_NUM_THREADS=1 python benchmarks/memory.py [--tiny] [--device cuda] [--json FILE]

N doubles until a step no longer fits. Each N has a process of its own. On a GPU the peak is that of torch's allocator,
without CUDA's own few hundred MiB; on a CPU it is the process's, torch itself included.
"""

import argparse
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

CHUNK_PAIRS = 64
LARGEST_PAIRS = 1 << 16


def main() -> None:
    """Measure, print a table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--network", default="iresnet50")
    parser.add_argument("--tiny", action="store_true", help="sizes of no meaning, to see that it runs")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    network, image_px = ("casianet", 16) if args.tiny else (args.network, 112)
    first, chunk, last = (4, 2, 8) if args.tiny else (CHUNK_PAIRS, CHUNK_PAIRS, LARGEST_PAIRS)
    records: list[dict[str, Any]] = []
    print(f"{network} at {image_px} px, bfloat16, AdamW, {args.device}\n")
    print(f"{'N':>6}  {'chunks of':>9}{'peak MiB':>11}{'images/s':>10}")
    for micro_pairs in (None, chunk):
        pairs = first * (2 if micro_pairs else 1)
        while pairs <= last:
            record = {"network": network, "image_px": image_px, "pairs": pairs, "micro_pairs": micro_pairs}
            record |= in_a_process(record, args.device)
            records.append(record)
            print(format_row(record), flush=True)
            if "error" in record:
                break
            pairs *= 2
    if args.json is not None:
        args.json.write_text(json.dumps(records, indent=1) + "\n")


def in_a_process(record: dict[str, Any], device: str) -> dict[str, Any]:
    """Return what a step of this size takes, or its error."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, record, device))
    process.start()
    theirs.close()
    try:
        answer: dict[str, Any] = mine.recv()
    except EOFError:
        answer = {"error": "killed"}
    process.join()
    return answer


def serve(pipe: Any, record: dict[str, Any], device: str) -> None:
    """Take two steps, the second of which is timed."""
    import resource

    import torch

    from facetrain.batch import PairBatch
    from facetrain.config import LossConfig, ModelConfig, TrainConfig
    from facetrain.engine import Engine
    from facetrain.losses.npair import NPairLoss
    from facetrain.models import build_backbone
    from facetrain.step import train_step
    from facetrain.world import start_world

    pairs, side = record["pairs"], record["image_px"]
    with start_world(device, timeout_s=600) as world:  # type: ignore[arg-type]
        config = TrainConfig(global_pairs=pairs, micro_pairs=record["micro_pairs"], precision="bfloat16")
        backbone = build_backbone(ModelConfig(name=record["network"]), channels=3, image_px=side)
        images = torch.randint(0, 256, (2, pairs, side, side, 3), dtype=torch.uint8)
        try:
            engine, loss = Engine(backbone, config, world, pairs_per_rank=pairs), NPairLoss(LossConfig(), world)
            batch = PairBatch(step=0, images_VnHWC=images, labels_n=torch.arange(pairs)).to(world.device)
            for _ in range(2):
                begun_at = time.perf_counter()
                train_step(engine, loss, batch, learning_rate=1e-4).loss.item()  # waits for the device
            seconds = time.perf_counter() - begun_at
        except torch.OutOfMemoryError:
            pipe.send({"error": "out of memory"})
            return
        on_cuda = world.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if on_cuda else 1024 * resource.getrusage(0).ru_maxrss
        pipe.send({"peak_bytes": peak, "images_per_s": 2 * pairs / seconds})


def format_row(record: dict[str, Any]) -> str:
    """Return a line of the table."""
    head = f"{record['pairs']:>6}  {record['micro_pairs'] or 'all':>9}"
    if "error" in record:
        return head + f"  {record['error']}"
    return head + f"{record['peak_bytes'] / 2**20:>11,.0f}{record['images_per_s']:>10,.1f}"


if __name__ == "__main__":
    main()
