"""Commands that judge embeddings of faces by the protocols of LFW: lfw, compare."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from facetrain.command_line import new_parser, parse_arguments
from facetrain.commands.embedding_flags import HOW_TO_EMBED, add_embedding_flags, embed_options, refuse_flags

if TYPE_CHECKING:
    from facetrain.evaluation.lists import Request


def lfw(argv: Sequence[str]) -> None:
    """Evaluate weights or embeddings on LFW."""
    parser = new_parser("facetrain lfw", "Evaluate on LFW: verification, closed-set and open-set identification.")
    parser.add_argument("--checkpoint", nargs="+", type=str, help="run folders, .safetensors or .onnx files that embed")
    parser.add_argument("--embeddings", type=str, help=".npz with names and embeddings, instead of --checkpoint")
    parser.add_argument("--bin", type=str, help="InsightFace verification file, instead of --images and lists")
    parser.add_argument("--images", nargs="+", type=str, help="folder of Name/Name_0001.jpg, or tars; shown in reports")
    add_embedding_flags(parser)
    _add_protocol_flags(parser)
    parser.add_argument("--bootstrap", type=int, default=0, help="resamples of people for intervals; 0: none")
    parser.add_argument(
        "--convention", choices=("exact", "insightface"), default="exact", help="insightface adds what that code prints"
    )
    parser.add_argument("--groups", type=str, help="CSV of person and attributes: verification of each group apart")
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
    lists = (args.pairs, args.blufr, args.view1, args.open_set_people, args.bootstrap, args.distractors, args.groups)
    if args.bin is not None and any(lists):
        raise ValueError("--bin: holds its own pairs of unknown people; no lists, --bootstrap or --distractors")
    from facetrain import evaluate

    if args.embeddings is not None:
        refuse_flags(parser, args, "--embeddings", HOW_TO_EMBED)
    elif args.bin is not None:
        refuse_flags(parser, args, "--bin", ("landmarks", "detector", "closed_gallery", "draws"))
    images = [Path(path) for path in args.images or ()]
    distractors = evaluate.Distractors(files=tuple(map(Path, args.distractors or ())), search=args.search)
    if args.embeddings is not None:
        evaluate.evaluate_embeddings(Path(args.embeddings), images, distractors, request, out, device=args.device)
        return
    checkpoints, options = [Path(path) for path in args.checkpoint], embed_options(args)
    if args.bin is not None:
        evaluate.evaluate_bin(checkpoints, Path(args.bin), options, request, out)
    else:
        evaluate.evaluate_checkpoints(checkpoints, images, options, distractors, request, out)


def compare(argv: Sequence[str]) -> None:
    """Tell whether one of two embeddings is better, by how much, and on whom."""
    parser = new_parser("facetrain compare", "Compare two embeddings of one set on the same lists.")
    parser.add_argument("a", type=str, help=".npz with names and embeddings, or what --checkpoint of lfw takes")
    parser.add_argument("b", type=str, help="the other one; a difference is B - A")
    parser.add_argument(
        "--images", nargs="+", type=str, help="what networks embed: folder of Name/Name_0001.jpg, or tars"
    )
    add_embedding_flags(parser)
    _add_protocol_flags(parser)
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples of people for the intervals")
    parser.add_argument("--out", type=str, help="folder for compare.json, which names everybody on whom they differ")
    args = parse_arguments(parser, argv)
    files, images = (Path(args.a), Path(args.b)), [Path(path) for path in args.images or ()]
    if args.bootstrap == 0:
        raise ValueError("--bootstrap: expected 100 resamples or more, got 0")
    if all(file.suffix == ".npz" for file in files):
        refuse_flags(parser, args, "two .npz files", HOW_TO_EMBED)
    request = _request(args)
    from facetrain.evaluate import compare_files

    compare_files(*files, images, embed_options(args), request, Path(args.out) if args.out else None)


def _add_protocol_flags(parser: Any) -> None:
    parser.add_argument("--pairs", type=str, help="verification: LFW's pairs.txt, or a list of that form")
    parser.add_argument(
        "--view1", nargs=2, type=str, help="pairsDevTrain.txt and pairsDevTest.txt, to choose models by"
    )
    parser.add_argument("--open-set-people", type=str, help="list of the people of open-best-rowden")
    parser.add_argument("--closed-gallery", type=str, help="list of the gallery images of closed-best-rowden")
    parser.add_argument("--closed-probes", type=str, help="list of the probe images of closed-best-rowden")
    parser.add_argument("--blufr", type=str, help="the ten trials of BLUFR, blufr_lfw_config.mat")
    draws_help = "seeded draws in open-best-rowden; of closed-surrogate, ten with 1"
    parser.add_argument("--draws", type=int, default=1, help=draws_help)
    parser.add_argument("--seed", type=int, default=0, help="seed of draws and resamples")
    parser.add_argument("--dataset", type=str, help="name of the set; with 'lfw', the default, its counts are checked")


def _request(args: Any, convention: Literal["exact", "insightface"] = "exact") -> "Request":
    if (args.closed_gallery is None) != (args.closed_probes is None):
        raise ValueError("--closed-gallery and --closed-probes go together")
    for flag, value, least in (("--draws", args.draws, 1), ("--seed", args.seed, 0)):
        if value < least:
            raise ValueError(f"{flag}: expected {least} or more, got {value}")
    from facetrain.evaluation.lists import Request

    name = Path(args.bin).stem if getattr(args, "bin", None) else "lfw"
    return Request(
        pairs=Path(args.pairs) if args.pairs else None,
        view1=(Path(args.view1[0]), Path(args.view1[1])) if args.view1 else None,
        open_set_people=Path(args.open_set_people) if args.open_set_people else None,
        closed_lists=(Path(args.closed_gallery), Path(args.closed_probes)) if args.closed_gallery else None,
        blufr=Path(args.blufr) if args.blufr else None,
        groups=Path(args.groups) if getattr(args, "groups", None) else None,
        draws=args.draws,
        bootstrap=args.bootstrap,
        convention=convention,
        dataset=name if args.dataset is None else args.dataset,
        seed=args.seed,
    )
