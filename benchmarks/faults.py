"""What each fault costs a training, as a table: `python benchmarks/faults.py --out runs/faults`.

Makes tiny runs on this machine, does each of them harm, and compares the final weights with those of an undisturbed
run. A line of JSON per fault goes to `faults.jsonl` in the folder; started again, what is there isn't measured again.
Needs root, for network namespaces (two hosts) and a small disk; without, those faults are left out. Ten to thirty
minutes. `--only NAME...` takes some faults; `--table` prints what is there. `--slowdown` measures something else: how
much longer a step takes when MLflow's server takes requests and never answers.

The faults are those of tests/cluster/faults.py, which the tests run too.
"""

import argparse
import json
import math
import shutil
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import psutil
from cluster.faults import FAULTS
from cluster.measure import Bench
from cluster.training import Training
from mlflow_server import free_port
from proxy import TcpProxy

PAIRS = 8
"""Of runs without and with MLflow, for `--slowdown`."""


def main() -> None:
    """Measure what isn't there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of faults.jsonl")
    parser.add_argument("--only", nargs="+", help="names of faults")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--slowdown", action="store_true", help="time steps while MLflow hangs; no faults")
    args = parser.parse_args()
    if args.slowdown:
        print(slowdown(Bench(args.out.absolute() / "slowdown", shards_in(args.out.absolute()))))
        return
    file = args.out / "faults.jsonl"
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if not args.table:
        bench = Bench(args.out.absolute() / "runs", shards_in(args.out.absolute()))
        for fault, missing in FAULTS.items():
            name = fault.__name__
            if name not in (args.only or [name]) or name in [row["name"] for row in known]:
                continue
            if reason := missing():
                print(f"{name}: left out ({reason})")
                continue
            print(f"{name} ...", flush=True)
            for left_over in bench.folder.glob(f"{name}*"):  # by one that was interrupted
                shutil.rmtree(left_over)
            known.append({"name": name, "fault": fault.__doc__, **asdict(fault(bench))})
            with file.open("a") as stream:
                stream.write(json.dumps(known[-1]) + "\n")
    print("\n".join(table(known)))


def shards_in(folder: Path) -> Path:
    """Return shards of drawn people, made where they aren't there."""
    if not (folder / "shards").exists():
        from facetrain.data.pack import pack
        from facetrain.data.synthetic import synthesize

        people = {"num_identities": 48, "images_per_identity": 4, "heldout_identities": 24}
        synthesize(folder / "faces", **people, workers=1)
        pack([folder / "faces" / "train"], folder / "shards", workers=1)
    return folder / "shards"


def slowdown(bench: Bench) -> str:
    """Time the steps of runs without MLflow and with one that hangs: pairs of 150 steps, without the first 20.

    Runs of one kind differ by some percent among themselves, so each pair gives a ratio, and their median and standard
    error count. Beside it stands the processor time of all threads but the training one, which bounds what they can
    take from it.
    """
    ratios: list[float] = []
    shares: dict[str, list[float]] = {"none": [], "mlflow": []}
    with TcpProxy(free_port()) as proxy:
        proxy.mode = "stall"
        env = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{proxy.port}"}
        for pair in range(PAIRS):
            seconds = {}
            for backend in ("none", "mlflow") if pair % 2 else ("mlflow", "none"):
                seconds[backend], share = step_seconds(bench, f"{pair}_{backend}", backend, env)
                shares[backend].append(share)
                print(f"tracking.backend={backend}: {seconds[backend] * 1e3:.3f} ms a step", flush=True)
            ratios.append(seconds["mlflow"] / seconds["none"] - 1)
    error = statistics.stdev(ratios) / math.sqrt(len(ratios))
    return (
        f"a step takes {statistics.median(ratios):+.2%} while MLflow hangs (median of {PAIRS} pairs, standard error "
        f"{error:.2%}); all threads but the training one take {statistics.median(shares['mlflow']):.2%} of its time, "
        f"{statistics.median(shares['none']):.2%} without MLflow"
    )


def step_seconds(bench: Bench, name: str, backend: str, env: dict[str, str]) -> tuple[float, float]:
    """Return the median seconds of a step of a run, and the processor time of its other threads beside training's."""
    settings = bench.settings(name, tracking__backend=backend, train__steps=150)
    shutil.rmtree(settings["run.dir"], ignore_errors=True)
    with Training(settings, env=env) as training:
        training.wait_for_step(20)
        before = thread_seconds(training.worker())
        training.wait_for_step(140)
        used = thread_seconds(training.worker())
        assert training.wait_until_ended() == [0], training.said()
    main, *others = (used[thread] - before.get(thread, 0.0) for thread in sorted(used))
    rows = [json.loads(line) for line in (training.run_dir / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(row["train/step_s"] for row in rows[20:]), sum(others) / main


def thread_seconds(process: psutil.Process) -> dict[int, float]:
    """Return the processor time of each thread; the first is the one that trains."""
    return {thread.id: thread.user_time + thread.system_time for thread in process.threads()}


def table(rows: list[dict[str, object]]) -> list[str]:
    """Return the rows as Markdown."""
    lines = ["| fault | what the user sees | seconds to that | to the next step | steps lost | final weights |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        seen = "none" if row["detected_s"] is None else f"{row['detected_s']:.1f}"
        said = f"`{row['said']}`" if row["detected_s"] is not None else row["said"]
        said = f"{said}; {row['note']}" if row["note"] else said
        equal = "equal" if row["is_equal"] else "DIFFER"
        cells = (str(row["fault"]).rstrip("."), said, seen, f"{row['next_step_s']:.1f}", row["steps_lost"], equal)
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return lines


if __name__ == "__main__":
    main()
