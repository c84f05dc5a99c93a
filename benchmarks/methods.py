r"""Every loss on the same shards, sampler, network, images seen and evaluation.

    OMP_NUM_THREADS=1 python benchmarks/methods.py --shards shards/faces \
        --lfw-images lfw_aligned-00.tar lfw_aligned-01.tar --pairs pairs.txt --open-set-people people.txt \
        --out methods.jsonl --work runs/methods

First each method runs with each learning rate of one grid (`--grid-images`); then with the one that was best on
held-out training identities, and is judged on LFW (`--images`); then the leaders by the same held-out figure run with
two more seeds. LFW chooses nothing. Last come short runs that time the steps, one after the other, for which the
machine should have nothing else to do. A finished run appends a line to `--out`: called again, the script goes on where
it stopped. At the end, and with `--show` at once, it prints the tables. docs/methods.md says what the methods are;
`--methods` chooses some of them. `python docs/methods_figure.py methods.jsonl` draws the figures.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from methods_quality import quality_over_steps

CONFIG = Path(__file__).parent.parent / "configs" / "faces_cpu.yaml"
RATES = (3e-4, 1e-3, 3e-3)
CURVE_POINTS = 8
TIMED_IMAGES = 6144
"""Of a run that times steps: 32 of 96 pairs, as many as there are to a round of mining."""


@dataclass(frozen=True)
class Method:
    """What differs from run to run."""

    loss: str
    pairs: int = 96
    flags: dict[str, object] = field(default_factory=dict)
    npair_penalty: bool = False
    """Embeddings are scored as they are, so that their norm needs the penalty."""

    @property
    def identities(self) -> int:
        """Different ones in a batch."""
        return 2 * self.pairs // int(str(self.flags.get("train.images_per_identity", 2)))


CLASSES = {"loss.classes.learning_rate_factor": 10}  # vectors as long as 1 move too little at the network's rate
MINED = {"mining.mode": "gathered", "mining.batches_per_round": 32}
TWELVE = {"data.min_images": 12}

METHODS: dict[str, Method] = {
    "untrained": Method("npair-mc"),
    "softmax": Method("softmax", flags=CLASSES),
    "arcface": Method("arcface", flags=CLASSES),
    "contrastive": Method("contrastive"),
    "triplet random": Method("triplet", flags={"loss.triplet.mining": "random"}),
    "triplet semi-hard": Method("triplet", flags={"loss.triplet.mining": "semi-hard"}),
    "triplet batch-hard": Method("triplet", flags={"loss.triplet.mining": "batch-hard"}),
    "triplet-nm": Method("triplet", flags={"loss.triplet.mining": "random", **MINED}),
    "npair-ovo": Method("npair-ovo", npair_penalty=True),
    "lifted": Method("lifted"),
    "angular": Method("angular"),
    "npair-angular": Method("npair-angular", npair_penalty=True),
    "proxy-nca": Method("proxy-nca", flags=CLASSES),
    "ranked-list": Method("ranked-list"),
    "multi-similarity": Method("multi-similarity"),
    "group": Method("group", flags=CLASSES),
    "npair-mc 32": Method("npair-mc", 32, npair_penalty=True),
    "npair-mc 96": Method("npair-mc", 96, npair_penalty=True),
    "npair-mc 192": Method("npair-mc", 192, npair_penalty=True),
    "npair-mc 320": Method("npair-mc", 320, npair_penalty=True),
    "npair-mc 96 mined": Method("npair-mc", 96, MINED, npair_penalty=True),
}
SHAPES: dict[str, Method] = {
    f"npair-mc {384 // images}x{images}": Method(
        "npair-mc", 192, {"train.images_per_identity": images, **TWELVE}, npair_penalty=True
    )
    for images in (2, 4, 6, 12)
}
"""384 images as identities x images of each, all arms from the identities with twelve images or more."""

FIGURES = {
    "LFW verification": ("verification", "accuracy"),
    "rank-1": ("open-best-rowden", "rank1"),
    "DIR@FAR=1%": ("open-best-rowden", "dir_rank1_at_far_1e-2"),
}


def main() -> None:
    """Run what isn't in the file yet, and print the tables."""
    args = parse_arguments()
    check_conditions(read(args.out), args)
    for run in [] if args.show else runs_to_do(args):
        record = train(run, args)
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(one_line(record), flush=True)
    show(read(args.out), args)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True, help="folder made by `facetrain pack`")
    parser.add_argument("--lfw-images", type=Path, nargs="+", required=True, help="tars or a folder of aligned LFW")
    parser.add_argument("--pairs", type=Path, required=True, help="LFW's pairs.txt")
    parser.add_argument("--open-set-people", type=Path, required=True, help="the people of open-best-rowden")
    parser.add_argument("--out", type=Path, required=True, help="a JSON line for each finished run is added here")
    parser.add_argument("--work", type=Path, required=True, help="folder for the run folders")
    parser.add_argument("--config", type=Path, default=CONFIG, help="network and preprocessing of all runs")
    parser.add_argument("--grid-images", type=int, default=30_000, help="training images of a run of the grid")
    parser.add_argument("--images", type=int, default=60_000, help="training images of a final run")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="the grid of learning rates")
    parser.add_argument("--leaders", type=int, default=4, help="methods that run with three seeds")
    parser.add_argument("--processes", type=int, default=1, help="of a run, by torchrun")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), help="by default the config's")
    names = (*METHODS, *SHAPES)
    parser.add_argument("--methods", nargs="+", choices=names, default=list(METHODS), metavar="NAME")
    parser.add_argument("--show", action="store_true", help="run nothing, print what is there")
    return parser.parse_args()


