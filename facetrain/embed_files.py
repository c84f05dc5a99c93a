"""Embedding any number of images into a file, part by part, so that an interrupted job goes on where it stopped."""

import json
import shutil
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from facetrain.command_line import say
from facetrain.config import RunConfig
from facetrain.data.embeddings_parquet import check_parquet, write_embeddings_parquet
from facetrain.data.images import ImageSet, open_images
from facetrain.data.manifest import combined_sha256
from facetrain.evaluation.embeddings_npz import NETWORK_ENTRY
from facetrain.evaluation.inputs import unit_vectors
from facetrain.lock import hold_folder
from facetrain.networks import (
    EmbedOptions,
    Network,
    Photographs,
    embed_readable,
    list_left_out,
    open_aligner,
    open_network,
)
from facetrain.whole_file import write_text, writing
from facetrain.world import REPORT_TIMEOUT_S, World, start_world

PART_IMAGES = 8192
"""Images of a part: what is lost, at most, when a job is interrupted."""
_PLAN_FILE = "plan.json"
_STDIN = Path("-")


def embed_to_file(run: Path, images: Sequence[Path], options: EmbedOptions, out: Path) -> None:
    """Embed images over all ranks, and write names and embeddings of unit length.

    Parts are kept in the folder OUT.parts until all are there; another start of the same job goes on from them.
    Images that can't be read are left out and listed, with the reason, in OUT.left_out.txt, a line each.

    Args:
        run: A run folder, .safetensors or .onnx.
        images: As `open_images` takes them; `-` stands for paths on stdin, one a line.
        options: How to embed.
        out: A file: .npz with the arrays `names` and `embeddings`, or .parquet with the columns `name` and `embedding`.

    Raises:
        ValueError: The weights or a path can't be used, or no image can be read; the message names it.
    """
    if out.suffix not in (".npz", ".parquet"):
        raise ValueError(f"--out: expected a file .npz or .parquet, got {out}")
    if out.is_dir():
        raise ValueError(f"--out: expected a file, {out} is a folder")
    if out.suffix == ".parquet":
        check_parquet(out)
    network, aligner = open_network(run, options.onnx), open_aligner(options)
    on_disk, stdin = [path for path in images if path != _STDIN], _STDIN in images
    found = None if stdin else open_images(on_disk)  # before the processes meet, where that is possible
    with start_world(options.device, RunConfig().timeout_s) as world, ExitStack() as held:
        found = found or open_images(on_disk, world.on_main(_stdin_lines))
        job = _Job(network, Photographs(found, aligner), options, world)
        parts = out.with_name(f"{out.name}.parts")
        world.on_main(lambda: _open_parts(parts, _plan_of(network, found, options), held))
        job.embed(parts)
        with world.waiting_up_to(REPORT_TIMEOUT_S):
            world.on_main(lambda: _join(parts, found, out, network.sha256, has_aligner=aligner is not None))
        if world.is_main:
            held.close()
            shutil.rmtree(parts, ignore_errors=True)  # not while it is held: NFS keeps files that are open


def _stdin_lines() -> list[str]:
    return [line.strip() for line in sys.stdin if line.strip()]


def _plan_of(network: Network, images: ImageSet, options: EmbedOptions) -> dict[str, object]:
    """Return what decides the embeddings, to the bit on the same kind of device."""
    plan = {
        "format": 2,  # of the parts
        "images": images.fingerprint(),
        "network": network.sha256,
        "preprocessing": vars(network.data),
        "precision": network.precision,
        "mirror": options.mirror,
        "onnx": vars(options.onnx),
        "part_images": PART_IMAGES,
    }
    for name in ("landmarks", "detector"):
        file = getattr(options, name)
        plan[name] = combined_sha256([file]) if file else None
    return plan


def _open_parts(parts: Path, plan: dict[str, object], held: ExitStack) -> None:
    """Make the folder of parts and hold it; parts of another job are removed."""
    parts.mkdir(parents=True, exist_ok=True)
    held.enter_context(hold_folder(parts))
    stored, wanted = parts / _PLAN_FILE, json.dumps(plan)
    if stored.is_file() and stored.read_text() != wanted:
        say(f"{parts}: of other images, weights or settings: starts anew")
        for part in parts.glob("part-*"):
            part.unlink()
    write_text(stored, wanted)


