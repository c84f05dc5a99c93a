"""Commands for those who use a trained network: embed, export, index, search."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from facetrain.command_line import new_parser, parse_arguments, say
from facetrain.commands.embedding_flags import HOW_TO_EMBED, add_embedding_flags, embed_options, refuse_flags

if TYPE_CHECKING:
    from facetrain.gallery_faces import Faces


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


def index(argv: Sequence[str]) -> None:
    """Keep a gallery of people: make it, add to it, remove from it."""
    parser = new_parser("facetrain index", "Make a gallery of people, add to it, remove from it.")
    parser.add_argument("gallery", type=str, help="folder of the gallery")
    _add_faces_flags(parser, "folders of PERSON/IMAGE, tars of that, or another labelled source, to add")
    parser.add_argument(
        "--remove", nargs="+", type=str, default=[], help="names of people to remove, before any are added"
    )
    parser.add_argument(
        "--kind", choices=("flat", "ivf", "hnsw"), help="search: flat is exact; ivf and hnsw are FAISS's"
    )
    parser.add_argument("--no-pictures", action="store_true", help="keep no small pictures for the pages of searches")
    args = parse_arguments(parser, argv)
    faces, options = _faces(parser, args), embed_options(args)
    from facetrain.people import update_gallery

    pictures = not args.no_pictures
    update_gallery(Path(args.gallery), faces, options, kind=args.kind, remove=args.remove, pictures=pictures)


def search(argv: Sequence[str]) -> None:
    """Say who of a gallery a face is, or that it is nobody of them."""
    parser = new_parser("facetrain search", "Look for faces in a gallery of people.")
    parser.add_argument("gallery", type=str, help="folder of the gallery")
    _add_faces_flags(parser, "folders, tars, .txt lists or image files of faces to look for")
    parser.add_argument("--top", type=int, default=5, help="people listed for each face")
    parser.add_argument("--threshold", type=float, help="score from which on a face is somebody of the gallery")
    parser.add_argument("--far", type=float, help="instead: the threshold of this false accept rate in --results")
    parser.add_argument("--results", type=str, help="results.json of an evaluation; by default that of the run")
    parser.add_argument(
        "--protocol",
        type=str,
        help="whose threshold; gallery: its own images among other people, and the default where the run's results "
        "have no open-set threshold for that FAR",
    )
    parser.add_argument("--out", type=str, help="folder for search.json and a page with pictures, search.html")
    args = parse_arguments(parser, argv)
    if args.threshold is not None and args.far is not None:
        raise ValueError("--threshold, --far: expected one of them, got both")
    if args.far is None and (args.results is not None or args.protocol is not None):
        raise ValueError("--results, --protocol: go with --far")
    if args.top < 1:
        raise ValueError(f"--top: expected 1 or more, got {args.top}")
    if args.threshold is not None and not -1 <= args.threshold <= 1:
        raise ValueError(f"--threshold: expected a cosine, -1 to 1, got {args.threshold:g}")
    faces, options = _faces(parser, args), embed_options(args)
    if not (faces.images or faces.embeddings):
        raise ValueError("facetrain search: expected --images or --embeddings")
    from facetrain.people import Decision, search_gallery

    results = Path(args.results) if args.results else None
    decision = Decision(threshold=args.threshold, far=args.far, results=results, protocol=args.protocol)
    out = Path(args.out) if args.out else None
    search_gallery(Path(args.gallery), faces, options, decision, top=args.top, out=out)


def _add_faces_flags(parser: Any, images: str) -> None:
    parser.add_argument("--images", nargs="+", type=str, default=[], help=images)
    parser.add_argument("--checkpoint", type=str, help="run, .safetensors or .onnx; by default what made the gallery")
    parser.add_argument("--embeddings", type=str, help="instead: .npz with names and embeddings")
    add_embedding_flags(parser)


def _faces(parser: Any, args: Any) -> "Faces":
    if args.images and args.embeddings is not None:
        raise ValueError("--images, --embeddings: expected one of them, got both")
    if args.embeddings is not None:
        refuse_flags(parser, args, "--embeddings", ("checkpoint", *HOW_TO_EMBED))
    from facetrain.gallery_faces import Faces

    return Faces(
        checkpoint=Path(args.checkpoint) if args.checkpoint else None,
        images=tuple(map(Path, args.images)),
        embeddings=Path(args.embeddings) if args.embeddings else None,
    )