@dataclass(frozen=True)
class Run:
    """One training."""

    stage: str
    """grid, final or timing."""
    method: str
    rate: float
    seed: int
    images: int


def runs_to_do(args: argparse.Namespace) -> Iterator[Run]:
    """Yield the runs that aren't finished, each after what chooses it has been read from the file."""

    def unfinished(runs: list[Run]) -> Iterator[Run]:
        yield from (run for run in runs if not any(record["run"] == vars(run) for record in read(args.out)))

    trained = [method for method in args.methods if method != "untrained"]
    for rate in args.rates:
        yield from unfinished([Run("grid", method, rate, 0, args.grid_images) for method in trained])
    if "untrained" in args.methods:
        yield from unfinished([Run("final", "untrained", RATES[1], 0, 0)])
    for method in trained:
        yield from unfinished([Run("final", method, best_rate(read(args.out), method, args), 0, args.images)])
    first = finals(read(args.out), args)
    leaders = sorted(trained, key=lambda method: -first[method][0]["heldout"])[: args.leaders]
    for seed in (1, 2):
        for method in leaders:
            yield from unfinished([Run("final", method, best_rate(read(args.out), method, args), seed, args.images)])
    yield from unfinished([Run("timing", method, args.rates[0], 0, TIMED_IMAGES) for method in trained])


def conditions_of(args: argparse.Namespace) -> dict[str, object]:
    """Return what all runs of a file must have in common, beside what no argument says: code, shards and evaluation."""
    return {name: getattr(args, name) for name in ("precision", "device", "processes")} | {"config": args.config.name}


