"""A picture of pictures: faces of some identities, side by side, for a person to look at."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from facetrain.data.decode import read_image
from facetrain.data.shards import ShardSet

CELL_PX = 96
"""Side of a face on the sheet, in pixels."""

_COLUMNS, _MAX_FACES = 12, 6
_GAP_PX, _CAPTION_PX = 4, 34
_WIDTH_PX = _COLUMNS * (CELL_PX + 2 * _GAP_PX)
_TEXT_SCALE = 0.4

_Picture = npt.NDArray[np.uint8]
"""uint8 [height, width, 3], RGB."""


def save_contact_sheet(shards: ShardSet, path: Path, *, rows: int = 9, seed: int = 0) -> None:
    """Write a JPEG with up to six faces of as many identities as fit.

    Args:
        shards: The set.
        path: The file.
        rows: Rows of the sheet; fewer where all identities fit into fewer.
        seed: Seed of the identities' draw.

    Raises:
        ValueError: An image can't be decoded; the message names it.
    """
    done, row = list[_Picture](), list[_Picture]()
    for label in np.random.default_rng(seed).permutation(shards.table.num_identities).tolist():
        block = _block(shards, label)
        if sum(other.shape[1] for other in (*row, block)) > _WIDTH_PX:
            done.append(_side_by_side(row))
            row = []
            if len(done) == rows:
                break
        row.append(block)
    margin = (2 * _GAP_PX, 2 * _GAP_PX)
    sheet = np.pad(
        np.vstack([*done, _side_by_side(row)] if row else done), (margin, margin, (0, 0)), constant_values=255
    )
    data = cv2.imencode(".jpg", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
    path.write_bytes(data.tobytes())


def _block(shards: ShardSet, label: int) -> _Picture:
    """Draw name, number of images and first faces of an identity."""
    first, end = shards.table.first_image[label : label + 2].tolist()
    num_faces = min(end - first, _MAX_FACES)
    block = _white(_CAPTION_PX + CELL_PX + 2 * _GAP_PX, num_faces * (CELL_PX + _GAP_PX) + 2 * _GAP_PX)
    _write(block, shards.table.names[label], 14)
    more = f", first {num_faces}" if end - first > num_faces else ""
    _write(block, f"{end - first} image{'s' if end > first + 1 else ''}{more}", 29)
    for column, image in enumerate(range(first, first + num_faces)):
        face = read_image(shards.read(image), cv2.IMREAD_COLOR_RGB, shards.where(image))
        left = column * (CELL_PX + _GAP_PX)
        small = cv2.resize(face, (CELL_PX, CELL_PX), interpolation=cv2.INTER_AREA)
        block[_CAPTION_PX : _CAPTION_PX + CELL_PX, left : left + CELL_PX] = small
    return block


def _side_by_side(blocks: list[_Picture]) -> _Picture:
    row = _white(blocks[0].shape[0], _WIDTH_PX)
    joined = np.hstack(blocks)
    row[:, : joined.shape[1]] = joined
    return row


def _white(height: int, width: int) -> _Picture:
    return np.full((height, width, 3), 255, np.uint8)


def _write(block: Any, text: str, y_px: int) -> None:
    """Write a line above the faces; OpenCV 4 has no letters beyond ASCII, and what is too long is cut."""
    text = text.encode("ascii", "replace").decode()
    while _width_px(text) > block.shape[1] - 2 * _GAP_PX:
        text = text.removesuffix("..")[:-1] + ".."
    cv2.putText(block, text, (0, y_px), cv2.FONT_HERSHEY_SIMPLEX, _TEXT_SCALE, (0, 0, 0), 1, cv2.LINE_AA)


def _width_px(text: str) -> int:
    return int(cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, _TEXT_SCALE, 1)[0][0])
