"""What a folder of shards holds, whether it is whole, and what it looks like."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from facetrain.command_line import say
from facetrain.data.contact_sheet import save_contact_sheet
from facetrain.data.pack import REJECTED_FILE
from facetrain.data.shards import ShardSet
from facetrain.figure import COLOURS, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_BINS = 60


@dataclass(frozen=True)
class Spread:
    """How a count or size is distributed."""

    min: int
    median: float
    mean: float
    max: int

    @classmethod
    def of(cls, numbers: npt.NDArray[np.int64]) -> "Spread":
        """Measure at least one number."""
        return cls(int(numbers.min()), float(np.median(numbers)), float(numbers.mean()), int(numbers.max()))

    def __str__(self) -> str:
        return f"min {self.min:,}, median {self.median:,.0f}, mean {self.mean:,.1f}, max {self.max:,}"


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A folder of shards in numbers."""

    identities: int
    """Number of identities."""
    images: int
    """Number of images."""
    shards: int
    """Number of shards."""
    image_px: int
    """Side of the images, in pixels."""
    size_bytes: int
    """Size of all shards."""
    images_per_identity: Spread
    """Images of an identity."""
    image_bytes: Spread
    """Length of an image's file."""
    single_image_identities: int
    """Identities with one image; they can't give a pair of different images."""
    rejected_images: dict[str, int]
    """Images of the source that aren't in the shards, by reason, the commonest first."""
    dropped_identities: dict[str, int]
    """Identities of the source that aren't in the shards, by reason, the commonest first."""
    content_sha256: str
    """Checksum of all shards."""

    def lines(self) -> list[str]:
        """Return the numbers as lines for a person to read."""
        return [
            f"{self.images:,} images of {self.identities:,} identities, {self.image_px}x{self.image_px} pixels, "
            f"in {self.shards:,} shards of {self.size_bytes / 1e6:,.1f} MB",
            f"images per identity: {self.images_per_identity}; {self.single_image_identities:,} have one alone",
            f"bytes per image: {self.image_bytes}",
            f"images left out while packing: {_listed(self.rejected_images)}",
            f"identities left out while packing: {_listed(self.dropped_identities)}",
            f"whole: every shard has the sha256 of its manifest; all together {self.content_sha256[:16]}",
        ]


def inspect_shards(folder: Path, out: Path | None) -> None:
    """Say what a folder of shards holds, and check every byte of it against the manifest.

    Args:
        folder: The shards.
        out: Receives inspection.json, images_per_identity.png and contact_sheet.jpg; null writes nothing.

    Raises:
        ValueError: The shards are damaged; the message names the first file that isn't what was packed.
    """
    shards = ShardSet.open(folder)
    shards.verify()
    inspection = measure_shards(shards)
    for line in inspection.lines():
        say(line)
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / "inspection.json").write_text(json.dumps(asdict(inspection), indent=1) + "\n")
    counts = np.diff(shards.table.first_image)
    save_figure(out / "images_per_identity.png", lambda axes: _draw_counts(axes, counts))
    save_contact_sheet(shards, out / "contact_sheet.jpg")
    say(f"{out}: inspection.json, images_per_identity.png, contact_sheet.jpg")


def measure_shards(shards: ShardSet) -> Inspection:
    """Count what the manifest, the indexes and rejected.jsonl say; reads no image."""
    manifest, lines = shards.manifest, _rejected(shards.folder / REJECTED_FILE)
    return Inspection(
        identities=manifest.identities,
        images=manifest.images,
        shards=len(manifest.shards),
        image_px=manifest.image_px,
        size_bytes=manifest.size_bytes,
        images_per_identity=Spread.of(np.diff(shards.table.first_image)),
        image_bytes=Spread.of(shards.places.size_bytes()),
        single_image_identities=manifest.single_image_identities,
        rejected_images=_reasons(line for line in lines if "image" in line),
        dropped_identities=_reasons(line for line in lines if "identity" in line),
        content_sha256=manifest.content_sha256,
    )


def _rejected(file: Path) -> list[dict[str, str]]:
    if not file.is_file() or not file.stat().st_size:
        return []
    entries = []
    for number, line in enumerate(file.read_text(encoding="utf-8").rstrip("\n").split("\n"), start=1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or not isinstance(entry.get("reason"), str):
            raise ValueError(f"{file}:{number}: expected a JSON with a reason, got {line!r}")
        entries.append(entry)
    return entries


def _reasons(lines: Iterable[dict[str, str]]) -> dict[str, int]:
    """Count the kinds of reasons: each up to its colon, behind which the single case stands."""
    kinds = Counter(line["reason"].split(":")[0] for line in lines)
    return dict(sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0])))


def _listed(reasons: dict[str, int]) -> str:
    return "; ".join(f"{count:,} {reason}" for reason, count in reasons.items()) or "none"


def _draw_counts(axes: "Axes", counts: npt.NDArray[np.int64]) -> None:
    """Draw how many identities have how many images."""
    step = -(-int(counts.max()) // _MAX_BINS)
    edges = np.arange(1, counts.max() + step + 1, step)
    identities, _ = np.histogram(counts, edges)
    axes.stairs(identities, edges - 0.5, fill=True, color=COLOURS[0])
    axes.axvline(counts.mean(), color=COLOURS[1], linestyle="--", label=f"mean {counts.mean():.1f}")
    axes.set_xlim(0.5, edges[-1] - 0.5)
    axes.locator_params(axis="x", integer=True)
    if identities.max() > 100:  # where a few images each are common, a linear axis would show nothing else
        axes.set_yscale("symlog", linthresh=1, linscale=0.3)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set_ylim(top=2 * identities.max())
    axes.set(xlabel="images of an identity", ylabel="identities" if step == 1 else f"identities, by {step} images")
    axes.set_title(f"{counts.sum():,} images of {len(counts):,} identities")
    axes.set_axisbelow(True)
    axes.legend()
