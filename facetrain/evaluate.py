"""Evaluate somebody's weights or embeddings on a set of named faces: what `facetrain lfw` does."""

import os
from pathlib import Path
from typing import Literal

from facetrain.checkpoint import load_backbone
from facetrain.data.sources import open_faces
from facetrain.evaluation.inputs import load_embeddings_npz
from facetrain.evaluation.judge import embed_faces
from facetrain.evaluation.lfw import check_inputs
from facetrain.evaluation.report import evaluate_to_folder
from facetrain.world import start_world


def evaluate_embeddings(
    file: Path, *, pairs: Path, open_set_people: Path | None, draws: int, dataset: str, out: Path
) -> None:
    """Run the protocols on an .npz of `names` and `embeddings`; print the table, write results and figures.

    Raises:
        ValueError: The file or a list can't be used; the message names it.
    """
    if os.environ.get("RANK", "0") != "0":  # there is nothing to share
        return
    names, embeddings = load_embeddings_npz(file)
    evaluate_to_folder(
        names, embeddings, pairs=pairs, open_set_people=open_set_people, draws=draws, dataset=dataset, out=out
    )


def evaluate_checkpoint(
    run: Path,
    images: list[Path],
    *,
    mirror: bool,
    device: Literal["auto", "cpu", "cuda"],
    pairs: Path,
    open_set_people: Path | None,
    draws: int,
    dataset: str,
    out: Path,
) -> None:
    """Embed a set with a run's network, over all ranks, and run the protocols as `evaluate_embeddings` does.

    Raises:
        ValueError: The weights, the images or a list can't be used; the message names the file.
    """
    backbone, config = load_backbone(run)
    faces = open_faces(images)
    check_inputs(faces.names, pairs=pairs, open_set_people=open_set_people, dataset=dataset)
    with start_world(device, config.run.timeout_s) as world:
        embeddings = embed_faces(faces, backbone.to(world.device), config, world, mirror=mirror, progress=True)

        def report() -> None:
            evaluate_to_folder(
                faces.names,
                embeddings,
                pairs=pairs,
                open_set_people=open_set_people,
                draws=draws,
                dataset=dataset,
                out=out,
            )

        world.on_main(report)
