"""What each fault costs a training, as a table: `python benchmarks/faults.py --out runs/faults`.

Makes tiny runs on this machine, does each of them harm, and compares the final weights with those of an undisturbed
run. A line of JSON per fault goes to `faults.jsonl` in the folder; started again, what is there isn't measured again.
Needs root, for network namespaces (two hosts) and a small disk; without, those faults are left out. Ten to thirty
minutes. `--only NAME...` takes some faults; `--table` prints what is there.

The faults are those of tests/cluster/faults.py, which the tests run too.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from cluster.faults import ON_A_SMALL_DISK, ON_ANY_MACHINE, ON_TWO_HOSTS
from cluster.hosts import missing_network
from cluster.measure import Bench, Outcome
from small_disk import missing_disk


def main() -> None:
    """Measure what isn't there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of faults.jsonl")
    parser.add_argument("--only", nargs="+", help="names of faults")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    file = args.out / "faults.jsonl"
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if not args.table:
        bench = Bench(args.out.absolute() / "runs", shards_in(args.out.absolute()))
        for fault in faults_here():
            wanted = fault.__name__ in (args.only or [fault.__name__])
            if not wanted or fault.__name__ in [row["name"] for row in known]:
                continue
            print(f"{fault.__name__} ...", flush=True)
            known.append({"name": fault.__name__, "fault": fault.__doc__, **asdict(fault(bench))})
            with file.open("a") as stream:
                stream.write(json.dumps(known[-1]) + "\n")
    print("\n".join(table(known)))


def faults_here() -> list[Callable[[Bench], Outcome]]:
    """Return the faults that this machine can make; say which it can't."""
    found: list[Callable[[Bench], Outcome]] = []
    for faults, reason in ((ON_TWO_HOSTS, missing_network()), (ON_A_SMALL_DISK, missing_disk()), (ON_ANY_MACHINE, "")):
        found += [] if reason else faults
        if reason:
            print(f"left out: {', '.join(fault.__name__ for fault in faults)} ({reason})")
    return found


def shards_in(folder: Path) -> Path:
    """Return shards of drawn people, made where they aren't there."""
    if not (folder / "shards").exists():
        from facetrain.data.pack import pack
        from facetrain.data.synthetic import synthesize

        people = {"num_identities": 48, "images_per_identity": 4, "heldout_identities": 24}
        synthesize(folder / "faces", **people, workers=1)
        pack([folder / "faces" / "train"], folder / "shards", workers=1)
    return folder / "shards"


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
