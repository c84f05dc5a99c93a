"""Evaluate somebody's weights or embeddings on a set of faces: what `facetrain lfw` and `facetrain compare` do."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from facetrain.command_line import say
from facetrain.config import DataConfig
from facetrain.data.decode import decode_face, thumbnail
from facetrain.data.sources import FaceSource, open_faces
from facetrain.data.verification_bin import read_verification_bin
from facetrain.evaluation.compare import compare, format_comparison, write_comparison
from facetrain.evaluation.distractors import Crowd, DistractorScores, Search, check_search, open_crowd, search_crowd
from facetrain.evaluation.embeddings_npz import load_embeddings_npz
from facetrain.evaluation.inputs import ImageKey, PairList, check_people, face_set, image_key, image_name, unit_vectors
from facetrain.evaluation.judge import PICTURE_PX, pictures_of
from facetrain.evaluation.lfw import evaluate, evaluate_pairs
from facetrain.evaluation.lists import Request, read_lists
from facetrain.evaluation.report import check_out_folder, describe_not_aligned, report_to_folder
from facetrain.networks import Device, EmbedOptions, Network, Photographs, embed_all, open_network
from facetrain.world import REPORT_TIMEOUT_S, World, start_world

BIN_FOLDS = 10
"""Folds of a verification file, which doesn't say."""


@dataclass(frozen=True, kw_only=True)
class Distractors:
    """A crowd that enlarges every gallery, as it is asked for."""

    files: tuple[Path, ...] = ()
    """Embeddings of strangers, .npy; none leaves the galleries as they are."""
    search: Search = "exact"
    """How the crowd is searched."""

    def open(self) -> Crowd | None:
        """Open and check the files; None where there are none.

        Raises:
            ValueError: A file can't be used, or FAISS is missing.
        """
        check_search(self.search)
        return open_crowd(self.files) if self.files else None

    def score(
        self, crowd: Crowd | None, names: Sequence[str], embeddings: NDArray[np.float32], world: World
    ) -> DistractorScores | None:
        """Search the crowd for each embedding, over all ranks."""
        if crowd is None:
            return None
        return search_crowd(unit_vectors(names, embeddings), crowd, world, search=self.search, progress=True)


def evaluate_embeddings(
    file: Path,
    images: Sequence[Path],
    distractors: Distractors,
    request: Request,
    out: Path,
    *,
    device: Device = "auto",
) -> None:
    """Run the protocols on an .npz of `names` and `embeddings`; print the table, write results and a report.

    Args:
        file: The .npz.
        images: Where the faces are, for the report to show the hardest pairs; none shows names alone.
        distractors: A crowd for the galleries, searched over all ranks.
        request: The protocols.
        out: The folder for results and report.
        device: Where the crowd is searched.

    Raises:
        ValueError: The file, an image or a list can't be used; the message names it.
    """
    check_out_folder(out)
    names, embeddings = load_embeddings_npz(file)
    read_lists(names, request)
    _warn_of_scattered_people(names)
    read_picture = pictures_of(open_faces(images), names) if images else None
    crowd = distractors.open()
    with start_world(device, REPORT_TIMEOUT_S) as world:
        scores = distractors.score(crowd, names, embeddings, world)

        def report() -> None:
            evaluation = evaluate(names, embeddings, request, scores)
            report_to_folder(evaluation, out, subject=str(file), read_picture=read_picture)

        world.on_main(report)


def evaluate_checkpoints(
    checkpoints: Sequence[Path],
    images: Sequence[Path],
    options: EmbedOptions,
    distractors: Distractors,
    request: Request,
    out: Path,
) -> None:
    """Embed a set over all ranks, and run the protocols as `evaluate_embeddings` does.

    Args:
        checkpoints: Of several, the embeddings are concatenated, each of unit length.
        images: Folders or tars.
        options: How to embed.
        distractors: A crowd for the galleries.
        request: The protocols.
        out: The folder for results and report.

    Raises:
        ValueError: The weights, the images or a list can't be used; the message names the file.
    """
    check_out_folder(out)
    networks = [open_network(file, options.onnx) for file in checkpoints]
    photographs = _open_photographs(images, options)
    names = photographs.faces.names
    read_lists(names, request)
    crowd = distractors.open()
    with start_world(options.device, REPORT_TIMEOUT_S) as world:
        if crowd is not None:
            crowd.check_width(sum(network.width(world) for network in networks))
        embeddings = embed_all(networks, photographs.decode, names, options, world)
        not_aligned = photographs.not_aligned(world)
        scores = distractors.score(crowd, names, embeddings, world)

        def report() -> None:
            evaluation = replace(evaluate(names, embeddings, request, scores), not_aligned=not_aligned)
            read_picture = pictures_of(photographs.faces, names)
            subject, sha256 = _listed(checkpoints), _sha256_of(networks)
            report_to_folder(evaluation, out, subject=subject, network_sha256=sha256, read_picture=read_picture)

        world.on_main(report)


