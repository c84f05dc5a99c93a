"""Adding people to a gallery, and searching it for faces: what `facetrain index` and `facetrain search` do."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from facetrain.command_line import say
from facetrain.data.decode import thumbnail
from facetrain.data.images import open_images
from facetrain.data.sources import open_faces
from facetrain.embed_files import list_left_out
from facetrain.evaluation.inputs import image_key, load_embeddings_npz, network_of_embeddings, unit_vectors
from facetrain.evaluation.threshold import at_far, threshold_from_results, weights_of_results
from facetrain.gallery import GALLERY_FILE, Gallery, Kind
from facetrain.lock import hold_folder
from facetrain.networks import EmbedOptions, Photographs, embed_readable, network_sha256, open_aligner, open_network
from facetrain.search_page import MOST_SHOWN, search_page
from facetrain.whole_file import write_text
from facetrain.world import World

LEFT_OUT_FILE = "left_out.txt"
"""Name and reason of each image that couldn't be read, or shows no face."""
PICTURE_PX = 112
"""Side of the pictures that a gallery keeps."""
_SAID = 20
"""Faces of which the terminal shows the people, where a file has all of them."""
_GALLERY = "gallery"
"""The protocol that takes a threshold from the gallery itself."""


@dataclass(frozen=True, kw_only=True)
class Faces:
    """Where faces come from: images that a network embeds, or embeddings."""

    checkpoint: Path | None = None
    """A run folder, .safetensors or .onnx; None takes that of the gallery."""
    images: tuple[Path, ...] = ()
    embeddings: Path | None = None
    """An .npz with `names` and `embeddings`."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """From which score on a face is somebody of the gallery; with neither, nothing is decided."""

    threshold: float | None = None
    """The score, a cosine."""
    far: float | None = None
    """Instead: the false accept rate whose threshold an evaluation has found."""
    results: Path | None = None
    """The results.json of that evaluation; None takes that of the run that embeds."""
    protocol: str | None = None
    """Of that evaluation, or `gallery`: the gallery's own images, each looked for among the other people.

    None takes an open-set protocol of the evaluation; where a run has none for that FAR, the gallery.
    """

    def resolve(self, gallery: Gallery, network: Path | None) -> tuple[float | None, str]:
        """Return the threshold, None without a decision, and where it comes from.

        Raises:
            ValueError: The evaluation, or the gallery, has no such threshold.
        """
        if self.far is None:
            return self.threshold, "scores alone" if self.threshold is None else f"threshold {self.threshold:.4f}"
        run = network.parent if network and network.suffix == ".safetensors" else network
        file = self.results or (run / "results.json" if run else None)
        is_asked_for = bool(self.results or self.protocol)
        if self.protocol == _GALLERY or (file is None and not is_asked_for):
            return self._of_gallery(gallery, self.far)
        if file is None:
            raise ValueError("--protocol: expected --results, since these embeddings are of no known run")
        try:
            threshold, protocol = threshold_from_results(file, self.far, self.protocol)
        except ValueError:
            if is_asked_for:
                raise
            return self._of_gallery(gallery, self.far)
        if gallery.network_sha256 and weights_of_results(file) not in ("", gallery.network_sha256):
            say(f"warning: {file} is of other weights than the gallery's: its threshold isn't meant for these scores")
        return threshold, f"threshold {threshold:.4f}, of {protocol} at FAR {self.far:g} in {file}"

    @staticmethod
    def _of_gallery(gallery: Gallery, far: float) -> tuple[float, str]:
        if len(gallery.persons) < 2:
            raise ValueError("--far: expected two people or more in the gallery to take a threshold from, got one")
        threshold = at_far(gallery.stranger_scores, far).threshold
        return threshold, f"threshold {threshold:.4f}, of the gallery's own images among other people at FAR {far:g}"


@dataclass(frozen=True, eq=False)
class _Embedded:
    """The faces that could be read."""

    names: tuple[str, ...]
    people: tuple[str, ...]
    """Empty names where they aren't known."""
    embeddings: NDArray[np.float32]
    """[n, D], rows of unit length."""
    pictures: tuple[bytes, ...]


