"""Commands that make shards: synth, pack."""

from collections.abc import Sequence
from pathlib import Path

from facetrain.command_line import new_parser, parse_arguments, say


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
    say(
        f"{args.out}: {manifest.images} images of {manifest.identities} identities, {manifest.rejected_images} rejected"
    )
