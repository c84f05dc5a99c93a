"""The one command `facetrain`. Heavy imports wait until a command needs them."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from facetrain import __version__
from facetrain.command_line import (
    new_parser,
    parse_arguments,
    parse_config,
    parse_config_and_flags,
    user_errors,
)

if TYPE_CHECKING:
    from facetrain.evaluate import EmbedOptions
    from facetrain.evaluation.lists import Request

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


def _estimate(argv: Sequence[str]) -> None:
    """Estimate memory, traffic and images/s on a cluster."""
    from facetrain.estimate.cluster import Cluster

    speeds = fields(Cluster)

    def add_flags(parser: Any) -> None:
        for key in speeds:
            flag = "--" + key.name.replace("_", "-")
            parser.add_argument(flag, type=key.type, default=key.default, help=key.metadata["help"])
        parser.add_argument("--identities", type=int, default=10_575, help="identities trained on, for mining")
        parser.add_argument("--json", type=str, help="file for everything that was estimated")

    config, args = parse_config_and_flags(
        argv, "facetrain estimate", "Estimate what a run takes on a cluster; no GPU is needed", add_flags
    )
    cluster = Cluster(**{key.name: args[key.name] for key in speeds})
    from facetrain.estimate.model import estimate, largest_fitting_micro_pairs
    from facetrain.estimate.report import estimate_record, format_estimate

    found = estimate(config, cluster, identities=args.identities)
    if args.json is not None:
        Path(args.json).write_text(json.dumps(estimate_record(config, found), indent=1) + "\n")
    fitting = None if found.fits else largest_fitting_micro_pairs(config, cluster, identities=args.identities)
    _print(format_estimate(config, found, fitting_micro_pairs=fitting))


def _lfw(argv: Sequence[str]) -> None:
    """Evaluate weights or embeddings on LFW."""
    parser = new_parser("facetrain lfw", "Evaluate on LFW: verification, closed-set and open-set identification.")
    parser.add_argument("--checkpoint", nargs="+", type=str, help="run folders, .safetensors or .onnx files that embed")
    parser.add_argument("--embeddings", type=str, help=".npz with names and embeddings, instead of --checkpoint")
    parser.add_argument("--bin", type=str, help="InsightFace verification file, instead of --images and lists")
    _add_embedding_flags(parser)
    _add_protocol_flags(parser)
    parser.add_argument("--bootstrap", type=int, default=0, help="resamples of people for intervals; 0: none")
    parser.add_argument(
        "--convention", choices=("exact", "insightface"), default="exact", help="insightface adds what that code prints"
    )
    parser.add_argument("--distractors", nargs="+", type=str, help=".npy embeddings of strangers for every gallery")
    parser.add_argument("--search", choices=("exact", "ivf"), default="exact", help="of distractors; ivf is FAISS's")
    parser.add_argument("--out", type=str, required=True, help="folder for results.json, report.html and figures")
    args = parse_arguments(parser, argv)
    if (args.checkpoint is None) == (args.embeddings is None):
        raise ValueError("facetrain lfw: expected either --checkpoint with --images or --bin, or --embeddings")
    if args.checkpoint is not None and args.images is None and args.bin is None:
        raise ValueError("facetrain lfw: --checkpoint goes with --images or --bin")
    if args.embeddings is not None and args.bin is not None:
        raise ValueError("facetrain lfw: --bin goes with --checkpoint")
    if args.search != "exact" and args.distractors is None:
        raise ValueError("--search: goes with --distractors")
    if args.images is not None and args.bin is not None:
        raise ValueError("facetrain lfw: expected --images or --bin, got both")
    request, out = _request(args, convention=args.convention), Path(args.out)
    lists = (args.pairs, args.blufr, args.view1, args.open_set_people, args.bootstrap, args.distractors)
    if args.bin is not None and any(lists):
        raise ValueError("--bin: holds its own pairs of unknown people; no lists, --bootstrap or --distractors")
    from facetrain import evaluate

    images = [Path(path) for path in args.images or ()]
    distractors = evaluate.Distractors(files=tuple(map(Path, args.distractors or ())), search=args.search)
    if args.embeddings is not None:
        evaluate.evaluate_embeddings(Path(args.embeddings), images, distractors, request, out, device=args.device)
        return
    checkpoints, options = [Path(path) for path in args.checkpoint], _embed_options(args)
    if args.bin is not None:
        evaluate.evaluate_bin(checkpoints, Path(args.bin), options, request, out)
    else:
        evaluate.evaluate_checkpoints(checkpoints, images, options, distractors, request, out)


def _compare(argv: Sequence[str]) -> None:
    """Tell whether one of two embeddings is better, by how much, and on whom."""
    parser = new_parser("facetrain compare", "Compare two embeddings of one set on the same lists.")
    parser.add_argument("a", type=str, help=".npz with names and embeddings, or what --checkpoint of lfw takes")
    parser.add_argument("b", type=str, help="the other one; a difference is B - A")
    _add_embedding_flags(parser)
    _add_protocol_flags(parser)
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples of people for the intervals")
    parser.add_argument("--out", type=str, help="folder for compare.json, which names everybody on whom they differ")
    args = parse_arguments(parser, argv)
    files, images = (Path(args.a), Path(args.b)), [Path(path) for path in args.images or ()]
    if args.bootstrap == 0:
        raise ValueError("--bootstrap: expected 100 resamples or more, got 0")
    request = _request(args)
    from facetrain.evaluate import compare_files

    compare_files(*files, images, _embed_options(args), request, Path(args.out) if args.out else None)


def _add_embedding_flags(parser: Any) -> None:
    parser.add_argument("--images", nargs="+", type=str, help="folder of Name/Name_0001.jpg, or tars; shown in reports")
    parser.add_argument("--landmarks", type=str, help="list of five points per image: align photographs by them")
    parser.add_argument("--detector", type=str, help="face_detection_yunet.onnx: align photographs by what it finds")
    parser.add_argument("--no-mirror", action="store_true", help="don't add the embedding of the mirrored image")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="cuda where there is one")
    parser.add_argument("--onnx-mean", type=float, default=127.5, help="ONNX input is (pixel - mean) / std")
    parser.add_argument("--onnx-std", type=float, default=127.5, help="ONNX input is (pixel - mean) / std")
    parser.add_argument("--onnx-colour", choices=("rgb", "bgr"), default="rgb", help="order of channels of ONNX input")


def _add_protocol_flags(parser: Any) -> None:
    parser.add_argument("--pairs", type=str, help="verification: LFW's pairs.txt, or a list of that form")
    parser.add_argument(
        "--view1", nargs=2, type=str, help="pairsDevTrain.txt and pairsDevTest.txt, to choose models by"
    )
    parser.add_argument("--open-set-people", type=str, help="list of the people of open-best-rowden")
    parser.add_argument("--closed-gallery", type=str, help="list of the gallery images of closed-best-rowden")
    parser.add_argument("--closed-probes", type=str, help="list of the probe images of closed-best-rowden")
    parser.add_argument("--blufr", type=str, help="the ten trials of BLUFR, blufr_lfw_config.mat")
    parser.add_argument("--draws", type=int, default=1, help="seeded draws in open-best-rowden and closed-surrogate")
    parser.add_argument("--seed", type=int, default=0, help="seed of draws and resamples")
    parser.add_argument("--dataset", type=str, help="name of the set; with 'lfw', the default, its counts are checked")


def _request(args: Any, convention: Literal["exact", "insightface"] = "exact") -> "Request":
    if (args.closed_gallery is None) != (args.closed_probes is None):
        raise ValueError("--closed-gallery and --closed-probes go together")
    for flag, value in (("--draws", args.draws), ("--seed", args.seed)):
        if value < (flag == "--draws"):
            raise ValueError(f"{flag}: expected {int(flag == '--draws')} or more, got {value}")
    from facetrain.evaluation.lists import Request

    name = Path(args.bin).stem if getattr(args, "bin", None) else "lfw"
    return Request(
        pairs=Path(args.pairs) if args.pairs else None,
        view1=(Path(args.view1[0]), Path(args.view1[1])) if args.view1 else None,
        open_set_people=Path(args.open_set_people) if args.open_set_people else None,
        closed_lists=(Path(args.closed_gallery), Path(args.closed_probes)) if args.closed_gallery else None,
        blufr=Path(args.blufr) if args.blufr else None,
        draws=args.draws,
        bootstrap=args.bootstrap,
        convention=convention,
        dataset=name if args.dataset is None else args.dataset,
        seed=args.seed,
    )


def _embed_options(args: Any) -> "EmbedOptions":
    if args.landmarks is not None and args.detector is not None:
        raise ValueError("--landmarks, --detector: expected one of them, got both")
    from facetrain.evaluate import EmbedOptions
    from facetrain.models.onnx_backbone import OnnxInput

    return EmbedOptions(
        mirror=not args.no_mirror,
        device=args.device,
        onnx=OnnxInput(mean=args.onnx_mean, std=args.onnx_std, colour=args.onnx_colour),
        landmarks=Path(args.landmarks) if args.landmarks else None,
        detector=Path(args.detector) if args.detector else None,
    )


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
    "estimate": _estimate,
    "lfw": _lfw,
    "compare": _compare,
    "retrieval": _retrieval,
}

_USAGE = "usage: facetrain COMMAND ...\n\n" + "\n".join(
    f"  {name:10}{command.__doc__}" for name, command in _COMMANDS.items()
)


def _print(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(text + "\n")
