"""Commands of a run: train, check, estimate, sync."""

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from facetrain.command_line import new_parser, parse_arguments, parse_config, parse_config_and_flags, say
from facetrain.config.bounds import at_least


def train(argv: Sequence[str]) -> None:
    """Train a face embedding in one process."""
    config = parse_config(argv, prog="facetrain train")
    from facetrain.train import train

    train(config)


def check(argv: Sequence[str]) -> None:
    """Check a run's config and everything it would read."""

    def add_flags(parser: Any) -> None:
        parser.add_argument("--world-sizes", type=str, help="numbers of processes, such as 2,4; default: as launched")
        parser.add_argument("--show", type=str, help="print the value of this key instead, such as run.dir")

    config, args = parse_config_and_flags(argv, "facetrain check", "Check what a run would read", add_flags)
    if args.show is not None:
        if args.show not in config.flat():
            raise ValueError(f"--show: expected a key such as run.dir, got '{args.show}'")
        say(str(config.flat()[args.show]))
        return
    from facetrain.data.plan import pairs_per_rank
    from facetrain.world import launched_world_size

    sizes = (args.world_sizes or str(launched_world_size())).split(",")

    for size in sizes:  # all of them before anything is read
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"--world-sizes: expected numbers of processes, got '{size}'")
        pairs_per_rank(config.train.global_pairs, int(size))
    from facetrain.inputs import open_inputs
    from facetrain.run_folder import open_run_folder

    for size in sizes:
        inputs = open_inputs(config, world_size=int(size))
    open_run_folder(config)
    say(f"ok: {inputs.split.describe()}; {inputs.plan.steps_per_epoch} steps an epoch")


def estimate(argv: Sequence[str]) -> None:
    """Estimate memory, traffic and images/s on a cluster."""
    from facetrain.estimate.cluster import Cluster

    speeds = fields(Cluster)

    def add_flags(parser: Any) -> None:
        for key in speeds:
            flag = "--" + key.name.replace("_", "-")
            parser.add_argument(flag, type=key.type, default=key.default, help=key.metadata["help"])
        parser.add_argument("--identities", type=int, default=10_575, help="trained on, for mining and class vectors")
        parser.add_argument("--json", type=str, help="file for everything that was estimated")

    config, args = parse_config_and_flags(
        argv, "facetrain estimate", "Estimate what a run takes on a cluster; no GPU is needed", add_flags
    )
    at_least("--identities", args.identities, 2 * config.train.global_pairs // config.train.images_per_identity)
    cluster = Cluster(**{key.name: args[key.name] for key in speeds})
    from facetrain.estimate.model import estimate, largest_fitting_micro_pairs
    from facetrain.estimate.report import estimate_record, format_estimate
    from facetrain.mining.mode import check_mode

    check_mode(config, num_identities=args.identities, world_size=cluster.world_size)
    found = estimate(config, cluster, identities=args.identities)
    if args.json is not None:
        Path(args.json).write_text(json.dumps(estimate_record(config, found), indent=1) + "\n")
    fitting = None if found.fits else largest_fitting_micro_pairs(config, cluster, identities=args.identities)
    say(format_estimate(config, found, fitting_micro_pairs=fitting))


def sync(argv: Sequence[str]) -> None:
    """Send MLflow what it lacks of a run."""
    parser = new_parser("facetrain sync", "Send to MLflow what couldn't be sent while training.")
    parser.add_argument("run", type=str, help="run folder")
    parser.add_argument("--register", type=str, help="send the model too, and register it under this name")
    args = parse_arguments(parser, argv)
    run_dir = Path(args.run)
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir}: expected a run folder")
    from facetrain.lock import hold_folder
    from facetrain.tracking import sync

    with hold_folder(run_dir):  # a running job sends by itself
        say(f"{run_dir}: MLflow has everything: {sync(run_dir, register_as=args.register)}")
