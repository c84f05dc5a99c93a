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
import shutil
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from cluster.faults import FAULTS
from cluster.measure import Bench
from cluster.training import Training
from mlflow_server import free_port
from proxy import TcpProxy


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
    """Time the steps of runs without MLflow and with one that hangs, in turns: 300 steps each, without the first 20."""
    seconds: dict[str, list[float]] = {"none": [], "mlflow": []}
    with TcpProxy(free_port()) as proxy:
        proxy.mode = "stall"
        env = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{proxy.port}"}
        for turn, backend in enumerate(("none", "mlflow", "none", "mlflow", "none", "mlflow")):
            settings = bench.settings(f"{turn}_{backend}", tracking__backend=backend, train__steps=300)
            shutil.rmtree(settings["run.dir"], ignore_errors=True)
            with Training(settings, env=env) as training:
                assert training.wait_until_ended() == [0], training.said()
            rows = [json.loads(line) for line in (training.run_dir / "metrics.jsonl").read_text().splitlines()]
            seconds[backend].append(statistics.median(row["train/step_s"] for row in rows[20:]))
            print(f"tracking.backend={backend}: {seconds[backend][-1] * 1e3:.3f} ms a step", flush=True)
    without, hanging = (statistics.median(values) for values in seconds.values())
    return f"a step takes {hanging / without - 1:+.2%} while MLflow hangs (medians of {len(seconds['none'])} runs)"


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
