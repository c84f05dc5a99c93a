"""The one command `facetrain`. Heavy imports wait until a command needs them."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from facetrain import __version__
from facetrain.command_line import new_parser, parse_arguments, parse_config, user_errors

Command = Callable[[Sequence[str]], None]


def main(argv: Sequence[str] | None = None) -> None:
    """Run `facetrain COMMAND ...`; a user's error is one line on stderr and exit code 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    name, rest = (words[0] if words else "--help"), words[1:]
    with user_errors():
        if name in ("-h", "--help"):
            _print(_USAGE)
        elif name == "--version":
            _print(__version__)
        elif name in _COMMANDS:
            _COMMANDS[name](rest)
        else:
            raise ValueError(f"'{name}': expected a command, one of {', '.join(_COMMANDS)}")


def _pack(argv: Sequence[str]) -> None:
    """Pack identity-labelled images into shards."""
    parser = new_parser("facetrain pack", "Pack a folder per identity, or tars of that, into training shards.")
    parser.add_argument("source", nargs="+", type=str, help="folder with a folder per identity, or tars of that")
    parser.add_argument("out", type=str, help="folder for the shards")
    parser.add_argument("--image-px", type=int, default=112, help="side of the images in the shards, in pixels")
    parser.add_argument("--quality", type=int, default=92, help="JPEG quality of images that have to be resized")
    parser.add_argument("--workers", type=int, help="processes; all cores by default")
    args = parse_arguments(parser, argv)
    from facetrain.data.pack import pack

    manifest = pack(
        [Path(source) for source in args.source],
        Path(args.out),
        image_px=args.image_px,
        quality=args.quality,
        workers=args.workers,
    )
    _print(
        f"{args.out}: {manifest.images} images of {manifest.identities} identities, {manifest.rejected_images} rejected"
    )


def _synth(argv: Sequence[str]) -> None:
    """Draw synthetic identities."""
    parser = new_parser("facetrain synth", "Draw synthetic faces: a training set and a held-out set with pairs.")
    parser.add_argument("out", type=str, help="folder for train/, heldout/ and the lists")
    parser.add_argument("--num-identities", type=int, default=500, help="identities to train on")
    parser.add_argument("--images-per-identity", type=int, default=10, help="images of each of them")
    parser.add_argument("--heldout-identities", type=int, default=200, help="identities to evaluate on")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn")
    parser.add_argument("--workers", type=int, help="processes; all cores by default")
    args = parse_arguments(parser, argv)
    from facetrain.data.synthetic import synthesize

    synthesize(
        Path(args.out),
        num_identities=args.num_identities,
        images_per_identity=args.images_per_identity,
        heldout_identities=args.heldout_identities,
        seed=args.seed,
        workers=args.workers,
    )
    _print(f"{args.out}: faces in train/ and heldout/, lists heldout_pairs.txt and heldout_people.txt")


def _train(argv: Sequence[str]) -> None:
    """Train a face embedding in one process."""
    config = parse_config(argv, prog="facetrain train")
    from facetrain.train import train

    train(config)


