"""Commands that make shards and look at them: synth, pack, inspect, audit."""

from collections.abc import Sequence
from pathlib import Path

from facetrain.command_line import new_parser, parse_arguments, say
from facetrain.commands.embedding_flags import add_onnx_flags, onnx_input


def synth(argv: Sequence[str]) -> None:
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
    say(f"{args.out}: faces in train/ and heldout/, lists heldout_pairs.txt and heldout_people.txt")


def pack(argv: Sequence[str]) -> None:
    """Pack identity-labelled images into shards."""
    parser = new_parser("facetrain pack", "Pack identity-labelled faces into training shards.")
    parser.add_argument("source", nargs="+", type=str, help=_SOURCE_HELP)
    parser.add_argument("out", type=str, help="folder for the shards; what is left out is listed in its rejected.jsonl")
    parser.add_argument("--image-px", type=int, default=112, help="side of the images in the shards, in pixels")
    parser.add_argument("--quality", type=int, default=92, help="JPEG quality of images that are encoded anew")
    parser.add_argument(
        "--copy", action="store_true", help="encode nothing anew: reject what isn't a JPEG of image-px x image-px"
    )
    parser.add_argument("--landmarks", type=str, help="list of five points per image: align all images by them")
    parser.add_argument("--detector", type=str, help="face_detection_yunet.onnx: align all images by what it finds")
    parser.add_argument("--exclude", type=str, help="list of identities to leave out, a name a line")
    parser.add_argument("--merge", type=str, help="list of names of one person, a person a line, by tabs or commas")
    parser.add_argument("--min-images", type=int, default=1, help="leave out identities with fewer usable images")
    parser.add_argument("--max-images", type=int, help="leave out usable images of an identity beyond this many")
    parser.add_argument("--min-px", type=int, default=16, help="reject images whose shorter side has fewer pixels")
    parser.add_argument("--max-pixels", type=int, default=50_000_000, help="reject images with more, undecoded")
    parser.add_argument("--images-per-shard", type=int, default=10_000, help="close a shard before it has more images")
    parser.add_argument("--seed", type=int, default=0, help="seed of the identities' order")
    parser.add_argument("--workers", type=int, help="processes; all cores by default")
    args = parse_arguments(parser, argv)
    from facetrain.data.pack import pack

    landmarks, detector, exclude, merge = (
        Path(file) if file else None for file in (args.landmarks, args.detector, args.exclude, args.merge)
    )
    manifest = pack(
        [Path(source) for source in args.source],
        Path(args.out),
        image_px=args.image_px,
        quality=args.quality,
        copy=args.copy,
        landmarks=landmarks,
        detector=detector,
        exclude=exclude,
        merge=merge,
        min_images=args.min_images,
        max_images=args.max_images,
        min_px=args.min_px,
        max_pixels=args.max_pixels,
        images_per_shard=args.images_per_shard,
        seed=args.seed,
        workers=args.workers,
    )
    say(
        f"{args.out}: {manifest.images} images of {manifest.identities} identities, {manifest.rejected_images} rejected"
        f"{f', {manifest.dropped_identities} identities left out' if manifest.dropped_identities else ''}"
    )


def inspect(argv: Sequence[str]) -> None:
    """Count, check and show what shards hold."""
    parser = new_parser("facetrain inspect", "Count what shards hold and check every byte against their manifest.")
    parser.add_argument("shards", type=str, help="folder made by facetrain pack")
    parser.add_argument("--out", type=str, help="folder for a figure, a contact sheet and the numbers")
    args = parse_arguments(parser, argv)
    from facetrain.inspection import inspect_shards

    inspect_shards(Path(args.shards), Path(args.out) if args.out else None)


def audit(argv: Sequence[str]) -> None:
    """Find test people, duplicates and mixtures in shards."""
    parser = new_parser("facetrain audit", "Find identities that look like test people, like one another, or like two.")
    parser.add_argument("shards", type=str, help="folder made by facetrain pack")
    parser.add_argument("--checkpoint", type=str, required=True, help="run folder, .safetensors or .onnx that embeds")
    parser.add_argument(
        "--against", nargs="+", type=str, help="images of the test: a folder of IDENTITY/IMAGE, or tars of it"
    )
    parser.add_argument("--min-score", type=float, help="cosine that puts two identities into the lists")
    parser.add_argument("--no-mirror", action="store_true", help="don't add the embedding of the mirrored image")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="cuda where there is one")
    add_onnx_flags(parser)
    parser.add_argument("--out", type=str, required=True, help="folder for audit.html, exclude.txt and merge.txt")
    args = parse_arguments(parser, argv)
    if args.min_score is not None and not -1 <= args.min_score <= 1:
        raise ValueError(f"--min-score: expected a cosine, -1 to 1, got {args.min_score}")
    from facetrain.audit import audit_shards
    from facetrain.networks import EmbedOptions

    against = [Path(path) for path in args.against or ()]
    options = EmbedOptions(mirror=not args.no_mirror, device=args.device, onnx=onnx_input(args))
    audit_shards(Path(args.shards), Path(args.checkpoint), against, options, args.min_score, Path(args.out))


_SOURCE_HELP = (
    "folder or tar of IDENTITY/IMAGE; WebDataset tar with .cls or .json; RecordIO (.rec, or a folder with train.rec); "
    ".parquet with image bytes and a label; .csv of path,label; or several of them"
)
