"""Evaluate somebody's weights or embeddings on a set of named faces: what `facetrain lfw` does."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from facetrain.checkpoint import load_backbone
from facetrain.data.sources import open_faces
from facetrain.evaluation.distractors import Crowd, DistractorScores, Search, open_crowd, search_crowd
from facetrain.evaluation.inputs import load_embeddings_npz, unit_vectors
from facetrain.evaluation.judge import embed_faces, pictures_of
from facetrain.evaluation.lfw import check_inputs
from facetrain.evaluation.report import evaluate_to_folder
from facetrain.world import World, start_world

Device = Literal["auto", "cpu", "cuda"]

TIMEOUT_S = 3600.0
"""Seconds that a rank waits for the others while rank 0 evaluates."""


@dataclass(frozen=True, kw_only=True)
class Distractors:
    """A crowd that enlarges every gallery, as it is asked for."""

    files: tuple[Path, ...] = ()
    """Embeddings of strangers, .npy; none leaves the galleries as they are."""
    search: Search = "exact"
    """How the crowd is searched."""

    def open(self, embedding_dim: int) -> Crowd | None:
        """Open and check the files."""
        return open_crowd(self.files, embedding_dim) if self.files else None


def evaluate_embeddings(
    file: Path,
    images: list[Path],
    *,
    pairs: Path,
    open_set_people: Path | None,
    draws: int,
    dataset: str,
    distractors: Distractors,
    device: Device,
    out: Path,
) -> None:
    """Run the protocols on an .npz of `names` and `embeddings`; print the table, write results and a report.

    Args:
        file: The .npz.
        images: Where the faces are, for the report to show the hardest pairs; none shows names alone.
        pairs: This and what follows are as in `evaluate`.
        open_set_people: See there.
        draws: See there.
        dataset: See there.
        distractors: A crowd for the galleries, searched over all ranks.
        device: Where it is searched.
        out: The folder to write to.

    Raises:
        ValueError: The file, an image or a list can't be used; the message names it.
    """
    names, embeddings = load_embeddings_npz(file)
    check_inputs(names, pairs=pairs, open_set_people=open_set_people, dataset=dataset)
    read_picture = pictures_of(open_faces(images), names) if images else None
    crowd = distractors.open(embeddings.shape[1])
    with start_world(device, TIMEOUT_S) as world:
        scores = _search(crowd, distractors.search, names, embeddings, world)

        def report() -> None:
            evaluate_to_folder(
                names,
                embeddings,
                pairs=pairs,
                open_set_people=open_set_people,
                draws=draws,
                dataset=dataset,
                distractors=scores,
                out=out,
                subject=str(file),
                read_picture=read_picture,
            )

        world.on_main(report)


def evaluate_checkpoint(
    run: Path,
    images: list[Path],
    *,
    mirror: bool,
    device: Device,
    pairs: Path,
    open_set_people: Path | None,
    draws: int,
    dataset: str,
    distractors: Distractors,
    out: Path,
) -> None:
    """Embed a set with a run's network, over all ranks, and run the protocols as `evaluate_embeddings` does.

    Raises:
        ValueError: The weights, the images or a list can't be used; the message names the file.
    """
    backbone, config = load_backbone(run)
    faces = open_faces(images)
    check_inputs(faces.names, pairs=pairs, open_set_people=open_set_people, dataset=dataset)
    crowd = distractors.open(backbone.embedding_dim)
    with start_world(device, config.run.timeout_s) as world:
        embeddings = embed_faces(faces, backbone.to(world.device), config, world, mirror=mirror, progress=True)
        scores = _search(crowd, distractors.search, faces.names, embeddings, world)

        def report() -> None:
            evaluate_to_folder(
                faces.names,
                embeddings,
                pairs=pairs,
                open_set_people=open_set_people,
                draws=draws,
                dataset=dataset,
                distractors=scores,
                out=out,
                subject=str(run),
                read_picture=pictures_of(faces, faces.names),
            )

        world.on_main(report)


def _search(
    crowd: Crowd | None, search: Search, names: Sequence[str], embeddings: NDArray[np.float32], world: World
) -> DistractorScores | None:
    """Search the crowd, where there is one, over all ranks."""
    if crowd is None:
        return None
    return search_crowd(unit_vectors(names, embeddings), crowd, world, search=search, progress=True)