def _check(argv: Sequence[str]) -> None:
    """Check a run's config and everything it would read."""
    config = parse_config(argv, prog="facetrain check")
    from facetrain.run_folder import open_run_folder
    from facetrain.train import open_inputs

    inputs = open_inputs(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    open_run_folder(config)
    _print(f"ok: {inputs.split.describe()}; {inputs.plan.steps_per_epoch} steps an epoch")


def _lfw(argv: Sequence[str]) -> None:
    """Evaluate weights or embeddings on LFW."""
    parser = new_parser("facetrain lfw", "Evaluate on LFW: verification, closed-set and open-set identification.")
    parser.add_argument("--checkpoint", type=str, help="run folder or .safetensors file whose network embeds --images")
    parser.add_argument(
        "--images",
        nargs="+",
        type=str,
        help="folder of Name/Name_0001.jpg, or tars of it; with --embeddings they are shown in the report",
    )
    parser.add_argument("--embeddings", type=str, help=".npz with names and embeddings, instead of --checkpoint")
    parser.add_argument("--pairs", type=str, required=True, help="LFW's pairs.txt, or a list of that form")
    parser.add_argument("--open-set-people", type=str, help="list of the people of open-best-rowden")
    parser.add_argument("--no-mirror", action="store_true", help="don't add the embedding of the mirrored image")
    parser.add_argument("--draws", type=int, default=1, help="seeded draws of the probes of open-best-rowden")
    parser.add_argument("--dataset", type=str, default="lfw", help="name of the set; with 'lfw' its counts are checked")
    parser.add_argument("--distractors", nargs="+", type=str, help=".npy embeddings of strangers for every gallery")
    parser.add_argument("--search", choices=("exact", "ivf"), default="exact", help="of distractors; ivf is FAISS's")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="cuda where there is one")
    parser.add_argument("--out", type=str, required=True, help="folder for results.json, report.html and figures")
    args = parse_arguments(parser, argv)
    if (args.checkpoint is None) == (args.embeddings is None):
        raise ValueError("facetrain lfw: expected either --checkpoint with --images, or --embeddings")
    if args.checkpoint is not None and args.images is None:
        raise ValueError("facetrain lfw: --checkpoint goes with --images")
    if args.draws < 1:
        raise ValueError(f"--draws: expected 1 or more, got {args.draws}")
    if args.search != "exact" and args.distractors is None:
        raise ValueError("--search: goes with --distractors")
    from facetrain.evaluate import Distractors, evaluate_checkpoint, evaluate_embeddings

    lists = {
        "pairs": Path(args.pairs),
        "open_set_people": Path(args.open_set_people) if args.open_set_people else None,
        "draws": args.draws,
        "dataset": args.dataset,
        "distractors": Distractors(files=tuple(map(Path, args.distractors or ())), search=args.search),
        "device": args.device,
        "out": Path(args.out),
    }
    images = [Path(path) for path in args.images or ()]
    if args.embeddings is not None:
        evaluate_embeddings(Path(args.embeddings), images, **lists)
    else:
        evaluate_checkpoint(Path(args.checkpoint), images, mirror=not args.no_mirror, **lists)


def _retrieval(argv: Sequence[str]) -> None:
    """Evaluate retrieval and clustering on any labelled set."""
    parser = new_parser("facetrain retrieval", "Recall@K, MAP@R, kNN, M negatives; k-means: NMI and F1.")
    parser.add_argument("--checkpoint", type=str, help="run folder or .safetensors file whose network embeds --images")
    parser.add_argument("--images", nargs="+", type=str, help="folder with a folder per class, or tars of that")
    parser.add_argument("--embeddings", type=str, help=".npz with names and embeddings, instead of --checkpoint")
    parser.add_argument("--recall-at", nargs="+", type=int, help="K of Recall@K; by default 1 2 4 8 10 100")
    parser.add_argument("--negatives", nargs="+", type=int, help="M of M other classes; by default 1 9 99 999")
    parser.add_argument("--clusterings", type=int, default=10, help="runs of k-means; 0 leaves clustering out")
    parser.add_argument("--seed", type=int, default=0, help="seed of negatives and of k-means")
    parser.add_argument("--no-mirror", action="store_true", help="don't add the embedding of the mirrored image")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="cuda where there is one")
    parser.add_argument("--out", type=str, required=True, help="folder for results.json")
    args = parse_arguments(parser, argv)
    if (args.checkpoint is None) == (args.embeddings is None) or (args.checkpoint is None) != (args.images is None):
        raise ValueError("facetrain retrieval: expected either --checkpoint with --images, or --embeddings")
    if args.clusterings < 0:
        raise ValueError(f"--clusterings: expected 0 or more, got {args.clusterings}")
    from facetrain.retrieve import RetrievalSettings, retrieval_of_checkpoint, retrieval_of_embeddings

    settings = RetrievalSettings(
        recall_at=tuple(args.recall_at or ()),
        negatives=tuple(args.negatives or ()),
        clusterings=args.clusterings,
        seed=args.seed,
    )
    common = {"device": args.device, "out": Path(args.out)}
    if args.embeddings is not None:
        retrieval_of_embeddings(Path(args.embeddings), settings, **common)
    else:
        images = [Path(path) for path in args.images]
        retrieval_of_checkpoint(Path(args.checkpoint), images, settings, mirror=not args.no_mirror, **common)


_COMMANDS: dict[str, Command] = {
    "synth": _synth,
    "pack": _pack,
    "train": _train,
    "check": _check,
    "lfw": _lfw,
    "retrieval": _retrieval,
}

_USAGE = "usage: facetrain COMMAND ...\n\n" + "\n".join(
    f"  {name:10}{command.__doc__}" for name, command in _COMMANDS.items()
)


def _print(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(text + "\n")
