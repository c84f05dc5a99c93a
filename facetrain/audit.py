"""Auditing shards: who in them looks like test people, stands there twice, or is two people."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from facetrain import __version__
from facetrain.command_line import say
from facetrain.config import DataConfig
from facetrain.data.decode import decode_face, thumbnail
from facetrain.data.shards import ShardSet
from facetrain.data.sources import open_faces
from facetrain.evaluation.audit import Candidate, bounds_of, duplicates, mixtures, overlaps, telling_score
from facetrain.evaluation.html_page import Html, box, page, picture, section, text
from facetrain.evaluation.inputs import unit_vectors
from facetrain.evaluation.judge import PICTURE_PX
from facetrain.networks import EmbedOptions, Network, embed_all, open_network
from facetrain.whole_file import write_text
from facetrain.world import REPORT_TIMEOUT_S, World, start_world

FEWEST_SHOWN, MOST_SHOWN = 100, 1000
"""Candidates of each kind on the page and in audit.json: within these, all that reach the score and stand in a list."""

_KINDS = {
    "overlaps": "Like people of the test",
    "duplicates": "Like one another: one person under two names?",
    "mixtures": "Unlike themselves: two people under one name?",
}


@dataclass(frozen=True, eq=False)
class _People:
    """A set of faces and where its identities and pictures are."""

    names: Sequence[str]
    """[I], the identities."""
    bounds: NDArray[np.int64]
    """[I + 1], their images."""
    read: Callable[[int], bytes]
    """Gives the file of an image."""
    where: Callable[[int], str]
    """Says where an image comes from."""

    def embed(self, network: Network, options: EmbedOptions, world: World) -> NDArray[np.float32]:
        """Return float32 [images, D], the same on every rank."""
        names = self._where_all()

        def decode(image: int, data: DataConfig) -> NDArray[np.uint8]:
            return decode_face(self.read(image), data, names[image])

        return embed_all([network], decode, names, options, world)

    def unit(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return what `embed` gave with rows of unit length."""
        return unit_vectors(self._where_all(), embeddings)

    def _where_all(self) -> list[str]:
        return [self.where(image) for image in range(int(self.bounds[-1]))]


def audit_shards(
    folder: Path, checkpoint: Path, against: Sequence[Path], options: EmbedOptions, min_score: float | None, out: Path
) -> None:
    """Look for people of a test set, duplicates and mixtures among the identities of shards.

    Writes audit.html for a person to look through, audit.json with the scores, and what `facetrain pack` takes with
    --exclude and --merge: exclude.txt and merge.txt, with the candidates whose score reaches `min_score`. No list has
    more than the page shows.

    Args:
        folder: The shards.
        checkpoint: A run folder, .safetensors or .onnx; the better it knows people, the better the candidates.
        against: Images of the test, as `open_faces` takes them; none leaves overlaps out.
        options: How to embed.
        min_score: Cosine of two identities; null takes that of `telling_score`.
        out: The folder.

    Raises:
        ValueError: Shards, weights or images can't be used; the message names the file.
    """
    network, shards = open_network(checkpoint, options.onnx), ShardSet.open(folder)
    trained = _People(shards.table.names, np.asarray(shards.table.first_image), shards.read, shards.where)
    tested = _open_test(against) if against else None
    if min_score is None and np.diff(trained.bounds).max(initial=0) < 2:
        raise ValueError(f"--min-score: expected one, since no identity of {folder} has two images to tell it from")
    out.mkdir(parents=True, exist_ok=True)
    with start_world(options.device, REPORT_TIMEOUT_S) as world:
        of_tested = tested.embed(network, options, world) if tested else None  # few; what can't be read is said soon
        of_trained = trained.embed(network, options, world)

        def report() -> None:
            trained_nD = trained.unit(of_trained)
            found = {
                "duplicates": duplicates(trained_nD, trained.bounds),
                "mixtures": mixtures(trained_nD, trained.bounds),
            }
            if tested and of_tested is not None:
                found["overlaps"] = overlaps(trained_nD, trained.bounds, tested.unit(of_tested), tested.bounds)
            least = telling_score(trained_nD, trained.bounds, found["duplicates"]) if min_score is None else min_score
            shown = {kind: _shown(kind, candidates, least) for kind, candidates in found.items()}
            _write_lists(shown, trained, tested, least, out)
            write_text(out / "audit.html", _page(found, shown, trained, tested, least, checkpoint))

        world.on_main(report)


