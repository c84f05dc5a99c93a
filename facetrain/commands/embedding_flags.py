"""Flags of commands that embed images."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from facetrain.models.onnx_backbone import OnnxInput
    from facetrain.networks import EmbedOptions


HOW_TO_EMBED = ("landmarks", "detector", "no_mirror", "onnx_mean", "onnx_std", "onnx_colour")
"""What says nothing where embeddings are given."""


def add_embedding_flags(parser: Any) -> None:
    """Add alignment, mirroring, device and what ONNX networks expect."""
    parser.add_argument("--landmarks", type=str, help="list of five points per image: align photographs by them")
    parser.add_argument("--detector", type=str, help="face_detection_yunet.onnx: align photographs by what it finds")
    parser.add_argument("--no-mirror", action="store_true", help="don't add the embedding of the mirrored image")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="cuda where there is one")
    add_onnx_flags(parser)


def add_onnx_flags(parser: Any) -> None:
    """Add what ONNX networks expect."""
    parser.add_argument("--onnx-mean", type=float, default=127.5, help="ONNX input is (pixel - mean) / std")
    parser.add_argument("--onnx-std", type=float, default=127.5, help="ONNX input is (pixel - mean) / std")
    parser.add_argument("--onnx-colour", choices=("rgb", "bgr"), default="rgb", help="order of channels of ONNX input")


def refuse_flags(parser: Any, args: Any, beside: str, names: Sequence[str]) -> None:
    """Refuse flags that would have no effect beside another."""
    for name in names:
        if getattr(args, name) != parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')}: has no effect beside {beside}")


def embed_options(args: Any) -> "EmbedOptions":
    """Return what the flags say.

    Raises:
        ValueError: Two flags contradict each other.
    """
    if args.landmarks is not None and args.detector is not None:
        raise ValueError("--landmarks, --detector: expected one of them, got both")
    from facetrain.networks import EmbedOptions

    return EmbedOptions(
        mirror=not args.no_mirror,
        device=args.device,
        onnx=onnx_input(args),
        landmarks=Path(args.landmarks) if args.landmarks else None,
        detector=Path(args.detector) if args.detector else None,
    )


def onnx_input(args: Any) -> "OnnxInput":
    """Return what the flags say of ONNX networks.

    Raises:
        ValueError: One of them is out of bounds.
    """
    from facetrain.models.onnx_backbone import OnnxInput

    return OnnxInput(mean=args.onnx_mean, std=args.onnx_std, colour=args.onnx_colour)