def update_gallery(
    folder: Path, faces: Faces, options: EmbedOptions, *, kind: Kind | None, remove: Collection[str], pictures: bool
) -> None:
    """Make a gallery, remove people from it, add some; the gallery on the disk is replaced when all is done.

    The person of an image is its folder; of an embedding the folder in its name, or what `Name_0001` says.

    Args:
        folder: Of the gallery.
        faces: What to add; may be nothing.
        options: How to embed.
        kind: How it is searched; None keeps what the gallery is, a new one is flat.
        remove: People to remove, before any are added.
        pictures: Keep a small picture of each image.

    Raises:
        ValueError: Something can't be used, or the gallery was made with other weights; the message names it.
    """
    if not (faces.images or faces.embeddings or (folder / GALLERY_FILE).is_file()):
        raise ValueError(f"{folder}: no gallery in it; expected --images or --embeddings for a new one")
    folder.mkdir(parents=True, exist_ok=True)
    with hold_folder(folder):
        is_new = not (folder / GALLERY_FILE).is_file()
        gallery = Gallery(kind=kind or "flat") if is_new else Gallery.load(folder)
        if kind is not None and kind != gallery.kind:
            raise ValueError(f"--kind: {folder} is {gallery.kind}, got {kind}; make another gallery for that")
        gallery = gallery.without(remove)
        if faces.images or faces.embeddings:
            network = _network_of(gallery, faces)
            if network:
                _warn_of_differences(gallery, options)
            most = None if pictures else 0
            found = _embed(gallery, faces, network, options, folder / LEFT_OUT_FILE, are_known=True, pictures=most)
            _say_what_is_there(gallery, found)
            gallery = gallery.with_images(found.names, found.people, found.embeddings, found.pictures)
            if not network and len(gallery.names) == len(found.names):  # of these alone
                assert faces.embeddings is not None
                gallery = replace(gallery, network="", network_sha256=network_of_embeddings(faces.embeddings))
            if network:
                gallery = replace(
                    gallery,
                    network=str(network.absolute()),
                    network_sha256=network_sha256(network),
                    is_aligned=bool(options.detector or options.landmarks),
                    is_mirrored=options.mirror,
                    onnx=_onnx_input(network, options),
                )
        gallery.save(folder)
    say(f"{folder}: {len(gallery.names):,} images of {len(gallery.persons):,} people, {gallery.kind}")


def search_gallery(
    folder: Path, faces: Faces, options: EmbedOptions, decision: Decision, *, top: int, out: Path | None
) -> None:
    """Say of each face who of the gallery it is most like, and whether it is anybody of them.

    Args:
        folder: Of the gallery.
        faces: Whom to look for.
        options: How to embed.
        decision: When a face is known.
        top: People listed for each face.
        out: Folder for search.json and search.html; None prints alone.

    Raises:
        ValueError: Something can't be used; the message names it.
    """
    gallery = Gallery.load(folder)
    network = _network_of(gallery, faces)
    known_network = network or (Path(gallery.network) if gallery.network else None)
    threshold, about = decision.resolve(gallery, known_network)
    if network:
        _warn_of_differences(gallery, options)
    if out:
        out.mkdir(parents=True, exist_ok=True)
    left_out = out / LEFT_OUT_FILE if out else None
    pictures = MOST_SHOWN if out else 0
    found = _embed(gallery, faces, network, options, left_out, are_known=False, pictures=pictures)
    scores, persons = gallery.search(found.embeddings, top)
    rows = [
        _row(gallery, name, own_scores, own_persons, threshold)
        for name, own_scores, own_persons in zip(found.names, scores, persons, strict=True)
    ]
    for row in rows if out is None else rows[:_SAID]:
        matches = "  ".join(f"{match['person']} {match['score']:.3f}" for match in row["matches"])
        verdict = {True: "known    ", False: "unknown  ", None: ""}[row["is_known"]]
        say(f"{row['image']}  {verdict}{matches}")
    if out and len(rows) > _SAID:
        say(f"... and {len(rows) - _SAID:,} more in {out / 'search.json'}")
    say(about)
    counts = "" if threshold is None else _counts(gallery, rows, threshold)
    if counts:
        say(counts)
    if out:
        record = {"gallery": str(folder), "decision": about, "images": rows}
        write_text(out / "search.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        best = (
            [gallery.pictures[gallery.best_image(query, person)] for person in some.tolist() if person >= 0]
            for query, some in zip(found.embeddings, persons, strict=True)
        )
        head = "; ".join(filter(None, (f"{len(gallery.persons):,} people in {folder}", about, counts)))
        write_text(out / "search.html", search_page(rows, found.pictures, best, head))
        say(f"pictures  {out / 'search.html'}")


