"""Images/s of whole training steps beside plain PyTorch: same network, batch, precision and optimizer, data in memory.

    pip install -e .[benchmarks] -c constraints.txt
    OMP_NUM_THREADS=1 python benchmarks/step.py [--quick | --tiny] [--device cuda] [--json FILE]

- facetrain: what the training loop does between two batches, with DeepSpeed, watches and logging, but no mining;
  `compiled` (GPU) with train.compile; `overlapped` with train.overlap, for networks without batch statistics.
- bare loop: network, cross-entropy of full logits, penalty, backward, AdamW; one process, nothing else.
- DDP + pytorch-metric-learning: its NPairsLoss in its DistributedLossWrapper, PyTorch's DistributedDataParallel.

Each case has processes of its own, one for each of its W ranks. Cases of a network take turns, so that a machine's
other load meets all of them; figures are medians of turns. On CPUs W = 2 needs two cores, and W = 4 shares them.
"""

import argparse
import json
import multiprocessing
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LOG_EVERY_STEPS = 20
L2_WEIGHT = 0.002
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Setting:
    """A network and the batch of each rank."""

    name: str
    image_px: int
    pairs_per_rank: int
    steps: int
    """Steps of a turn."""
    norm: str = "batch"


CPU = (
    Setting("casianet", 56, 16, 12),
    Setting("casianet", 56, 16, 12, norm="none"),
    Setting("iresnet18", 56, 8, 8),
    Setting("iresnet50", 56, 8, 4),
)
GPU = (Setting("casianet", 112, 512, 40), Setting("iresnet18", 112, 256, 40), Setting("iresnet50", 112, 128, 40))
TINY = (Setting("casianet", 16, 2, 2), Setting("casianet", 16, 2, 2, norm="none"))


@dataclass(frozen=True)
class Case:
    """Who takes the steps, with what, on how many ranks."""

    trainer: str
    setting: Setting
    world_size: int
    device: str
    precision: str


def main() -> None:
    """Measure, print a table and what was wanted, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), help="bfloat16 on GPUs, else float32")
    parser.add_argument("--networks", nargs="+", help="some of casianet, iresnet18, iresnet50")
    parser.add_argument("--norms", nargs="+", default=("batch", "none"), help="batch, none or both, if not given")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="CasiaNet alone, three turns")
    parser.add_argument("--tiny", action="store_true", help="sizes of no meaning, to see that it runs")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    precision = args.precision or ("bfloat16" if args.device == "cuda" else "float32")
    turns = 1 if args.tiny else 3 if args.quick else args.turns
    settings = TINY if args.tiny else GPU if args.device == "cuda" else CPU
    settings = settings[:1] if args.quick else settings
    print(f"{machine(args.device)}; {precision}; medians of {turns} turns\n")
    head = f"{'network':10}{'norm':>6}{'px':>4}{'pairs':>6}{'W':>3}  {'trainer':32}"
    print(f"{head}{'images/s':>9}{'x bare':>8}{'x W=1':>7}{'MFU':>7}")
    records: list[dict[str, Any]] = []
    for setting in settings:
        if (args.networks is None or setting.name in args.networks) and setting.norm in args.norms:
            records += (found := measure(cases(setting, args.device, precision), turns))
            print("\n".join(map(format_row, found)))
    print("\n" + "\n".join(wishes(records)))
    if args.json is not None:
        args.json.write_text(json.dumps({"machine": machine(args.device), "cases": records}, indent=1) + "\n")


def cases(setting: Setting, device: str, precision: str) -> list[Case]:
    """Return the cases that take turns: on GPUs those that the machine has GPUs for."""
    sizes = [1, 2, 4] if setting in CPU[:1] else [1, 2]
    if device == "cuda":
        import torch

        sizes = [size for size in (1, 2, 4, 8) if size <= torch.cuda.device_count()]
    found = [Case("bare loop", setting, 1, device, precision)]
    for size in sizes:
        names = ["facetrain", "DDP + pytorch-metric-learning"] + ["facetrain compiled"] * (device == "cuda")
        names += ["facetrain overlapped"] * (setting.norm == "none")
        found += [Case(name, setting, size, device, precision) for name in names]
    return found


def measure(every: list[Case], turns: int) -> list[dict[str, Any]]:
    """Return images/s of each case, and what it is a ratio of."""
    context = multiprocessing.get_context("spawn")
    groups, records = [], []
    for case in every:  # one after the other: a start keeps a core busy for ten seconds
        groups.append(start(context, case))
        records.append({**asdict(case), "seconds": [], **join(groups[-1])})
    for _ in range(turns):
        for record, group in zip(records, groups, strict=True):
            if "error" not in record:
                record["seconds"].append(max(answer["seconds"] for answer in ask(group)))
    for record, group in zip(records, groups, strict=True):
        if "error" not in record:
            record["peak_bytes"] = max(answer["peak_bytes"] for answer in ask(group, "end"))
        for process, _ in group:
            process.join(timeout=10)
            process.kill()
    for record in records:
        add_ratios(record, records)
    return records


def start(context: Any, case: Case) -> list[tuple[Any, Any]]:
    """Start the ranks of a case: a process and a pipe each."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    group = []
    for rank in range(case.world_size):
        mine, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, case, rank, port), daemon=True)
        process.start()
        theirs.close()
        group.append((process, mine))
    return group


