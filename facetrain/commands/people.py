"""Commands for those who use a trained network: embed, export."""

from collections.abc import Sequence
from pathlib import Path

from facetrain.command_line import new_parser, parse_arguments, say
from facetrain.commands.embedding_flags import add_embedding_flags, embed_options


def embed(argv: Sequence[str]) -> None:
    """Embed folders, tars or lists of images into a file."""
    parser = new_parser("facetrain embed", "Embed images; the same command goes on where it was interrupted.")
    parser.add_argument(
        "images", nargs="+", type=str, help="folders, tars, .txt lists, image files, labelled sources; - for stdin"
    )
    parser.add_argument("--checkpoint", type=str, required=True, help="run folder, .safetensors or .onnx file")
    add_embedding_flags(parser)
    parser.add_argument("--out", type=str, required=True, help=".npz or .parquet file of names and embeddings")
    args = parse_arguments(parser, argv)
    options = embed_options(args)
    from facetrain.embed_files import embed_to_file

    embed_to_file(Path(args.checkpoint), [Path(path) for path in args.images], options, Path(args.out))


def export(argv: Sequence[str]) -> None:
    """Export a network as ONNX or torch.export."""
    parser = new_parser("facetrain export", "Export a network, and compare what it then computes with PyTorch.")
    parser.add_argument("run", type=str, help="run folder or .safetensors file")
    parser.add_argument("--format", choices=("onnx", "torch"), default="onnx", help="onnx, or torch.export's .pt2")
    parser.add_argument(
        "--preprocess", action="store_true", help="take aligned faces, uint8 [B, H, H, 3] in RGB, not [-1, 1] floats"
    )
    parser.add_argument("--out", type=str, help="file; by default model.onnx or model.pt2 in the run folder")
    args = parse_arguments(parser, argv)
    from facetrain.export import export_network

    run = Path(args.run)
    folder = run.parent if run.suffix == ".safetensors" else run
    out = Path(args.out) if args.out else folder / ("model.onnx" if args.format == "onnx" else "model.pt2")
    say(export_network(run, out, form=args.format, preprocess=args.preprocess))
