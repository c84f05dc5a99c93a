"""Synthetic faces as files: a training set, and a held-out set with lists in LFW's formats."""

import json
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from facetrain.data.synthetic.face import draw_face
from facetrain.data.synthetic.traits import Capture, Traits, draw_capture, draw_traits

NUM_FOLDS = 10
MAX_PAIRS_PER_FOLD = 300
"""Genuine, and as many impostor pairs, of a fold of LFW; smaller sets have as many as every fold can give."""
FIRST_HELDOUT_IDENTITY = 1_000_000_000
"""Held-out people are numbered from here, so that they don't depend on how many people are trained on."""

_SUMMARY_FILE = "synthetic.json"
_DRAWING_VERSION = 1  # raised when the same arguments give other pixels


@dataclass(frozen=True)
class _Arguments:
    num_identities: int
    images_per_identity: int
    heldout_identities: int
    heldout_images: int
    image_px: int
    seed: int
    drawing_version: int = _DRAWING_VERSION


@dataclass(frozen=True, kw_only=True)
class SyntheticSummary:
    """What `synthesize` wrote."""

    num_train_images: int
    num_heldout_images: int
    num_pairs: int
    """Lines of heldout_pairs.txt after the first; half of them are genuine."""
    num_open_set_people: int
    """Lines of heldout_people.txt."""


@dataclass(frozen=True)
class _Person:
    """One person's images: what a worker draws."""

    folder: Path
    identity: int
    names: tuple[str, ...]
    """File names; the k-th is image k of the identity."""