def join(group: list[tuple[Any, Any]]) -> dict[str, Any]:
    """Return what a case says after its warm-up."""
    try:
        answers = [pipe.recv() for _, pipe in group]
        return answers[0]  # type: ignore[no-any-return]
    except EOFError:
        return {"error": "ended"}


def ask(group: list[tuple[Any, Any]], word: str = "go") -> list[dict[str, Any]]:
    """Let all ranks of a case take their turn."""
    for _, pipe in group:
        pipe.send(word)
    return [pipe.recv() for _, pipe in group]


def serve(pipe: Any, case: Case, rank: int, port: int) -> None:
    """Be one rank: warm up, then take turns."""
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.world_size)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(case.world_size)},
        **{"OMP_NUM_THREADS": "1", "FACETRAIN_SHARE_CORES": "1"},  # as the scripts in launch/ do
    }
    import torch

    from facetrain.batch import PairBatch
    from facetrain.config import DataConfig, ModelConfig
    from facetrain.models import build_backbone
    from facetrain.watch.flops import matmul_flops_per_s, training_flops_per_image
    from facetrain.world import start_world

    setting, on_cuda = case.setting, case.device == "cuda"
    with start_world(case.device, timeout_s=600) as world:  # type: ignore[arg-type]
        if not on_cuda:
            torch.set_num_threads(1)
        torch.manual_seed(0)
        model = ModelConfig(name=setting.name, norm=setting.norm)  # type: ignore[arg-type]
        data = DataConfig(image_px=setting.image_px)
        backbone = build_backbone(model, channels=3, image_px=setting.image_px)
        generator = torch.Generator().manual_seed(rank)
        shape = (2, setting.pairs_per_rank, setting.image_px, setting.image_px, 3)
        labels_n = torch.arange(setting.pairs_per_rank) + rank * setting.pairs_per_rank
        batches = [
            PairBatch(step, torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator), labels_n)
            for step in range(4)
        ]
        batches = [batch.pin_memory() for batch in batches] if on_cuda else batches
        step = TRAINERS[case.trainer](backbone, case, world)
        first_loss = world.all_reduce_mean_(step(batches[0].to(world.device)).detach().clone()).item()
        for batch in batches[1:]:
            step(batch.to(world.device))
        flops = training_flops_per_image(model, data)
        peak = matmul_flops_per_s(world.device, case.precision)  # type: ignore[arg-type]
        pipe.send({"first_loss": first_loss, "flops_per_image": flops, "peak_flops_per_s": peak})
        while pipe.recv() == "go":
            world.all_gather_object(None)  # all begin together
            begun_at = time.perf_counter()
            for number in range(setting.steps):
                step(batches[number % len(batches)].to(world.device))
            if on_cuda:
                torch.cuda.synchronize()
            pipe.send({"seconds": time.perf_counter() - begun_at})
        pipe.send({"peak_bytes": torch.cuda.max_memory_allocated() if on_cuda else resident_bytes()})


def resident_bytes() -> int:
    """Return the most memory that this process had."""
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def facetrain_steps(backbone: Any, case: Case, world: Any) -> Callable[[Any], Any]:
    """Return a step as the training loop takes it."""
    import torch

    from facetrain.config import LossConfig, TrainConfig
    from facetrain.engine import Engine
    from facetrain.losses.npair import NPairLoss
    from facetrain.step import train_step
    from facetrain.watch.health import FiniteWatch
    from facetrain.watch.stop import StopRequest
    from facetrain.watch.stragglers import StepClock, TimedLoss

    pairs = case.setting.pairs_per_rank
    config = TrainConfig(
        global_pairs=pairs * world.world_size,
        precision=case.precision,  # type: ignore[arg-type]
        learning_rate=LEARNING_RATE,
        compile=case.trainer == "facetrain compiled",
        overlap=case.trainer == "facetrain overlapped",
    )
    engine = Engine(backbone, config, world, pairs_per_rank=pairs)
    clock, finite, stop = StepClock(world, factor=1e9), FiniteWatch(world), StopRequest(world)
    loss, taken = TimedLoss(NPairLoss(LossConfig(l2_weight=L2_WEIGHT), world), clock), 0

    def step(batch: Any) -> Any:
        nonlocal taken
        stop.is_due()
        clock.begin()
        torch.manual_seed(taken)
        stats = train_step(engine, loss, batch, learning_rate=LEARNING_RATE)
        taken += 1
        finite.observe(taken, stats)
        if taken % LOG_EVERY_STEPS == 0:
            finite.first_bad_step()
            stats.read(world)
            clock.read()
        return stats.loss

    return step