def check_conditions(records: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """End the script where finished runs can't be compared with those that it would add."""
    for record in records:
        if record["conditions"] != conditions_of(args):
            raise SystemExit(f"{args.out}: holds runs of {record['conditions']}, got {conditions_of(args)}")


def read(out: Path) -> list[dict[str, Any]]:
    """Return the finished runs."""
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []


def best_rate(records: list[dict[str, Any]], method: str, args: argparse.Namespace) -> float:
    """Return the learning rate of the grid with the best verification of held-out identities."""
    of_method = [
        record
        for record in records
        if (record["run"]["stage"], record["run"]["method"]) == ("grid", method)
        and record["run"]["images"] == args.grid_images
        and record["run"]["rate"] in args.rates
    ]
    rate: float = max(of_method, key=lambda record: record["heldout"])["run"]["rate"]
    return rate


def step_s_of(records: list[dict[str, Any]], method: str) -> float | None:
    """Return the seconds of a step of the method's timing; None where it hasn't run."""
    timed = [record for record in records if (record["run"]["stage"], record["run"]["method"]) == ("timing", method)]
    return timed[-1]["step_s"] if timed else None


def finals(records: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Return the final runs of each chosen method, by seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for method in args.methods:
        images = 0 if method == "untrained" else args.images
        of_method = [r for r in records if r["run"]["stage"] == "final" and r["run"]["images"] == images]
        found[method] = [record for record in of_method if record["run"]["method"] == method]
        if method != "untrained" and found[method]:  # a longer grid may have chosen another rate since
            rate = best_rate(records, method, args)
            found[method] = [record for record in found[method] if record["run"]["rate"] == rate]
    return found


def train(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate one network and return its line."""
    name = f"{run.method.replace(' ', '_')}-{run.stage}-{run.images}-{run.rate:g}-{run.seed}"
    folder, final = args.work / name, run.stage == "final"
    command = [*launcher(args), "-m", "facetrain.train", "--config", str(args.config)]
    command += [text for key, value in flags_of(run, folder, args).items() for text in (f"--{key}", str(value))]
    folder.parent.mkdir(parents=True, exist_ok=True)
    started_at = time.perf_counter()
    with (args.work / f"{name}.log").open("a", encoding="utf-8") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env={"OMP_NUM_THREADS": "1", **os.environ}, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: training failed, see {log.name}")
    seconds = time.perf_counter() - started_at
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    judged = {name: results[protocol][key] for name, (protocol, key) in FIGURES.items()} if final else {}
    curve = quality_over_steps(folder, images_per_step=2 * both(run.method).pairs) if final else {}
    timing = {"seconds": round(seconds), "step_s": step_seconds(folder)}
    return {
        "run": vars(run),
        "conditions": conditions_of(args),
        "heldout": results["heldout"]["accuracy"],
        **judged,
        **timing,
        **curve,
    }


def launcher(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the command that starts the processes of a run."""
    return (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes))


def both(method: str) -> Method:
    """Return a method of either table."""
    return (METHODS | SHAPES)[method]


def flags_of(run: Run, folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """Return the settings of a run."""
    method = both(run.method)
    steps = math.ceil(run.images / (2 * method.pairs))
    evaluation = {
        "eval.images": f"[{', '.join(str(path) for path in args.lfw_images)}]",
        "eval.pairs": args.pairs,
        "eval.open_set_people": args.open_set_people,
    }
    return {
        "run.dir": folder,
        "run.seed": run.seed,
        "run.device": args.device,
        "data.shards": args.shards,
        "loss.name": method.loss,
        "loss.l2_weight": 0.002 if method.npair_penalty else 0.0,
        "train.global_pairs": method.pairs,
        "train.steps": steps,
        "train.learning_rate": run.rate,
        "train.warmup_steps": min(20, steps // 10),
        "train.log_every_steps": max(1, steps // 20),
        "train.save_every_steps": max(1, steps // CURVE_POINTS),
        "train.keep_checkpoints": CURVE_POINTS + 2,
        "mining.mode": "off",
        "mining.warmup_steps": steps // 4,  # an untrained network's neighbours mean nothing
        "eval.every_steps": 0,
        "tracking.backend": "none",
        **({"train.precision": args.precision} if args.precision else {}),
        **(evaluation if run.stage == "final" else {}),
        **method.flags,
    }


def step_seconds(folder: Path) -> float | None:
    """Return the mean seconds of a step, mining included, without the first log line; None where none was logged."""
    if not (folder / "metrics.jsonl").exists():
        return None
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = [line["train/step_s"] for line in lines if "train/step_s" in line]
    return statistics.fmean(logged[1:] or logged) if logged else None


def one_line(record: dict[str, Any]) -> str:
    """Return a run's figures for the terminal."""
    run = record["run"]
    figures = "  ".join(f"{name} {record[name]:.2%}" for name in FIGURES if name in record)
    what = f"{run['stage']} {run['method']}, learning rate {run['rate']:g}, seed {run['seed']}"
    return f"{what}: held-out {record['heldout']:.2%}  {figures}  {record['seconds']} s"


def show(records: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Print the table of final runs, and where N-pair-mc reaches the triplet loss's final value."""
    found = {method: runs for method, runs in finals(records, args).items() if runs}
    print(f"\n{args.images} training images a run; mean +- standard deviation over seeds; a single run has none")
    columns = ("seeds", "rate", *FIGURES, "held-out", "Recall@1 train", "Recall@1 held-out", "s/epoch")
    width = max(map(len, METHODS))
    print(" " * width, *(f"{name:>18}" for name in columns))
    for method, runs in found.items():
        step_s = step_s_of(records, method)
        epoch_s = f"{step_s * runs[0]['identities'] / both(method).identities:.1f}" if step_s else "-"
        last = [record["curve"][-1] for record in runs]
        cells = [str(len(runs)), f"{runs[0]['run']['rate']:g}"]
        cells += [spread([record[key] for record in runs]) for key in (*FIGURES, "heldout")]
        cells += [spread([point[key] for point in last]) for key in ("train_recall_at_1", "heldout_recall_at_1")]
        print(method.ljust(width), *(f"{cell:>18}" for cell in [*cells, epoch_s]))
    for method in (name for name in found if name.startswith("triplet")):
        target = found[method][0]["curve"][-1]["triplet_loss"]
        for rival in (name for name in found if name.startswith("npair")):
            points = [point for point in found[rival][0]["curve"] if point["triplet_loss"] <= target]
            at = f"after {points[0]['images']} images" if points else "never"
            print(f"{rival} reaches the final held-out triplet loss of {method}, {target:.4f}, {at}")


def spread(values: list[float]) -> str:
    """Return mean +- standard deviation in percent; a single value has none."""
    deviation = f" +- {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.2f}{deviation} %"


if __name__ == "__main__":
    main()
