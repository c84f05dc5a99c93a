"""Networks that embed faces, ours or ONNX files, and the images that they see, aligned where asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from facetrain.checkpoint.weights import load_backbone, weights_file
from facetrain.command_line import say
from facetrain.config import DataConfig
from facetrain.data.align import FaceAligner, FindPoints, YunetDetector, points_from_file
from facetrain.data.decode import decode_face, present_face
from facetrain.data.manifest import combined_sha256
from facetrain.data.photograph import Photograph
from facetrain.data.sources import FaceSource, open_faces
from facetrain.embed import BATCH_IMAGES, embed_images, fitting_batch
from facetrain.evaluation.inputs import unit_vectors
from facetrain.models.onnx_backbone import OnnxBackbone, OnnxInput
from facetrain.whole_file import write_text
from facetrain.world import World

Device = Literal["auto", "cpu", "cuda"]

Decode = Callable[[int, DataConfig], NDArray[np.uint8]]
"""Image number and a network's preprocessing -> what that network sees."""


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """How faces become embeddings."""

    mirror: bool = True
    """Add the embedding of the mirrored image."""
    device: Device = "auto"
    """auto: cuda where there is one."""
    onnx: OnnxInput = field(default_factory=OnnxInput)
    """What ONNX networks expect."""
    landmarks: Path | None = None
    """Five points of each photograph, by which it is aligned."""
    detector: Path | None = None
    """YuNet, which finds the five points; None and no landmarks take the images as aligned."""


@dataclass(frozen=True)
class Network:
    """Something that embeds faces, with the preprocessing that it was made for."""

    file: Path
    backbone: nn.Module
    data: DataConfig
    precision: Literal["float32", "bfloat16"]
    sha256: str
    """Checksum of its weights; a run that still trains has others by and by."""

    def fitting_batch(self, world: World) -> int:
        """Return how many images one forward takes, the same on every rank; all ranks must call.

        Raises:
            ValueError: The ranks opened different weights, as of a run that still trains.
        """
        if len(set(world.all_gather_object(self.sha256))) > 1:  # over all ranks: they must be the same
            raise ValueError(f"{self.file}: changed while it was opened; give the model.safetensors of one checkpoint")
        if isinstance(self.backbone, OnnxBackbone):  # onnxruntime may run it on the CPU, and has memory of its own
            return BATCH_IMAGES
        shape = (self.data.image_px, self.data.image_px, self.data.channels)
        return fitting_batch(self.backbone.to(world.device), shape, world=world, precision=self.precision)

    def width(self, world: World) -> int:
        """Return how many numbers an embedding has, by embedding a black face on this rank."""
        face = np.zeros((self.data.image_px, self.data.image_px, self.data.channels), np.uint8)
        alone, backbone = World(device=world.device), self.backbone.to(world.device)
        return embed_images(backbone, lambda _: face, 1, world=alone, precision=self.precision).shape[1]


def network_sha256(file: Path) -> str:
    """Return the checksum of a network's weights, wherever they lie."""
    return combined_sha256([file if file.suffix == ".onnx" else weights_file(file)])


def open_network(file: Path, onnx: OnnxInput) -> Network:
    """Open a run folder, a .safetensors file with its config, or an ONNX file.

    Raises:
        ValueError: The weights or the network can't be used; the message names the file.
        FileNotFoundError: There are none.
    """
    if file.suffix != ".onnx":
        weights = weights_file(file)
        backbone, config = load_backbone(weights)
        return Network(file, backbone, config.data, config.train.precision, network_sha256(weights))
    network = OnnxBackbone(file, onnx)
    return Network(file, network, network.data, "float32", network_sha256(file))


class Images(Protocol):
    """Images by name, such as a `FaceSource`."""

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each image."""

    def read(self, image: int) -> bytes:
        """Return an image's file."""


ImagesT = TypeVar("ImagesT", bound=Images)


def open_aligner(options: EmbedOptions) -> FaceAligner | None:
    """Return what aligns photographs; None where images are taken as aligned.

    Raises:
        ValueError: The list of points or the detector can't be used; the message names it.
    """
    find: FindPoints | None = None
    if options.landmarks:
        find = points_from_file(options.landmarks)
    elif options.detector:
        find = YunetDetector(options.detector)
    return FaceAligner(find) if find else None


