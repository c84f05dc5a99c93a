"""Embeddings in .npz files, and the checks before their arrays are used."""

import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NETWORK_ENTRY = "network_sha256"
"""What an .npz of embeddings may hold beside them: the checksum of the weights."""

_DAMAGED_NPZ = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, AttributeError, TypeError),
    *(NotImplementedError, RuntimeError, MemoryError, OverflowError),
)
"""What zipfile and numpy were seen to raise, or say they do, for files that aren't what they seem."""


def load_embeddings_npz(path: Path) -> tuple[tuple[str, ...], NDArray[np.float32]]:
    """Read `names` and `embeddings` from an .npz file; nothing in it is ever unpickled.

    Returns:
        The image names, and the embeddings as float32 [n, D] (float16 and float64 are converted).

    Raises:
        ValueError: not an npz, truncated, a key missing, arrays of other types and shapes, or a name that stands twice.
    """
    arrays = read_npz(path, ("names", "embeddings"))
    names, embeddings = arrays["names"], arrays["embeddings"]
    if names.dtype.kind != "U" or names.ndim != 1:
        raise ValueError(f"{path}: expected 'names' to be a list of strings, got {names.dtype} {names.shape}")
    if embeddings.dtype.kind != "f" or embeddings.ndim != 2 or len(embeddings) != len(names):
        expected = f"floats [{len(names)}, D], one row a name"
        raise ValueError(f"{path}: expected 'embeddings' to be {expected}, got {embeddings.dtype} {embeddings.shape}")
    distinct, first = np.unique(names, return_index=True)
    if len(distinct) < len(names):
        twice = names[np.setdiff1d(np.arange(len(names)), first)[0]]
        raise ValueError(f"{path}: expected every image once, {twice} stands twice")
    return tuple(names.tolist()), embeddings.astype(np.float32)


def network_of_embeddings(path: Path) -> str:
    """Return the checksum of the weights that made an .npz of embeddings; empty where the file doesn't say.

    Raises:
        ValueError: not an npz, or damaged; the message names the file.
    """
    return str(read_npz(path, (), optional=(NETWORK_ENTRY,)).get(NETWORK_ENTRY, ""))


def read_npz(path: Path, keys: Sequence[str], *, optional: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
    """Read arrays from an .npz file, and the optional ones that it holds; nothing in it is ever unpickled.

    Raises:
        ValueError: not an npz, damaged, or a key missing; the message names the file.
        OSError: the file can't be opened.
    """
    with open(path, "rb") as stream:
        if not zipfile.is_zipfile(stream):
            raise ValueError(f"{path}: not an .npz file, or truncated")
        stream.seek(0)
        try:
            with np.load(stream, allow_pickle=False) as file:
                return {key: file[key] for key in (*keys, *(key for key in optional if key in file.files))}
        except KeyError as error:
            expected = " and ".join(f"'{key}'" for key in keys)
            raise ValueError(f"{path}: expected the arrays {expected}; {error.args[0]}") from None
        except _DAMAGED_NPZ as error:
            hint = " (rows whose widths differ are stored as objects)" if "Object arrays" in str(error) else ""
            raise ValueError(f"{path}: not a readable .npz file: {error}{hint}") from None
