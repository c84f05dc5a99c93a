"""The Python interface: `facetrain.load(run).embed(images)`."""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from facetrain.config import DataConfig
from facetrain.data.align import FaceAligner
from facetrain.data.decode import decode_face, present_face
from facetrain.data.photograph import Photograph
from facetrain.embed import BATCH_IMAGES
from facetrain.evaluation.inputs import unit_vectors
from facetrain.models.onnx_backbone import OnnxInput
from facetrain.networks import Device, EmbedOptions, Network, embed_all, open_aligner, open_network
from facetrain.world import World

Image = str | PathLike[str] | bytes | NDArray[np.uint8]
"""The path of an image file, its bytes, or its pixels, uint8 [H, W, 3], RGB."""


def load(
    run: str | PathLike[str], *, device: Device = "auto", detector: str | PathLike[str] | None = None
) -> "Embedder":
    """Open a trained network.

    Args:
        run: A run folder, a .safetensors file with config.yaml beside it, or an ONNX file.
        device: auto takes cuda where there is one.
        detector: face_detection_yunet.onnx, which aligns photographs; None takes images as aligned faces.

    Raises:
        ValueError: The weights or the detector can't be used, or cuda was asked for and there is none.
        FileNotFoundError: There is no such run.
    """
    world = World.alone(device)
    network = open_network(Path(run), OnnxInput())
    aligner = open_aligner(EmbedOptions(detector=Path(detector) if detector else None))
    return Embedder(network, aligner, world)


@dataclass(frozen=True)
class Embedder:
    """A network that embeds faces, with the preprocessing that it was trained with. One thread at a time."""

    network: Network
    aligner: FaceAligner | None
    """Aligns photographs; None takes images as aligned."""
    world: World

    def embed(
        self, images: Sequence[Image], *, mirror: bool = True, unit: bool = True, batch_images: int = BATCH_IMAGES
    ) -> NDArray[np.float32]:
        """Embed images, the same way as training evaluates.

        Where the detector finds no face, the middle of the photograph is embedded; `aligner.not_found` names these of
        the latest call.

        Args:
            images: Paths, bytes or pixels; at least one.
            mirror: Add the embedding of the mirrored image.
            unit: Scale to unit length, so that the inner product of two is their score, a cosine similarity.
            batch_images: Images of one forward.

        Returns:
            float32 [n, D].

        Raises:
            ValueError: There is no image, or one can't be read; the message names it.
            FileNotFoundError: A path doesn't exist.
        """
        if len(images) == 0:
            raise ValueError("images: expected one or more, got none")
        names = [_name(image, number) for number, image in enumerate(images)]
        if self.aligner:
            self.aligner.forget()

        def decode(image: int, data: DataConfig) -> NDArray[np.uint8]:
            return self._decode(images[image], data, names[image])

        embeddings = embed_all(
            [self.network],
            decode,
            names,
            EmbedOptions(mirror=mirror),
            self.world,
            batch_images=batch_images,
            progress=None,
        )
        return unit_vectors(names, embeddings) if unit else embeddings

    def _decode(self, image: Image, data: DataConfig, name: str) -> NDArray[np.uint8]:
        """Return what the network sees of an image, uint8 [image_px, image_px, C]."""
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ValueError(f"{name}: expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
            return present_face(self.aligner.align(Photograph(image, name)) if self.aligner else image, data)
        content = image if isinstance(image, bytes) else Path(image).read_bytes()
        if self.aligner:
            return present_face(self.aligner.align(Photograph(content, name)), data)
        return decode_face(content, data, name)


def _name(image: Image, number: int) -> str:
    return str(image) if isinstance(image, str | PathLike) else f"image {number}"