def _say_what_is_there(gallery: Gallery, found: _Embedded) -> None:
    """Say which images take the place of others, and who seems to be in the gallery under a name written otherwise."""
    replaced = sorted(set(gallery.names) & set(found.names))
    if replaced:
        say(f"images replaced by those of the same name: {len(replaced):,}, such as {replaced[0]}")
    people = sorted({*gallery.people, *found.people})
    by_letters = {normalize("NFC", person): person for person in people}
    for person in people:
        if (other := by_letters[normalize("NFC", person)]) != person:
            say(f"warning: {person!a} and {other!a} are one name in two Unicode forms, and two people here")
            return


def _counts(gallery: Gallery, rows: Sequence[Mapping[str, Any]], threshold: float) -> str:
    """Say how many faces are known, and how many strangers the gallery would take for somebody."""
    counts = f"{sum(row['is_known'] for row in rows):,} of {len(rows):,} faces are known"
    if len(gallery.persons) < 2:
        return counts
    accepted = np.mean(gallery.stranger_scores >= np.float64(threshold))
    return f"{counts}; of the gallery's own images, looked for among the other people, {accepted:.1%} would be"


def _row(
    gallery: Gallery, name: str, scores: NDArray[np.float32], persons: NDArray[np.int64], threshold: float | None
) -> dict[str, Any]:
    """Return what search.json says of a face."""
    matches = [
        {"person": gallery.persons[person], "score": float(score)}
        for score, person in zip(scores, persons.tolist(), strict=True)
        if person >= 0
    ]
    # Exact, as in evaluation: the threshold is the float32 score of an impostor.
    is_known = None if threshold is None else bool(len(matches) and scores[0] >= np.float64(threshold))
    return {"image": name, "is_known": is_known, "matches": matches}


def _warn_of_differences(gallery: Gallery, options: EmbedOptions) -> None:
    """Say where images are embedded in another way than the gallery's, as far as that is known."""
    if not gallery.network:
        return
    if gallery.is_aligned and not (options.detector or options.landmarks):
        say("warning: the gallery's photographs were aligned; without --detector these are taken as aligned faces")
    if gallery.is_mirrored != options.mirror:
        way = "with" if gallery.is_mirrored else "without"
        say(f"warning: the gallery was made {way} mirrored images; see --no-mirror")
    if gallery.onnx != (given := _onnx_input(Path(gallery.network), options)):
        say(f"warning: the gallery's network was given {gallery.onnx}, and is given {given} here; see --onnx-colour")


def _onnx_input(network: Path, options: EmbedOptions) -> str:
    """Say what an ONNX network's pixels are; other networks know it themselves."""
    pixels = options.onnx
    return f"(pixel - {pixels.mean:g}) / {pixels.std:g} in {pixels.colour}" if network.suffix == ".onnx" else ""


def _network_of(gallery: Gallery, faces: Faces) -> Path | None:
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


def _embed(
    gallery: Gallery,
    faces: Faces,
    network: Path | None,
    options: EmbedOptions,
    left_out: Path | None,
    *,
    are_known: bool,
    pictures: int | None,
) -> _Embedded:
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
        _check_origin(gallery, faces.embeddings)
        people = tuple(map(_person, names)) if are_known else ("",) * len(names)
        return _Embedded(names, people, unit_vectors(names, embeddings), (b"",) * len(names))
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
    return _Embedded(
        names,
        tuple(labelled.identities[row] for row in kept) if labelled else ("",) * len(kept),
        unit_vectors(names, embeddings[kept]),
        (
            *(thumbnail(images.read(row), PICTURE_PX, images.names[row]) for row in shown),
            *(b"" for _ in kept[len(shown) :]),
        ),
    )


def _check_origin(gallery: Gallery, file: Path) -> None:
    """Refuse embeddings of other weights than the gallery's, as far as the file says."""
    sha256 = network_of_embeddings(file)
    if not gallery.network_sha256:
        return
    if not sha256:
        say(f"warning: {file} doesn't say which network it is of; scores mean something if it is the gallery's alone")
    elif sha256 != gallery.network_sha256:
        raise ValueError(f"--embeddings: {file} is of other weights than the gallery")


def _person(name: str) -> str:
    folders = name.split("/")
    return folders[-2] if len(folders) > 1 else image_key(name)[0]
