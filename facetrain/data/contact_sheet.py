"""A picture of pictures: some identities of the shards, a row each, for a person to look at."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from facetrain.data.decode import decode_photograph
from facetrain.data.shards import ShardSet

CELL_PX = 96
"""Side of a face on the sheet, in pixels."""
_GAP_PX = 4
_CAPTION_PX = 150
_TEXT_SCALE = 0.4


def save_contact_sheet(shards: ShardSet, path: Path, *, rows: int = 12, columns: int = 8, seed: int = 0) -> None:
    """Write a JPEG or PNG with some images of some identities.

    Args:
        shards: The set.
        path: The file; its suffix is its form.
        rows: Identities, drawn by the seed; all where there are fewer.
        columns: Images of each, the first ones.
        seed: Seed of the draw.

    Raises:
        ValueError: An image can't be decoded; the message names it.
    """
    table = shards.table
    drawn = np.random.default_rng(seed).permutation(table.num_identities)[:rows]
    sheet = np.vstack([_row(shards, int(label), columns) for label in np.sort(drawn)])
    data = cv2.imencode(path.suffix, cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
    path.write_bytes(data.tobytes())


def _row(shards: ShardSet, label: int, columns: int) -> npt.NDArray[np.uint8]:
    first, end = shards.table.first_image[label : label + 2].tolist()
    row: Any = np.full((CELL_PX + 2 * _GAP_PX, _CAPTION_PX + columns * (CELL_PX + _GAP_PX), 3), 255, np.uint8)
    _write(row, shards.table.names[label], 0.45)
    _write(row, f"{end - first} image{'s' if end > first + 1 else ''}", 0.62)
    for column, image in enumerate(range(first, min(end, first + columns))):
        face = decode_photograph(shards.read(image), shards.where(image))
        left = _CAPTION_PX + column * (CELL_PX + _GAP_PX)
        row[_GAP_PX : _GAP_PX + CELL_PX, left : left + CELL_PX] = cv2.resize(
            face, (CELL_PX, CELL_PX), interpolation=cv2.INTER_AREA
        )
    return row  # type: ignore[no-any-return]


def _write(row: Any, text: str, height: float) -> None:
    """Write a line beside the faces; OpenCV has no letters beyond ASCII, and what is too long is cut."""
    text = text.encode("ascii", "replace").decode()
    while _width_px(text) > _CAPTION_PX - 2 * _GAP_PX:
        text = text.removesuffix("..")[:-1] + ".."
    place = (_GAP_PX, round(height * row.shape[0]))
    cv2.putText(row, text, place, cv2.FONT_HERSHEY_SIMPLEX, _TEXT_SCALE, (0, 0, 0), 1, cv2.LINE_AA)


def _width_px(text: str) -> int:
    return int(cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, _TEXT_SCALE, 1)[0][0])