def bare_steps(backbone: Any, case: Case, world: Any) -> Callable[[Any], Any]:
    """Return a step as everybody would write it first."""
    import torch.nn.functional as F

    def loss(embeddings_BD: Any, labels_n: Any) -> Any:
        anchors_nD, positives_nD = embeddings_BD.float().chunk(2)
        targets_n = labels_n - labels_n[0]
        return F.cross_entropy(anchors_nD @ positives_nD.T, targets_n) + penalty(embeddings_BD)

    return plain_steps(backbone.to(world.device), loss, case)


def metric_learning_steps(backbone: Any, case: Case, world: Any) -> Callable[[Any], Any]:
    """Return a step of PyTorch's DDP with pytorch-metric-learning's distributed loss."""
    from pytorch_metric_learning.distances import DotProductSimilarity
    from pytorch_metric_learning.losses import NPairsLoss
    from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
    from torch.nn.parallel import DistributedDataParallel

    distance = DotProductSimilarity(normalize_embeddings=False)
    npairs = DistributedLossWrapper(NPairsLoss(distance=distance), efficient=False)
    network = DistributedDataParallel(
        backbone.to(world.device), device_ids=[world.local_rank] if case.device == "cuda" else None
    )
    return plain_steps(network, lambda x_BD, labels_n: npairs(x_BD.float(), labels_n.repeat(2)) + penalty(x_BD), case)


def penalty(embeddings_BD: Any) -> Any:
    """Return the weighted mean squared norm."""
    return L2_WEIGHT * embeddings_BD.float().square().sum(dim=1).mean()


def plain_steps(network: Any, loss: Callable[[Any, Any], Any], case: Case) -> Callable[[Any], Any]:
    """Return a step of a plain loop."""
    import torch

    from facetrain.batch import network_input

    groups = [
        {"params": [p for p in network.parameters() if p.ndim > 1]},
        {"params": [p for p in network.parameters() if p.ndim <= 1]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=0.0, fused=case.device == "cuda")
    network.train()

    def step(batch: Any) -> Any:
        with torch.autocast(case.device, torch.bfloat16, enabled=case.precision == "bfloat16"):
            embeddings_BD = network(network_input(batch.images_VnHWC.flatten(0, 1)))
        value = loss(embeddings_BD, batch.labels_n)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value

    return step


TRAINERS: dict[str, Callable[[Any, Case, Any], Callable[[Any], Any]]] = {
    "facetrain": facetrain_steps,
    "facetrain compiled": facetrain_steps,
    "facetrain overlapped": facetrain_steps,
    "bare loop": bare_steps,
    "DDP + pytorch-metric-learning": metric_learning_steps,
}


def add_ratios(record: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Add images/s, MFU, and the ratios to the bare loop and to one rank: medians over turns of each turn's ratio."""
    if not record["seconds"]:
        return
    setting, size = record["setting"], record["world_size"]
    images = 2 * setting["pairs_per_rank"] * setting["steps"] * size
    record["images_per_s"] = images / statistics.median(record["seconds"])
    record["mfu"] = record["flops_per_image"] * record["images_per_s"] / size / record["peak_flops_per_s"]
    bare = next(r for r in records if r["trainer"] == "bare loop")
    alone = next(r for r in records if r["trainer"] == record["trainer"] and r["world_size"] == 1)
    for key, other in (("of_bare", bare), ("of_one_rank", alone)):
        ratios = [theirs / mine * size for mine, theirs in zip(record["seconds"], other["seconds"], strict=True)]
        record[key] = statistics.median(ratios) if ratios else None


def format_row(record: dict[str, Any]) -> str:
    """Return a line of the table."""
    setting = record["setting"]
    head = f"{setting['name']:10}{setting['norm']:>6}{setting['image_px']:>4}{setting['pairs_per_rank']:>6}"
    head += f"{record['world_size']:>3}  {record['trainer']:32}"
    if not record["seconds"]:
        return head + f"{record['error']:>9}"
    figures = record["images_per_s"], record["of_bare"], record["of_one_rank"], record["mfu"]
    return head + "{:>9.1f}{:>8.3f}{:>7.2f}{:>7.1%}".format(*figures)


def wishes(records: list[dict[str, Any]]) -> list[str]:
    """Return a line for each thing that was wanted, and whether it is so."""
    ours = [r for r in records if r["trainer"] == "facetrain" and r["seconds"]]
    lines = []
    for record in ours:
        name, size = f"{record['setting']['name']} ({record['setting']['norm']})", record["world_size"]
        if size == 1:
            lines.append(verdict(f"{name}: one rank at least 0.95 of the bare loop", record["of_bare"], 0.95))
        if size == 2 and record["device"] == "cpu":
            lines.append(verdict(f"{name}: two ranks at least 1.7 times one", record["of_one_rank"], 1.7))
    return lines


def verdict(wish: str, value: float, bound: float) -> str:
    """Return a wish with what was found."""
    return f"{'met    ' if value >= bound else 'NOT MET'}  {wish}: {value:.3f}"


def machine(device: str) -> str:
    """Return what the figures were taken on."""
    import torch

    cores = len(os.sched_getaffinity(0))
    gpus = f", {torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if device == "cuda" else ""
    return f"{platform.machine()}, {cores} cores{gpus}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
