"""Networks that embed faces, ours or ONNX files, and the images that they see, aligned where asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from facetrain.checkpoint.weights import load_backbone
from facetrain.config import DataConfig
from facetrain.data.align import FaceAligner, FindPoints, YunetDetector, points_from_file
from facetrain.data.decode import decode_face, present_face
from facetrain.data.sources import FaceSource, open_faces
from facetrain.embed import embed_images
from facetrain.evaluation.inputs import unit_vectors
from facetrain.models.onnx_backbone import OnnxBackbone, OnnxInput
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


def open_network(file: Path, onnx: OnnxInput) -> Network:
    """Open a run folder, a .safetensors file with its config, or an ONNX file.

    Raises:
        ValueError: The weights or the network can't be used; the message names the file.
        FileNotFoundError: There are none.
    """
    if file.suffix != ".onnx":
        backbone, config = load_backbone(file)
        return Network(file, backbone, config.data, config.train.precision)
    network = OnnxBackbone(file, onnx)
    data = DataConfig(image_px=network.image_px, colour="rgb" if network.channels == 3 else "grey")
    return Network(file, network, data, "float32")


@dataclass(frozen=True)
class Photographs:
    """Images to embed, aligned on the way where asked for."""

    faces: FaceSource
    aligner: FaceAligner | None

    @classmethod
    def open(cls, images: Sequence[Path], options: EmbedOptions) -> "Photographs":
        """Open folders or tars.

        Raises:
            ValueError: An image source, the list of points or the detector can't be used; the message names it.
        """
        find: FindPoints | None = None
        if options.landmarks:
            find = points_from_file(options.landmarks)
        elif options.detector:
            find = YunetDetector(options.detector)
        return cls(open_faces(images), FaceAligner(find) if find else None)

    def decode(self, image: int, data: DataConfig) -> NDArray[np.uint8]:
        """Return what a network of that preprocessing sees of an image, uint8 [image_px, image_px, channels]."""
        name = self.faces.names[image]
        if self.aligner is None:
            return decode_face(self.faces.read(image), data, name)
        return present_face(self.aligner.align(self.faces.read(image), name), data)

    def not_aligned(self, world: World) -> tuple[str, ...] | None:
        """Return the images of all ranks whose face wasn't found."""
        if self.aligner is None:
            return None
        found = world.all_gather_object(self.aligner.not_found)
        return tuple(sorted({name for names in found for name in names}))


def embed_all(
    networks: Sequence[Network], decode: Decode, names: Sequence[str], options: EmbedOptions, world: World
) -> NDArray[np.float32]:
    """Embed images with each network over all ranks; float32 [n, sum of D], the same on every rank.

    Of several networks each gets the same say: its part is of unit length.

    Raises:
        ValueError: An image can't be decoded, or one of several networks embeds it as zero or not finite, or in another
            width than the first.
    """
    parts = []
    for network in networks:
        embeddings = embed_images(
            network.backbone.to(world.device),
            _seen_by(network, decode),
            len(names),
            world=world,
            precision=network.precision,
            mirror=options.mirror,
            progress="embed",
        )
        parts.append(embeddings.cpu().numpy())
        first_width, width = parts[0].shape[1], parts[-1].shape[1]
        if width != first_width:
            raise ValueError(
                f"{network.file}: expected embeddings of {first_width} numbers, as of {networks[0].file}, got {width};"
                " an ensemble's networks have one width"
            )
    if len(parts) == 1:
        return parts[0]
    for number, network in enumerate(networks):
        try:
            parts[number] = unit_vectors(names, parts[number])
        except ValueError as error:
            raise ValueError(f"{network.file}: {error}") from None
    return np.concatenate(parts, axis=1)


def _seen_by(network: Network, decode: Decode) -> Callable[[int], NDArray[np.uint8]]:
    return lambda image: decode(image, network.data)