@dataclass(frozen=True)
class _Job:
    """One process's share in embedding."""

    network: Network
    photographs: Photographs[ImageSet]
    options: EmbedOptions
    world: World

    def embed(self, parts: Path) -> None:
        """Write the parts that aren't there yet."""
        num_images = len(self.photographs.faces.names)
        batch = self.network.fitting_batch(self.world)
        starts = range(0, num_images, PART_IMAGES)
        # Rank 0 says which parts are there: another node may see a file of the shared folder later.
        is_there = self.world.on_main(lambda: [_is_done(_part_file(parts, part)) for part in range(len(starts))])
        for part, start in enumerate(starts):
            if not is_there[part]:
                images = range(start, min(start + PART_IMAGES, num_images))
                self._embed_part(images, _part_file(parts, part), batch, f"embed {part + 1}/{len(starts)}")

    def _embed_part(self, images: range, file: Path, batch_images: int, label: str) -> None:
        embeddings, unreadable, failed = embed_readable(
            self.network,
            self.photographs,
            images,
            self.options,
            self.world,
            batch_images=batch_images,
            progress=label,
        )
        not_aligned = self.photographs.not_aligned(self.world) or ()
        if self.photographs.aligner:
            self.photographs.aligner.forget()  # the next part has its own
        self.world.on_main(lambda: _write_part(file, embeddings, unreadable, not_aligned, failed))


def _part_file(parts: Path, part: int) -> Path:
    return parts / f"part-{part:06d}.npz"


def _is_done(part: Path) -> bool:
    """Return whether a part is there, and needn't be tried again as one with files that the system failed to read."""
    if not part.is_file():
        return False
    with np.load(part, allow_pickle=False) as content:
        return not len(content["failed"])


def _write_part(
    file: Path,
    embeddings: NDArray[np.float32],
    unreadable: dict[int, str],
    not_aligned: Sequence[str],
    failed: set[int],
) -> None:
    with writing(file) as aside, open(aside, "wb") as stream:
        np.savez(
            stream,
            embeddings=embeddings,
            unreadable=np.array(list(unreadable), dtype=np.int64),
            why=np.array(list(unreadable.values()), dtype=np.str_),
            not_aligned=np.array(not_aligned, dtype=np.str_),
            failed=np.array(sorted(failed), dtype=np.int64),
        )


def _join(parts: Path, images: ImageSet, out: Path, network_sha256: str, *, has_aligner: bool) -> None:
    """Make one file of the parts, with one of them in memory at a time, and remove them."""
    files = [_part_file(parts, part) for part in range(-(-len(images.names) // PART_IMAGES))]
    why, missed, width = dict[int, str](), list[str](), 0
    for file in files:
        with np.load(file, allow_pickle=False) as content:
            why |= dict(zip(content["unreadable"].tolist(), content["why"].tolist(), strict=True))
            missed += content["not_aligned"].tolist()
            width = content["embeddings"].shape[1]
    list_left_out(out.with_name(f"{out.name}.left_out.txt"), images.names, why)
    not_found = out.with_name(f"{out.name}.not_found.txt")
    not_found.unlink(missing_ok=True)
    if missed:
        write_text(not_found, "".join(f"{name}\n" for name in missed))
    names = [name for image, name in enumerate(images.names) if image not in why]

    def blocks() -> Iterator[NDArray[np.float32]]:
        for part, file in enumerate(files):
            first = part * PART_IMAGES
            with np.load(file, allow_pickle=False) as content:
                embeddings = content["embeddings"]
            kept = [row for row in range(len(embeddings)) if first + row not in why]
            yield unit_vectors([images.names[first + row] for row in kept], embeddings[kept])

    _write_embeddings(out, names, blocks(), width, network_sha256)
    for file in [*files, parts / _PLAN_FILE]:
        file.unlink()
    listed = f", listed in {not_found}" if missed else ""
    centred = f"; faces not found, centre taken instead: {len(missed):,}{listed}" if has_aligner else ""
    say(f"{out}: {len(names):,} embeddings of {width} numbers{centred}")


def _write_embeddings(
    out: Path, names: Sequence[str], blocks: Iterator[NDArray[np.float32]], width: int, network_sha256: str
) -> None:
    """Write the file, at once or not at all."""
    with writing(out) as aside:
        if out.suffix == ".npz":
            _write_npz(aside, names, blocks, width, network_sha256)
        else:
            write_embeddings_parquet(aside, names, blocks)


def _write_npz(
    file: Path, names: Sequence[str], blocks: Iterator[NDArray[np.float32]], width: int, network_sha256: str
) -> None:
    """Write what `numpy.savez` would, without all embeddings in memory."""
    header = {"descr": "<f4", "fortran_order": False, "shape": (len(names), width)}
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open("names.npy", "w", force_zip64=True) as entry:
            np.lib.format.write_array(entry, np.array(names, dtype=np.str_), allow_pickle=False)
        with archive.open("embeddings.npy", "w", force_zip64=True) as entry:
            np.lib.format.write_array_header_1_0(entry, header)
            for block in blocks:
                entry.write(block.astype("<f4", copy=False).tobytes())
        with archive.open(f"{NETWORK_ENTRY}.npy", "w") as entry:
            np.lib.format.write_array(entry, np.array(network_sha256), allow_pickle=False)
