"""Where each image lies in its tar, in 2.5 bytes an image that all processes of a node map into memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from facetrain.data.index import BLOCK_BYTES, load_array, row_of

GROUP_IMAGES = 16
"""Images of a row of the index: their lengths, and the blocks of all images before them."""


class Place(NamedTuple):
    """Where an image lies."""

    shard: int
    """Number of its shard."""
    offset_bytes: int
    """Where its data starts in the tar."""
    size_bytes: int
    """Length of its data."""


class ImagePlaces:
    """The index of all shards.

    A shard is a row of members, each of them a header of one block and the image's data in whole blocks. So lengths
    alone say where images lie, and a sum at every 16th image makes that quick.
    """

    def __init__(self, groups: npt.NDArray[Any], images_of_shards: Sequence[int]) -> None:
        """Take the index of shards that hold so many images.

        Args:
            groups: As `group_sizes` returns it.
            images_of_shards: Images of each shard.
        """
        self._first_block, self._sizes = groups["first_block"], groups["size_bytes"]
        self._first_image: list[int] = np.cumsum([0, *images_of_shards]).tolist()
        self.num_images = self._first_image[-1]
        """Images of all shards."""
        padding = -self.num_images % GROUP_IMAGES
        if len(groups) * GROUP_IMAGES != self.num_images + padding or padding != int((self._sizes[-1] == 0).sum()):
            raise ValueError(f"expected the places of {self.num_images} images")
        self._start_block = [self._blocks_before(image) for image in self._first_image[:-1]]

    @classmethod
    def load(cls, path: Path, images_of_shards: Sequence[int]) -> "ImagePlaces":
        """Map an index into memory.

        Raises:
            ValueError: The file is missing, is no index, or is one of other shards.
        """
        array = load_array(path)
        if array.dtype == np.uint32 and array.ndim == 2:
            # First block and length of each image, as earlier versions wrote them: correct, but not shared.
            array = group_sizes(array[:, 1])
        if array.dtype.names != ("first_block", "size_bytes") or array.ndim != 1 or not len(array):
            raise ValueError(f"{path}: damaged index file; `facetrain pack`, run again, repairs it")
        try:
            return cls(array, images_of_shards)
        except ValueError as error:
            raise ValueError(
                f"{path}: index and manifest differ: {error}; `facetrain pack`, run again, repairs it"
            ) from None

    def locate(self, image: int) -> Place:
        """Return where an image lies, 0 to num_images - 1."""
        shard = row_of(self._first_image, image)
        blocks = self._blocks_before(image) - self._start_block[shard]
        size_bytes = self._sizes[image // GROUP_IMAGES, image % GROUP_IMAGES].item()
        return Place(shard, (blocks + 1) * BLOCK_BYTES, size_bytes)

    def locate_all(self, images: npt.NDArray[np.int64]) -> list[Place]:
        """Return where each of many images lies, in a fraction of the time that `locate` takes for each."""
        group, k = np.divmod(images, GROUP_IMAGES)
        sizes = self._sizes[group].astype(np.int64)
        blocks = (sizes + 2 * BLOCK_BYTES - 1) // BLOCK_BYTES * (np.arange(GROUP_IMAGES) < k[:, None])
        shard = np.searchsorted(self._first_image, images, side="right") - 1
        start = self._first_block[group] + blocks.sum(axis=1) - np.asarray(self._start_block)[shard]
        own = np.take_along_axis(sizes, k[:, None], axis=1)[:, 0]
        columns = (shard.tolist(), ((start + 1) * BLOCK_BYTES).tolist(), own.tolist())
        return [Place(*row) for row in zip(*columns, strict=True)]

    def shard_of(self, image: int) -> int:
        """Return the number of the shard that holds an image."""
        return row_of(self._first_image, image)

    def images_of(self, shard: int) -> range:
        """Return the images of a shard."""
        return range(self._first_image[shard], self._first_image[shard + 1])

    def size_bytes(self) -> npt.NDArray[np.int64]:
        """Return the length of every image, [images]."""
        return self._sizes.reshape(-1)[: self.num_images].astype(np.int64)

    def _blocks_before(self, image: int) -> int:
        """Return the blocks of all images before this one, over all shards, without what ends each tar."""
        group, k = divmod(image, GROUP_IMAGES)
        blocks: int = self._first_block[group].item()
        for size_bytes in self._sizes[group, :k].tolist():
            blocks += (size_bytes + 2 * BLOCK_BYTES - 1) // BLOCK_BYTES  # its header's, and its own, rounded up
        return blocks


def group_sizes(size_bytes: npt.NDArray[np.integer[Any]]) -> npt.NDArray[Any]:
    """Return the index of images of these lengths, shard after shard.

    Returns:
        [rows], `size_bytes`, 16 unsigned numbers of 2 bytes (4 where an image has 64 KiB or more), and `first_block`,
        int64: the blocks of all images before the row's first, headers included.
    """
    kind = np.uint16 if int(size_bytes.max()) < 1 << 16 else np.uint32
    padded = np.zeros((-(-len(size_bytes) // GROUP_IMAGES), GROUP_IMAGES), dtype=np.int64)
    padded.reshape(-1)[: len(size_bytes)] = size_bytes
    groups = np.zeros(len(padded), dtype=[("first_block", np.int64), ("size_bytes", kind, (GROUP_IMAGES,))])
    groups["size_bytes"] = padded
    blocks = ((padded + 2 * BLOCK_BYTES - 1) // BLOCK_BYTES).sum(axis=1)
    groups["first_block"][1:] = np.cumsum(blocks)[:-1]
    return groups
