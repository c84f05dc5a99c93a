"""FaceReader: faces by number as the network sees them, and what stands in for one that can't be decoded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from facetrain.config import DataConfig
from facetrain.data.decode import decode_augmented, decode_face
from facetrain.data.shards import ShardSet

Pixels = npt.NDArray[np.uint8]


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

    def face(self, image: int) -> Pixels:
        """Return a face as evaluation and mining see it, uint8 [image_px, image_px, C].

        Raises:
            ValueError: It can't be decoded, and nothing may stand in or no other image of the identity can be decoded.
        """
        return self._read(image, None, avoid=None)[0]

    def pair(self, images: Sequence[int], seeds: Sequence[int]) -> tuple[list[Pixels], list[str]]:
        """Return anchor and positive of one identity, augmented by their seeds.

        A stand-in isn't the pair's other image, unless the identity has no third that can be decoded: then the pair
        shows one image twice.

        Returns:
            uint8 [image_px, image_px, C] twice, and a line for each image that was replaced.

        Raises:
            ValueError: As `face`.
        """
        faces, replaced, other = list[Pixels](), list[str](), images[1]
        for image, seed in zip(images, seeds, strict=True):
            pixels, shown, problem = self._read(image, seed, avoid=other)
            faces.append(pixels)
            if problem is not None:
                replaced.append(f"{problem}; image {shown} stands in")
            other = shown
        return faces, replaced

    def _read(self, image: int, seed: int | None, avoid: int | None) -> tuple[Pixels, int, str | None]:
        """Return pixels, the image that they are of, and why it isn't the one that was asked for."""
        data = self.shards.read(image)
        try:
            return self._decode(data, image, seed), image, None
        except ValueError as error:
            # Looking up the shard's name for each image would take a tenth of the time to decode it.
            problem = f"{self.shards.where(image)}: {error}"
        if self.config.on_bad_image == "error":
            raise ValueError(problem)
        for candidate in self._stand_ins(image, avoid):
            data = self.shards.read(candidate)
            try:
                return self._decode(data, candidate, seed), candidate, problem
            except ValueError:
                continue
        raise ValueError(f"{problem}; nor can any other image of its identity be decoded")

    def _decode(self, data: bytes, image: int, seed: int | None) -> Pixels:
        name = f"image {image}"
        return decode_face(data, self.config, name) if seed is None else decode_augmented(data, self.config, seed, name)

    def _stand_ins(self, image: int, avoid: int | None) -> Iterator[int]:
        """Yield the identity's other images in a circle, the one to avoid at the end."""
        table = self.shards.table
        label = table.identity_of(image)
        first, end = (int(bound) for bound in table.first_image[label : label + 2])
        circle = [*range(image + 1, end), *range(first, image)]
        yield from (candidate for candidate in circle if candidate != avoid)
        yield from (candidate for candidate in circle if candidate == avoid)
