"""Command that judges embeddings of any labelled set: retrieval."""

from collections.abc import Sequence
from pathlib import Path

from facetrain.command_line import new_parser, parse_arguments
from facetrain.commands.embedding_flags import add_onnx_flags, onnx_input, refuse_flags


def retrieval(argv: Sequence[str]) -> None:
    """Evaluate retrieval and clustering on any labelled set."""
    parser = new_parser("facetrain retrieval", "Recall@K, MAP@R, kNN, M negatives; k-means: NMI and F1.")
    parser.add_argument("--checkpoint", nargs="+", type=str, help="run folders, .safetensors or .onnx files that embed")
    parser.add_argument("--images", nargs="+", type=str, help="folder with a folder per class, or tars of that")
    parser.add_argument("--embeddings", type=str, help=".npz with names and embeddings, instead of --checkpoint")
    parser.add_argument("--recall-at", nargs="+", type=int, help="K of Recall@K; by default 1 2 4 8 10 100")
    parser.add_argument("--negatives", nargs="+", type=int, help="M of M other classes; by default 1 9 99 999")
    parser.add_argument("--clusterings", type=int, default=10, help="runs of k-means; 0 leaves clustering out")
    parser.add_argument("--seed", type=int, default=0, help="seed of negatives and of k-means")
    parser.add_argument("--no-mirror", action="store_true", help="don't add the embedding of the mirrored image")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="cuda where there is one")
    add_onnx_flags(parser)
    parser.add_argument("--out", type=str, required=True, help="folder for results.json")
    args = parse_arguments(parser, argv)
    if (args.checkpoint is None) == (args.embeddings is None) or (args.checkpoint is None) != (args.images is None):
        raise ValueError("facetrain retrieval: expected either --checkpoint with --images, or --embeddings")
    for flag, value in (("--clusterings", args.clusterings), ("--seed", args.seed)):
        if value < 0:
            raise ValueError(f"{flag}: expected 0 or more, got {value}")
    if args.embeddings is not None:
        refuse_flags(parser, args, "--embeddings", ("no_mirror", "onnx_mean", "onnx_std", "onnx_colour"))
    from facetrain.networks import EmbedOptions
    from facetrain.retrieve import RetrievalSettings, retrieval_of_checkpoints, retrieval_of_embeddings

    settings = RetrievalSettings(
        recall_at=tuple(args.recall_at or ()),
        negatives=tuple(args.negatives or ()),
        clusterings=args.clusterings,
        seed=args.seed,
    )
    if args.embeddings is not None:
        retrieval_of_embeddings(Path(args.embeddings), settings, device=args.device, out=Path(args.out))
        return
    checkpoints, images = ([Path(path) for path in paths] for paths in (args.checkpoint, args.images))
    options = EmbedOptions(mirror=not args.no_mirror, device=args.device, onnx=onnx_input(args))
    retrieval_of_checkpoints(checkpoints, images, settings, options=options, out=Path(args.out))