@dataclass(frozen=True)
class Photographs(Generic[ImagesT]):
    """Images to embed, aligned on the way where asked for."""

    faces: ImagesT
    aligner: FaceAligner | None

    @staticmethod
    def open(images: Sequence[Path], options: EmbedOptions) -> "Photographs[FaceSource]":
        """Open folders or tars of known people.

        Raises:
            ValueError: An image source, the list of points or the detector can't be used; the message names it.
        """
        return Photographs(open_faces(images), open_aligner(options))

    def decode(self, image: int, data: DataConfig) -> NDArray[np.uint8]:
        """Return what a network of that preprocessing sees of an image, uint8 [image_px, image_px, channels]."""
        name = self.faces.names[image]
        if self.aligner is None:
            return decode_face(self.faces.read(image), data, name)
        return present_face(self.aligner.align(Photograph(self.faces.read(image), name)), data)

    def not_aligned(self, world: World) -> tuple[str, ...] | None:
        """Return the images of all ranks whose face wasn't found."""
        if self.aligner is None:
            return None
        found = world.all_gather_object(self.aligner.not_found)
        return tuple(sorted({name for names in found for name in names}))


def embed_all(
    networks: Sequence[Network],
    decode: Decode,
    names: Sequence[str],
    options: EmbedOptions,
    world: World,
    *,
    batch_images: int | None = None,
    progress: str | None = "embed",
) -> NDArray[np.float32]:
    """Embed images with each network over all ranks; float32 [n, sum of D], the same on every rank.

    Of several networks each gets the same say: its part is of unit length. `batch_images` is of one forward; None
    takes `fitting_batch` of each network. `progress` is the label of the bar; None shows none.

    Raises:
        ValueError: An image can't be decoded, or one of several networks embeds it as zero or not finite, or in another
            width than the first.
    """
    if len(networks) > 1:
        widths = [network.width(world) for network in networks]
        for network, width in zip(networks, widths, strict=True):
            if width != widths[0]:
                expected = f"expected embeddings of {widths[0]} numbers, as of {networks[0].file}, got {width}"
                raise ValueError(f"{network.file}: {expected}; an ensemble's networks have one width")
    parts = []
    for network in networks:
        embeddings = embed_images(
            network.backbone.to(world.device),
            _seen_by(network, decode),
            len(names),
            world=world,
            precision=network.precision,
            mirror=options.mirror,
            batch_images=batch_images or network.fitting_batch(world),
            progress=progress,
        )
        parts.append(embeddings.cpu().numpy())
    if len(parts) == 1:
        return parts[0]
    for number, network in enumerate(networks):
        try:
            parts[number] = unit_vectors(names, parts[number])
        except ValueError as error:
            raise ValueError(f"{network.file}: {error}") from None
    return np.concatenate(parts, axis=1)


def embed_readable(
    network: Network,
    photographs: Photographs[ImagesT],
    images: Sequence[int],
    options: EmbedOptions,
    world: World,
    *,
    batch_images: int | None = None,
    progress: str = "embed",
) -> tuple[NDArray[np.float32], dict[int, str], set[int]]:
    """Embed some of the images over all ranks, whether or not each can be read.

    Returns:
        float32 [n, D], not normalised, on every rank; why an image can't be used, by its number, whose row means
        nothing: it can't be read, or its embedding is zero or not finite; and those of them that the system failed
        to read, as it may not the next time.
    """
    unreadable: dict[int, str] = {}
    failed: set[int] = set()
    names = [photographs.faces.names[image] for image in images]

    def decode(row: int, data: DataConfig) -> NDArray[np.uint8]:
        try:
            return photographs.decode(images[row], data)
        except ValueError as error:
            unreadable[images[row]] = str(error)
        except OSError as error:
            unreadable[images[row]] = f"{names[row]}: {error.strerror or error}"
            failed.add(images[row])
        return np.zeros((data.image_px, data.image_px, data.channels), np.uint8)

    embeddings = embed_all([network], decode, names, options, world, batch_images=batch_images, progress=progress)
    # Over all ranks: each ends with what any of them couldn't read.
    found = world.all_gather_object((unreadable, failed))
    unreadable = {image: why for some, _ in found for image, why in some.items()}
    failed = {image for _, some in found for image in some}
    norms = np.square(embeddings, dtype=np.float64).sum(axis=1)
    for row in np.flatnonzero(~np.isfinite(norms) | (norms == 0)).tolist():
        unreadable.setdefault(images[row], f"{names[row]}: the network embeds it as zero, or not finite")
    return embeddings, unreadable, failed


def list_left_out(file: Path, names: Sequence[str], why: dict[int, str]) -> None:
    """Write name and reason of each image that can't be used, a line each; no file where all can.

    Raises:
        ValueError: None can be used.
    """
    file.unlink(missing_ok=True)
    if not why:
        return
    write_text(file, "".join(f"{names[image]}\t{why[image]}\n" for image in sorted(why)))
    if len(why) == len(names):
        raise ValueError(f"{why[0]}; none of the {len(names):,} images can be used, see {file}")
    say(f"images left out: {len(why):,} of {len(names):,}, listed with the reason in {file}")


def _seen_by(network: Network, decode: Decode) -> Callable[[int], NDArray[np.uint8]]:
    return lambda image: decode(image, network.data)
