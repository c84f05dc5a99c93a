"""Small sets of named embeddings whose scores are exact in float32, so that ties are ties."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def tied_set(seed: int, num_people: int = 24) -> tuple[list[str], NDArray[np.float32]]:
    """People with 1 to 6 images, shuffled; entries of -/+ 0.5 give scores of -1, -0.5, 0, 0.5 and 1 alone."""
    rng = np.random.default_rng(seed)
    names, corners = [], []
    for person in range(num_people):
        own = rng.choice([-1, 1], 4)
        # Numbers have gaps and don't start at 1; the lowest-numbered image is still well defined.
        for number in rng.choice(50, 1 + person % 6, replace=False):
            names.append(f"Person_{person}/Person_{person}_{number:04d}.jpg")
            corners.append(own * rng.choice([1, 1, 1, 1, -1], 4))
    order = rng.permutation(len(names))
    return [names[i] for i in order], np.array(corners, dtype=np.float32)[order] / 2


def write_pairs(file: Path, names: list[str], *, folds: int = 4, per_fold: int = 6, seed: int = 0) -> Path:
    """Write a pairs.txt of random pairs of the named images."""
    rng = np.random.default_rng(seed)
    images: dict[str, list[int]] = {}
    for name in names:
        person, number = Path(name).stem.rsplit("_", 1)
        images.setdefault(person, []).append(int(number))
    several = [person for person in images if len(images[person]) > 1]
    lines = [f"{folds}\t{per_fold}"]
    for _ in range(folds):
        for person in rng.choice(several, per_fold):
            i, j = rng.choice(images[person], 2, replace=False)
            lines.append(f"{person}\t{i}\t{j}")
        for _ in range(per_fold):
            a, b = rng.choice(list(images), 2, replace=False)
            lines.append(f"{a}\t{rng.choice(images[a])}\t{b}\t{rng.choice(images[b])}")
    file.write_text("\n".join(lines) + "\n")
    return file