def synthesize(
    out: Path,
    *,
    num_identities: int = 500,
    images_per_identity: int = 10,
    heldout_identities: int = 200,
    heldout_images: int = 6,
    image_px: int = 112,
    seed: int = 0,
    workers: int | None = None,
) -> SyntheticSummary:
    """Draw people to train on and other people to evaluate on, and write their faces.

    `out` holds train/p00001/001.jpg ..., heldout/Person_00001/Person_00001_0001.jpg ..., heldout_pairs.txt (in the
    format of LFW's pairs.txt), heldout_people.txt (for the open-set protocol) and synthetic.json (the arguments). It
    appears when everything is in it. The bytes depend on the arguments alone, not on `workers`.

    Args:
        out: A new or empty folder, or one made with the same arguments, which is left as it is.
        num_identities: People to train on.
        images_per_identity: Images of each of them.
        heldout_identities: People to evaluate on, at least 20.
        heldout_images: Most images that a held-out person has, at least 2; others have fewer, down to one, as in LFW.
        image_px: Side of the square images, in pixels.
        seed: Seed of everything that is drawn.
        workers: Processes; all cores that this process may use by default.

    Raises:
        ValueError: An argument is out of bounds, or `out` holds something else, or can't be put in place whole.
    """
    arguments = _Arguments(num_identities, images_per_identity, heldout_identities, heldout_images, image_px, seed)
    _check(arguments, workers)
    if _is_complete(out, arguments):
        return SyntheticSummary(**json.loads((out / _SUMMARY_FILE).read_text())["summary"])
    if not out.name or out.is_mount():
        raise ValueError(
            f"{out}: expected a folder that takes its place when it is complete, such as {out / 'faces'}, which neither"
            " the working directory nor a mount point can"
        )
    unfinished = out.with_name(out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    train = _training_people(unfinished / "train", arguments)
    heldout = _heldout_people(unfinished / "heldout", arguments)
    pairs = _lfw_pairs(heldout, seed)
    open_set = _open_set_people(heldout, seed)
    _draw_all([*train, *heldout], arguments, workers or len(os.sched_getaffinity(0)))
    (unfinished / "heldout_pairs.txt").write_text("\n".join(pairs) + "\n")
    (unfinished / "heldout_people.txt").write_text("\n".join(open_set) + "\n")
    summary = SyntheticSummary(
        num_train_images=sum(len(person.names) for person in train),
        num_heldout_images=sum(len(person.names) for person in heldout),
        num_pairs=len(pairs) - 1,
        num_open_set_people=len(open_set),
    )
    text = json.dumps({"arguments": asdict(arguments), "summary": asdict(summary)}, indent=2)
    (unfinished / _SUMMARY_FILE).write_text(text + "\n")
    unfinished.replace(out)
    return summary


def _check(arguments: _Arguments, workers: int | None) -> None:
    bounds = {
        "num_identities": (1, 99_999),
        "images_per_identity": (1, 999),
        "heldout_identities": (2 * NUM_FOLDS, 99_999),
        "heldout_images": (2, 9_999),
        "image_px": (16, 1024),
        "seed": (0, 2**63 - 1),
    }
    for name, (low, high) in bounds.items():
        if not low <= (value := getattr(arguments, name)) <= high:
            raise ValueError(f"synth: {name}: expected {low} to {high}, got {value}")
    if workers is not None and workers < 1:
        raise ValueError(f"synth: workers: expected 1 or more, got {workers}")


def _is_complete(out: Path, arguments: _Arguments) -> bool:
    """Whether the folder was made with these arguments; False where there is nothing yet."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / _SUMMARY_FILE).is_file():
        raise ValueError(f"{out}: expected a new or empty folder, or one that an earlier `facetrain synth` made")
    found = json.loads((out / _SUMMARY_FILE).read_text())["arguments"]
    differing = [f"{k} {found.get(k)!r} instead of {v!r}" for k, v in asdict(arguments).items() if found.get(k) != v]
    if differing:
        raise ValueError(
            f"{out}: holds other synthetic faces ({', '.join(differing)}); give another folder or remove it"
        )
    return True


def _training_people(folder: Path, arguments: _Arguments) -> list[_Person]:
    names = tuple(f"{image + 1:03d}.jpg" for image in range(arguments.images_per_identity))
    return [_Person(folder / f"p{i + 1:05d}", i, names) for i in range(arguments.num_identities)]


def _heldout_people(folder: Path, arguments: _Arguments) -> list[_Person]:
    """Person i belongs to fold i mod 10; ten people in a row have equally many images, so the folds are alike."""
    most = arguments.heldout_images
    counts = [min(count, most) for count in (most, 2, most - 1, 1, (most + 3) // 2, 3, most, 1)]
    people = []
    for i in range(arguments.heldout_identities):
        name = f"Person_{i + 1:05d}"
        count = counts[i // NUM_FOLDS % len(counts)]
        names = tuple(f"{name}_{image + 1:04d}.jpg" for image in range(count))
        people.append(_Person(folder / name, FIRST_HELDOUT_IDENTITY + i, names))
    return people


def _lfw_pairs(people: list[_Person], seed: int) -> list[str]:
    """Return the lines of a pairs.txt; folds share no person, and no pair stands twice.

    Source: Huang et al., Labeled Faces in the Wild, 2007 (View 2 and its file format).
    """
    rng = np.random.default_rng([seed, FIRST_HELDOUT_IDENTITY])
    folds = [people[fold::NUM_FOLDS] for fold in range(NUM_FOLDS)]
    genuine = [
        [(p.folder.name, i + 1, j + 1) for p in fold for i, j in combinations(range(len(p.names)), 2)] for fold in folds
    ]
    impostor = [
        [
            (a.folder.name, i + 1, b.folder.name, j + 1)
            for a, b in combinations(fold, 2)
            for i in range(len(a.names))
            for j in range(len(b.names))
        ]
        for fold in folds
    ]
    per_fold = min(MAX_PAIRS_PER_FOLD, *map(len, genuine), *map(len, impostor))
    lines = [f"{NUM_FOLDS}\t{per_fold}"]
    for fold in range(NUM_FOLDS):
        for pairs in (genuine[fold], impostor[fold]):
            chosen = np.sort(rng.choice(len(pairs), per_fold, replace=False))
            lines += ["\t".join(map(str, pairs[i])) for i in chosen]
    return lines


def _open_set_people(people: list[_Person], seed: int) -> list[str]:
    """Return a third of the people, drawn from those who have two images or more: the gallery of the open set."""
    rng = np.random.default_rng([seed, FIRST_HELDOUT_IDENTITY, 1])
    eligible = [person.folder.name for person in people if len(person.names) >= 2]
    chosen = rng.choice(len(eligible), min(len(eligible), len(people) // 3), replace=False)
    return [eligible[i] for i in np.sort(chosen)]


def _draw_all(people: list[_Person], arguments: _Arguments, workers: int) -> None:
    """Draw everybody's images, with progress."""
    tasks = [(person, arguments.image_px, arguments.seed) for person in people]
    with tqdm(total=len(tasks), desc="drawing", unit="person", disable=None) as progress:
        if workers == 1:
            for task in tasks:
                _draw_person(task)
                progress.update()
            return
        # One thread of OpenCV per process: the processes already fill the cores.
        with ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), initializer=cv2.setNumThreads, initargs=(1,)
        ) as pool:
            for _ in pool.map(_draw_person, tasks, chunksize=8):
                progress.update()


def _draw_person(task: tuple[_Person, int, int]) -> None:
    person, image_px, seed = task
    person.folder.mkdir(parents=True)
    traits = draw_traits(seed, person.identity)
    for image, name in enumerate(person.names):
        capture = draw_capture(seed, person.identity, image)
        (person.folder / name).write_bytes(_jpeg(traits, capture, image_px))


def draw_somebody(image_px: int) -> bytes:
    """Return a JPEG of somebody who doesn't exist."""
    return _jpeg(draw_traits(0, 0), draw_capture(0, 0, 0), image_px)


def _jpeg(traits: Traits, capture: Capture, image_px: int) -> bytes:
    pixels = cv2.cvtColor(draw_face(traits, capture, image_px), cv2.COLOR_RGB2BGR)
    quality = [cv2.IMWRITE_JPEG_QUALITY, int(capture.jpeg_quality)]
    return bytes(cv2.imencode(".jpg", pixels, quality)[1].tobytes())
