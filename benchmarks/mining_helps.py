r"""Does mining help? The same number of training images with random classes and with classes mined in three ways.

    OMP_NUM_THREADS=1 python benchmarks/mining_helps.py --shards shards/faces \
        --lfw-images lfw_aligned-00.tar lfw_aligned-01.tar --pairs pairs.txt --open-set-people people.txt \
        --out mining_helps.jsonl --work runs/mining_helps

Each run is a process of its own, by torchrun, from configs/faces_cpu.yaml. A finished run appends a line to `--out`:
called again, the script goes on where it stopped, an interrupted run included. Runs of a seed share weights, held-out
identities and random batches up to the first mined one. At the end, and with `--show` at once, it prints mean and
standard deviation over the seeds.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).parent.parent / "configs" / "faces_cpu.yaml"
PAIRS = 128

VARIANTS: dict[str, tuple[str, ...]] = {
    "random classes": ("--mining.mode", "off"),
    "mined": ("--mining.mode", "gathered"),
    "mined, cap and random share": (
        *("--mining.mode", "gathered"),
        *("--mining.similarity_cap", "0.75"),  # after 1,100 steps a fifth of the genuine pairs are above
        *("--mining.random_share", "0.25"),
    ),
    "mined from one image": ("--mining.mode", "gathered", "--mining.images_per_class", "1"),
}

FIGURES = {
    "LFW verification": ("verification", "accuracy"),
    "open-best-rowden rank-1": ("open-best-rowden", "rank1"),
    "open-best-rowden DIR@FAR=1%": ("open-best-rowden", "dir_rank1_at_far_1e-2"),
    "held-out verification": ("heldout", "accuracy"),
}


def main() -> None:
    """Run what isn't in the file yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True, help="folder made by `facetrain pack`")
    parser.add_argument("--lfw-images", type=Path, nargs="+", required=True, help="tars or a folder of aligned LFW")
    parser.add_argument("--pairs", type=Path, required=True, help="LFW's pairs.txt")
    parser.add_argument("--open-set-people", type=Path, required=True, help="the people of open-best-rowden")
    parser.add_argument("--out", type=Path, required=True, help="a JSON line for each finished run is added here")
    parser.add_argument("--work", type=Path, required=True, help="folder for the run folders")
    parser.add_argument("--images", type=int, default=60_000, help="training images of a run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1, help="of a run, by torchrun")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--show", action="store_true", help="run nothing, print what is there")
    args = parser.parse_args()

    for seed in range(args.seeds):  # seed by seed, so that the variants can be compared from early on
        for variant in args.variants:
            if not args.show and (variant, seed, args.images) not in finished(args.out):
                record = run(variant, seed, args)
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                print(one_line(record), flush=True)
    show(read(args.out), args.images)


def read(out: Path) -> list[dict[str, Any]]:
    """Return the finished runs."""
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []


def finished(out: Path) -> set[tuple[str, int, int]]:
    """Return (variant, seed, images) of the finished runs."""
    return {(record["variant"], record["seed"], record["images"]) for record in read(out)}


def run(variant: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate one network and return its line."""
    steps = math.ceil(args.images / (2 * PAIRS))
    folder = args.work / f"{variant.replace(',', '').replace(' ', '_')}-{args.images}-{seed}"
    flags = {
        "run.dir": folder,
        "run.seed": seed,
        "data.shards": args.shards,
        "train.global_pairs": PAIRS,
        "train.steps": steps,
        "train.warmup_steps": min(20, steps // 10),
        "mining.warmup_steps": steps // 4,  # an untrained network's neighbours mean nothing
        "mining.batches_per_round": 32,
        "eval.every_steps": 0,
        "eval.images": f"[{', '.join(str(path) for path in args.lfw_images)}]",
        "eval.pairs": args.pairs,
        "eval.open_set_people": args.open_set_people,
        "tracking.backend": "none",
    }
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes))
    command = [*launcher, "-m", "facetrain.train", "--config", str(CONFIG)]
    command += [text for key, value in flags.items() for text in (f"--{key}", str(value))] + [*VARIANTS[variant]]
    folder.parent.mkdir(parents=True, exist_ok=True)
    started_at = time.perf_counter()
    with (folder.parent / f"{folder.name}.log").open("a", encoding="utf-8") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env={"OMP_NUM_THREADS": "1", **os.environ}, check=False)
    if done.returncode:
        raise SystemExit(f"{variant}, seed {seed}: training failed, see {log.name}")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return {
        "variant": variant,
        "seed": seed,
        "images": args.images,
        "steps": steps,
        "seconds": round(time.perf_counter() - started_at),
        **{name: results[protocol][key] for name, (protocol, key) in FIGURES.items()},
        **mining_figures(folder / "metrics.jsonl"),
    }


def mining_figures(metrics: Path) -> dict[str, float]:
    """Return means over the rounds, and the candidates embedded beside the training images."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    rounds = [line for line in lines if "mining/round" in line]
    if not rounds:
        return {}
    names = ("hardness", "loss_mined", "loss_random", "violation", "overlap", "filler_share", "most_appearances")
    means = {f"mining/{name}": statistics.fmean(line[f"mining/{name}"] for line in rounds) for name in names}
    return means | {"mined_candidates": sum(line["mining/candidates"] for line in rounds)}


def one_line(record: dict[str, Any]) -> str:
    """Return a run's figures for the terminal."""
    figures = "  ".join(f"{name} {record[name]:.2%}" for name in FIGURES)
    return f"{record['variant']}, seed {record['seed']}: {figures}  {record['seconds']} s"


def show(records: list[dict[str, Any]], images: int) -> None:
    """Print mean and standard deviation over the seeds, and the mining of each variant."""
    print(f"\n{images} training images a run; mean +- standard deviation over seeds")
    width = max(map(len, VARIANTS))
    print(" " * width, *(f"{name:>24}" for name in ("seeds", *FIGURES, "mining/hardness")))
    for variant in VARIANTS:
        runs = [record for record in records if record["variant"] == variant and record["images"] == images]
        cells = [str(len(runs)), *(spread([record[name] for record in runs]) for name in FIGURES)] if runs else ["0"]
        hardness = [record["mining/hardness"] for record in runs if "mining/hardness" in record]
        cells += [f"{statistics.fmean(hardness):.3f}"] if hardness else []
        print(variant.ljust(width), *(f"{cell:>24}" for cell in cells))


def spread(values: list[float]) -> str:
    """Return mean +- standard deviation in percent; a single value has none."""
    deviation = f" +- {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.2f}{deviation} %"


if __name__ == "__main__":
    main()