def _open_test(paths: Sequence[Path]) -> _People:
    faces = open_faces(paths)
    if left_out := faces.describe_skipped():
        say(left_out)
    bounds = bounds_of(faces.identities)
    return _People([faces.identities[first] for first in bounds[:-1].tolist()], bounds, faces.read, faces.where)


def _shown(kind: str, candidates: Sequence[Candidate], least: float) -> Sequence[Candidate]:
    """Return the candidates of a kind that people look at."""
    reach = 0 if kind == "mixtures" else sum(each.score >= least for each in candidates)
    return candidates[: min(max(reach, FEWEST_SHOWN), MOST_SHOWN)]


def _write_lists(
    shown: Mapping[str, Sequence[Candidate]], trained: _People, tested: _People | None, least: float, out: Path
) -> None:
    """Write the lists and audit.json, and say what is in them."""
    alike = {kind: [each for each in candidates if each.score >= least] for kind, candidates in shown.items()}
    merge = [f"{trained.names[each.identity]}\t{trained.names[each.other]}\n" for each in alike["duplicates"]]
    write_text(out / "merge.txt", "".join(merge))
    (out / "exclude.txt").unlink(missing_ok=True)  # of an audit against another test
    told = f"pairs of identities (merge.txt): {len(merge)}"
    if tested:
        exclude = [f"{trained.names[each.identity]}\n" for each in alike["overlaps"]]
        write_text(out / "exclude.txt", "".join(exclude))
        told = f"identities like people of the test (exclude.txt): {len(exclude)}; {told}"
    rows = {
        kind: [
            {
                "score": each.score,
                "identity": trained.names[each.identity],
                "other": _other(kind, each, trained, tested),
            }
            for each in candidates
        ]
        for kind, candidates in shown.items()
    }
    write_text(out / "audit.json", json.dumps({"min_score": least, **rows}, indent=1, ensure_ascii=False) + "\n")
    say(f"{out}: candidates of score {least:.3f} or more: {told}; look through audit.html before using the lists")


def _other(kind: str, candidate: Candidate, trained: _People, tested: _People | None) -> str:
    people = tested if kind == "overlaps" and tested else trained
    return people.names[candidate.other]


def _page(
    found: Mapping[str, Sequence[Candidate]],
    shown: Mapping[str, Sequence[Candidate]],
    trained: _People,
    tested: _People | None,
    least: float,
    checkpoint: Path,
) -> str:
    sections = []
    for kind in (kind for kind in _KINDS if kind in found):
        others = tested if kind == "overlaps" and tested else trained
        cards = [_card(each, trained, others) for each in shown[kind]]
        reach, most = sum(each.score >= least for each in found[kind]), len(shown[kind])
        which = f"the first {most:,}, which are shown here," if reach > most else "they"
        about = {
            "overlaps": f"The most alike first; {reach:,} reach {least:.3f}, and {which} stand in exclude.txt.",
            "duplicates": f"The most alike first; {reach:,} reach {least:.3f}, and {which} stand in merge.txt.",
            "mixtures": "The least alike parts first, each shown by its two least alike images; in no list.",
        }[kind]
        sections.append(section(_KINDS[kind], text(about, css="quiet"), box("pairs", cards)))
    counts = f"{len(trained.names):,} identities, embedded by {checkpoint}"
    warning = "Candidates, not findings: look at the pictures before leaving anybody out or making two people one."
    footer = text(f"facetrain {__version__}. Scores are cosines of mean embeddings.", "footer")
    parts = [text("Audit of training identities", "h1"), text(counts, css="quiet"), text(warning), *sections, footer]
    return page("Audit of training identities", parts)


def _card(candidate: Candidate, trained: _People, others: _People) -> Html:
    sides = ((trained, candidate.identity, candidate.images[0]), (others, candidate.other, candidate.images[1]))
    faces = [
        picture(thumbnail(people.read(image), PICTURE_PX, people.where(image)), "image/jpeg", people.names[identity])
        for people, identity, image in sides
    ]
    names = dict.fromkeys(
        f"{people.names[identity]}, images: {people.bounds[identity + 1] - people.bounds[identity]}"
        for people, identity, _ in sides
    )
    score = text(f"score {candidate.score:.3f}", css="score")
    return box("pair", [box("faces", faces), score, *(text(name) for name in names)])
