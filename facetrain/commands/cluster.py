"""Commands for clusters: doctor, launch."""

import os
from collections.abc import Sequence
from typing import Any

from facetrain.command_line import new_parser, parse_arguments, parse_config, parse_config_and_flags, say


def doctor(argv: Sequence[str]) -> None:
    """Check and measure the hosts that a run would use."""

    def add_flags(parser: Any) -> None:
        parser.add_argument("--distributed", action="store_true", help="refuse to run outside of a launcher")

    config, args = parse_config_and_flags(argv, "facetrain doctor", "Check the hosts that a run would use", add_flags)
    if args.distributed and "RANK" not in os.environ:
        raise ValueError(
            "--distributed: start it like the training, on every host: bash launch/torchrun.sh --doctor ..., or"
            " facetrain launch slurm --doctor ..."
        )
    from facetrain.doctor import examine

    examine(config, reads_shards=any(word.startswith(("--config", "--data.shards")) for word in argv))


def launch(argv: Sequence[str]) -> None:
    """Start a training on a cluster's queue."""
    parser = new_parser("facetrain launch", "Submit a training to SLURM; flags of the training come after --.")
    parser.add_argument("queue", choices=("slurm",), help="the kind of queue")
    parser.add_argument("--config", type=str, required=True, help="YAML file of the training's settings")
    parser.add_argument("--nodes", type=int, default=1, help="machines")
    parser.add_argument("--gpus-per-node", type=int, help="GPUs and processes of each; without it one process on CPUs")
    parser.add_argument(
        "--cpus-per-node", type=int, help="cores; with GPUs, by default one and data.workers more for each of them"
    )
    parser.add_argument("--partition", type=str, help="SLURM's partition; its default if not given")
    parser.add_argument("--time", type=str, help="time limit, such as 24:00:00; after it the job is queued again")
    parser.add_argument("--account", type=str, help="SLURM's account")
    parser.add_argument("--doctor", action="store_true", help="check and measure the hosts instead of training")
    parser.add_argument("--dry-run", action="store_true", help="print the script instead of submitting it")
    words = list(argv)
    at = words.index("--") if "--" in words else len(words)
    args, settings = parse_arguments(parser, words[:at]), words[at + 1 :]
    for name in ("nodes", "gpus_per_node", "cpus_per_node"):
        if args[name] is not None and args[name] < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected 1 or more, got {args[name]}")
    config = parse_config(["--config", args.config, *settings], prog="facetrain train")
    from facetrain.data.plan import pairs_per_rank
    from facetrain.slurm import job_script, submit

    pairs_per_rank(config.train.global_pairs, args.nodes * (args.gpus_per_node or 1))
    cores = args.cpus_per_node or (args.gpus_per_node or 0) * (1 + config.data.workers) or None
    options = {
        "nodes": args.nodes,
        "gpus-per-node": args.gpus_per_node,
        "cpus-per-task": cores,  # a task is a node's torchrun; SLURM would give it one core
        "partition": args.partition,
        "time": args.time,
        "account": args.account,
    }
    training = [*(["--doctor"] if args.doctor else []), "--config", args.config, *settings]
    script = job_script({name: str(value) for name, value in options.items() if value is not None}, training)
    say(script.rstrip() if args.dry_run else submit(script))
