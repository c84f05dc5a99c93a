"""Nodes with different shards don't start."""

import re
from pathlib import Path

import cv2
import numpy as np
from distributed.ranks import run_ranks

from facetrain.data.pack import pack
from facetrain.data.shards import ShardSet
from facetrain.inputs import check_same_shards
from facetrain.world import World


def errors(world: World, same: Path, other: Path) -> tuple[str, str]:
    found = []
    for folder in (same, other if world.rank == 1 else same):
        try:
            check_same_shards(ShardSet.open(folder), world)
            found.append("")
        except ValueError as error:
            found.append(str(error))
    return found[0], found[1]


def test_ranks_with_different_manifests_fail_together(tmp_path: Path) -> None:
    for person in range(4):
        (tmp_path / f"faces/{person}").mkdir(parents=True)
        for k in range(2):
            pixels = np.full((24, 24, 3), 50 * person + 10 * k, dtype=np.uint8)
            cv2.imwrite(str(tmp_path / f"faces/{person}/{k}.jpg"), pixels)
    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(folders):
        pack([tmp_path / "faces"], folder, image_px=24, seed=seed, workers=1)
    (same_0, differing_0), (same_1, differing_1) = run_ranks(errors, 2, *folders)
    assert same_0 == same_1 == ""
    assert differing_0 == differing_1
    place = rf"{re.escape(str(folders[1]))} of rank 1 on \S+ isn't {re.escape(str(folders[0]))} of rank 0 on \S+"
    assert re.fullmatch(rf"data\.shards: {place}: expected the same manifest everywhere, [^\n]*", differing_0)
