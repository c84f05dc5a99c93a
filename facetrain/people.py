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
from facetrain.evaluation.threshold import at_far, threshold_from_results, weights_of_results
from facetrain.gallery import GALLERY_FILE, Gallery, Kind
from facetrain.gallery_faces import Embedded, Faces, embed_faces, network_of, onnx_input, warn_of_differences
from facetrain.lock import hold_folder
from facetrain.networks import EmbedOptions
from facetrain.search_page import MOST_SHOWN, search_page
from facetrain.whole_file import write_text

LEFT_OUT_FILE = "left_out.txt"
"""Name and reason of each image that couldn't be read, or shows no face."""
_SAID = 20
"""Faces of which the terminal shows the people, where a file has all of them."""
_GALLERY = "gallery"
"""The protocol that takes a threshold from the gallery itself."""


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
            network = network_of(gallery, faces)
            if network:
                warn_of_differences(gallery, options)
            most = None if pictures else 0
            found = embed_faces(gallery, faces, network, options, folder / LEFT_OUT_FILE, are_known=True, pictures=most)
            _say_what_is_there(gallery, found)
            gallery = gallery.with_images(found.names, found.people, found.embeddings, found.pictures)
            if not network and len(gallery.names) == len(found.names):  # of these alone
                gallery = replace(gallery, network="", network_sha256=found.network_sha256)
            if network:
                gallery = replace(
                    gallery,
                    network=str(network.absolute()),
                    network_sha256=found.network_sha256,
                    is_aligned=bool(options.detector or options.landmarks),
                    is_mirrored=options.mirror,
                    onnx=onnx_input(network, options),
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
    network = network_of(gallery, faces)
    known_network = network or (Path(gallery.network) if gallery.network else None)
    threshold, about = decision.resolve(gallery, known_network)
    if network:
        warn_of_differences(gallery, options)
    if out:
        out.mkdir(parents=True, exist_ok=True)
    left_out = out / LEFT_OUT_FILE if out else None
    pictures = MOST_SHOWN if out else 0
    found = embed_faces(gallery, faces, network, options, left_out, are_known=False, pictures=pictures)
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


def _say_what_is_there(gallery: Gallery, found: Embedded) -> None:
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
