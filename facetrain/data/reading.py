"""FaceReader: faces by number as the network sees them, and what stands in for one that can't be decoded."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from facetrain.config import DataConfig
from facetrain.data.augment import Augmentation
from facetrain.data.decode import decode_augmented
from facetrain.data.shards import ShardSet
from facetrain.world import World

log = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class FaceReader:
    """Reads single faces of the shards.

    With `data.on_bad_image=skip` another image of the same identity stands in for one that can't be decoded: the next
    in the order of the shards that can, from the last on to the first. So labels and shapes are those of the plan, and
    nothing depends on which rank or worker reads.
    """

    shards: ShardSet
    """Holds the images."""
    config: DataConfig
    """How they are decoded and augmented, and `on_bad_image`."""

    def face(self, image: int, replaced: list[str] | None = None) -> Pixels:
        """Return a face as evaluation and mining see it, uint8 [image_px, image_px, C].

        Args:
            image: Its number.
            replaced: Where given, a line is added to it if another image stands in.

        Raises:
            ValueError: It can't be decoded, and nothing may stand in or no other image of the identity can be decoded.
        """
        config = self.config
        pixels = np.empty((config.image_px, config.image_px, config.channels), dtype=np.uint8)
        shown, problem = self._decode(self.shards.read(image), image, _UNCHANGED, None, pixels)
        if problem is not None and replaced is not None:
            replaced.append(f"{problem}; image {shown} stands in")
        return pixels

    def pairs(self, image_idx_n2: Ints, changes: Sequence[Augmentation], out_VnHWC: Pixels) -> list[str]:
        """Read pairs, changed as training wants them.

        A stand-in isn't the pair's other image, unless the identity has no third that can be decoded: then the pair
        shows one image twice.

        Args:
            image_idx_n2: int64 [n, 2]; anchor and positive of each pair.
            changes: [2 n]; what happens to each image, pair after pair.
            out_VnHWC: uint8 [2, n, image_px, image_px, C], where they are written to without a copy between.

        Returns:
            A line for each image that was replaced.

        Raises:
            ValueError: As `face`.
        """
        found, replaced = self.shards.read_all(image_idx_n2.ravel()), list[str]()
        for i, images in enumerate(image_idx_n2.tolist()):
            other = images[1]
            for view, image in enumerate(images):
                at = 2 * i + view
                shown, problem = self._decode(found[at], image, changes[at], other, out_VnHWC[view, i])
                if problem is not None:
                    replaced.append(f"{problem}; image {shown} stands in")
                other = shown
        return replaced

    def _decode(
        self, data: bytes, image: int, change: Augmentation, avoid: int | None, out: Pixels
    ) -> tuple[int, str | None]:
        """Write an image to `out`; returns which one it is, and why it isn't the one that was asked for."""
        try:
            decode_augmented(data, self.config, change, f"image {image}", out)
            return image, None
        except ValueError as error:
            # Looking up the shard's name for each image would take a tenth of the time to decode it.
            problem = f"{self.shards.where(image)}: {error}"
        if self.config.on_bad_image == "error":
            raise ValueError(problem)
        for candidate in self._stand_ins(image, avoid):
            data = self.shards.read(candidate)
            try:
                decode_augmented(data, self.config, change, f"image {candidate}", out)
                return candidate, problem
            except ValueError:
                continue
        raise ValueError(f"{problem}; nor can any other image of its identity be decoded")

    def _stand_ins(self, image: int, avoid: int | None) -> Iterator[int]:
        """Yield the identity's other images in a circle, the one to avoid at the end."""
        table = self.shards.table
        label = table.identity_of(image)
        first, end = (int(bound) for bound in table.first_image[label : label + 2])
        circle = [*range(image + 1, end), *range(first, image)]
        yield from (candidate for candidate in circle if candidate != avoid)
        yield from (candidate for candidate in circle if candidate == avoid)


def report_replaced(lines: Sequence[str], world: World) -> int:
    """Log the images of all ranks that were replaced, each once; returns their number. Every rank must call it."""
    # Over all ranks: every rank ends with the lines of all.
    everywhere = list(chain.from_iterable(world.all_gather_object(list(lines))))
    for line in sorted(set(everywhere)):
        log.warning(line)
    return len(everywhere)


_UNCHANGED = Augmentation()