def evaluate_bin(checkpoints: Sequence[Path], file: Path, options: EmbedOptions, request: Request, out: Path) -> None:
    """Run verification on an InsightFace verification file, in ten folds of neighbouring pairs.

    Arguments are those of `evaluate_checkpoints`; of the request, name and convention count.

    Raises:
        ValueError: The file or the weights can't be used; the message names the file.
    """
    check_out_folder(out)
    content = read_verification_bin(file)
    num_pairs = len(content.is_genuine)
    if num_pairs < BIN_FOLDS:
        raise ValueError(f"{file}: expected {BIN_FOLDS} pairs or more for as many folds, got {num_pairs}")
    if len(set(content.is_genuine.tolist())) < 2:
        num_genuine = int(content.is_genuine.sum())
        raise ValueError(f"{file}: expected genuine and impostor pairs, got {num_genuine} genuine of {num_pairs}")
    networks = [open_network(path, options.onnx) for path in checkpoints]
    pairs = PairList(
        path=file,
        pairs=tuple((("image", 2 * pair), ("image", 2 * pair + 1)) for pair in range(num_pairs)),
        is_genuine=content.is_genuine,
        fold=np.concatenate([np.full(len(f), k) for k, f in enumerate(np.array_split(range(num_pairs), BIN_FOLDS))]),
        num_folds=BIN_FOLDS,
        pairs_per_fold=num_pairs // (2 * BIN_FOLDS),
    )
    names = [image_name(key) for pair in pairs.pairs for key in pair]

    def decode(image: int, data: DataConfig) -> NDArray[np.uint8]:
        return decode_face(content.images[image], data, f"{file}: image {image}")

    def read_picture(key: ImageKey) -> bytes:
        return thumbnail(content.images[key[1]], PICTURE_PX, f"{file}: image {key[1]}")

    with start_world(options.device, REPORT_TIMEOUT_S) as world:
        embeddings = embed_all(networks, decode, names, options, world)

        def report() -> None:
            evaluation = evaluate_pairs(pairs, embeddings, dataset=request.dataset, convention=request.convention)
            subject, sha256 = _listed(checkpoints), _sha256_of(networks)
            report_to_folder(evaluation, out, subject=subject, network_sha256=sha256, read_picture=read_picture)

        world.on_main(report)


def compare_files(
    a: Path, b: Path, images: Sequence[Path], options: EmbedOptions, request: Request, out: Path | None
) -> None:
    """Compare two embeddings of one set; print the table and, where a folder is given, write `compare.json` into it.

    Args:
        a: An .npz of `names` and `embeddings`, or weights that embed `images`.
        b: The other one.
        images: For the weights; none where both are .npz files.
        options: How to embed.
        request: The protocols, with the number of resamples.
        out: The folder.

    Raises:
        ValueError: A file or a list can't be used, or the two don't hold the same images; the message names it.
    """
    if out is not None:
        check_out_folder(out)
    files = [file for file in (a, b) if file.suffix != ".npz"]
    if bool(files) != bool(images):
        expected = f"to embed with {files[0]}" if files else "none, since both are .npz files"
        raise ValueError(f"--images: expected {expected}, got {len(images)}")
    stored = {file: load_embeddings_npz(file) for file in (a, b) if file.suffix == ".npz"}
    networks = {file: open_network(file, options.onnx) for file in files}
    photographs = _open_photographs(images, options) if images else None
    names = photographs.faces.names if photographs else stored[a][0]
    read_lists(names, request)
    embeddings = {file: _in_order(file, *stored[file], names) for file in stored}
    with start_world(options.device, REPORT_TIMEOUT_S) as world:
        for file, network in networks.items():
            assert photographs is not None  # there are images where there are networks
            embeddings[file] = embed_all([network], photographs.decode, names, options, world)
        not_aligned = photographs.not_aligned(world) if photographs else None

        def report() -> None:
            if not_aligned is not None:
                say(describe_not_aligned(not_aligned, len(names)))
            comparison = compare(names, embeddings[a], embeddings[b], request)
            sys.stdout.write(format_comparison(comparison, str(a), str(b)))
            if out is not None:
                write_comparison(comparison, out)

        world.on_main(report)


def _open_photographs(images: Sequence[Path], options: EmbedOptions) -> Photographs[FaceSource]:
    """Open images, say which can't be used, and check that their file names tell who they are."""
    photographs = Photographs.open(images, options)
    if left_out := photographs.faces.describe_skipped():
        say(left_out)
    check_people(photographs.faces.names, photographs.faces.identities)
    return photographs


def _warn_of_scattered_people(names: Sequence[str]) -> None:
    """Say where file names take the images of several folders for one person's."""
    folder_of = dict[str, str]()
    for name in names:
        person, folder = image_key(name)[0], name.rpartition("/")[0]
        if folder_of.setdefault(person, folder) != folder:
            say(
                f"warning: images of {person} lie in {folder_of[person]} and in {folder}, and count as one person's:"
                " file names tell who it is"
            )
            return


def _in_order(
    file: Path, given: Sequence[str], embeddings: NDArray[np.float32], names: Sequence[str]
) -> NDArray[np.float32]:
    """Return stored embeddings in the order of `names`, which must be the same images."""
    row_of, wanted = face_set(given).row_of, face_set(names).row_of
    for key in [*wanted.keys() - row_of.keys(), *row_of.keys() - wanted.keys()][:1]:
        where = "is missing" if key in wanted else "isn't among the images of the other"
        raise ValueError(f"{file}: {image_name(key)} {where}; expected the same {len(wanted):,} images in both")
    return embeddings[[row_of[key] for key in wanted]]


def _sha256_of(networks: Sequence[Network]) -> str:
    return networks[0].sha256 if len(networks) == 1 else ""


def _listed(files: Sequence[Path]) -> str:
    return ", ".join(map(str, files))
