"""Faces for a gallery: images that a network embeds, or embeddings from elsewhere."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from facetrain.command_line import say
from facetrain.data.decode import thumbnail
from facetrain.data.images import open_images
from facetrain.data.sources import open_faces
from facetrain.evaluation.embeddings_npz import load_embeddings_npz, network_of_embeddings
from facetrain.evaluation.inputs import image_key, unit_vectors
from facetrain.gallery import Gallery
from facetrain.networks import (
    EmbedOptions,
    Photographs,
    embed_readable,
    list_left_out,
    network_sha256,
    open_aligner,
    open_network,
)
from facetrain.world import World

PICTURE_PX = 112
"""Side of the pictures that a gallery keeps."""


@dataclass(frozen=True, kw_only=True)
class Faces:
    """Where faces come from: images that a network embeds, or embeddings."""

    checkpoint: Path | None = None
    """A run folder, .safetensors or .onnx; None takes that of the gallery."""
    images: tuple[Path, ...] = ()
    embeddings: Path | None = None
    """An .npz with `names` and `embeddings`."""


@dataclass(frozen=True, eq=False)
class Embedded:
    """The faces that could be read."""

    names: tuple[str, ...]
    people: tuple[str, ...]
    """Empty names where they aren't known."""
    embeddings: NDArray[np.float32]
    """[n, D], rows of unit length."""
    pictures: tuple[bytes, ...]
    network_sha256: str
    """Checksum of the weights that embedded them; empty where an .npz doesn't say."""


def warn_of_differences(gallery: Gallery, options: EmbedOptions) -> None:
    """Say where images are embedded in another way than the gallery's, as far as that is known."""
    if not gallery.network:
        return
    if gallery.is_aligned and not (options.detector or options.landmarks):
        say("warning: the gallery's photographs were aligned; without --detector these are taken as aligned faces")
    if gallery.is_mirrored != options.mirror:
        way = "with" if gallery.is_mirrored else "without"
        say(f"warning: the gallery was made {way} mirrored images; see --no-mirror")
    if gallery.onnx != (given := onnx_input(Path(gallery.network), options)):
        say(f"warning: the gallery's network was given {gallery.onnx}, and is given {given} here; see --onnx-colour")


def onnx_input(network: Path, options: EmbedOptions) -> str:
    """Say what an ONNX network's pixels are; other networks know it themselves."""
    pixels = options.onnx
    return f"(pixel - {pixels.mean:g}) / {pixels.std:g} in {pixels.colour}" if network.suffix == ".onnx" else ""


def network_of(gallery: Gallery, faces: Faces) -> Path | None:
    """Return what embeds the faces, None for embeddings; refuse other weights than the gallery's."""
    if not faces.images:
        return None
    file = faces.checkpoint or (Path(gallery.network) if gallery.network else None)
    if file is None:
        raise ValueError("--checkpoint: expected the network that embeds the images")
    if gallery.network_sha256 and network_sha256(file) != gallery.network_sha256:
        made_by = f" than {gallery.network}, which made the gallery" if gallery.network else " than made the gallery"
        raise ValueError(f"--checkpoint: {file} has other weights{made_by}")
    return file


def embed_faces(
    gallery: Gallery,
    faces: Faces,
    network: Path | None,
    options: EmbedOptions,
    left_out: Path | None,
    *,
    are_known: bool,
    pictures: int | None,
) -> Embedded:
    """Embed images or read embeddings; images that can't be read, or show no face, are listed in a file.

    Args:
        gallery: What they are for.
        faces: Which.
        network: What embeds images.
        options: How.
        left_out: The file of the list; None says it on stdout.
        are_known: Whether images lie in a folder for each person.
        pictures: Make pictures of so many, the first; None of all.

    Raises:
        ValueError: Something can't be used, or no image is left.
    """
    if network is None:
        assert faces.embeddings is not None
        names, embeddings = load_embeddings_npz(faces.embeddings)
        sha256 = _check_origin(gallery, faces.embeddings)
        people = tuple(map(_person, names)) if are_known else ("",) * len(names)
        return Embedded(names, people, unit_vectors(names, embeddings), (b"",) * len(names), sha256)
    labelled = open_faces(faces.images) if are_known else None
    if labelled and (skipped := labelled.describe_skipped()):
        say(skipped)
    images = labelled or open_images(faces.images)
    world, opened = World.alone(options.device), open_network(network, options.onnx)
    wanted = gallery.embeddings.shape[1]
    if gallery.names and (width := opened.width(world)) != wanted:
        raise ValueError(
            f"--checkpoint: {network}: expected embeddings of {wanted} numbers, as in the gallery, got {width}"
        )
    photographs = Photographs(images, open_aligner(options))
    rows = range(len(images.names))
    embeddings, why, _ = embed_readable(opened, photographs, rows, options, world)
    faceless = set(photographs.not_aligned(world) or ())
    why = {row: f"{images.names[row]}: no face found" for row in rows if images.names[row] in faceless} | why
    if left_out:
        list_left_out(left_out, images.names, why)
    else:
        for row in sorted(why):
            say(f"left out: {why[row]}")
    kept = [row for row in rows if row not in why]
    if not kept:
        raise ValueError(f"{why[0]}; none of the {len(rows):,} images can be used")
    shown = kept[:pictures]
    names = tuple(images.names[row] for row in kept)
    return Embedded(
        names,
        tuple(labelled.identities[row] for row in kept) if labelled else ("",) * len(kept),
        unit_vectors(names, embeddings[kept]),
        (
            *(thumbnail(images.read(row), PICTURE_PX, images.names[row]) for row in shown),
            *(b"" for _ in kept[len(shown) :]),
        ),
        opened.sha256,
    )


def _check_origin(gallery: Gallery, file: Path) -> str:
    """Return the checksum of the weights that a file tells; refuse others than the gallery's."""
    sha256 = network_of_embeddings(file)
    if gallery.network_sha256 and not sha256:
        say(f"warning: {file} doesn't say which network it is of; scores mean something if it is the gallery's alone")
    elif gallery.network_sha256 and sha256 != gallery.network_sha256:
        raise ValueError(f"--embeddings: {file} is of other weights than the gallery")
    return sha256


def _person(name: str) -> str:
    folders = name.split("/")
    return folders[-2] if len(folders) > 1 else image_key(name)[0]
