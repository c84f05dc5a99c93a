"""Embeddings as Parquet, for tools that read tables."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def check_parquet(file: Path) -> None:
    """Raise ValueError, naming the file, where Parquet can't be written here."""
    try:
        import pyarrow  # noqa: F401 - asked for before hours of work, not after
    except ImportError:
        raise ValueError(f"{file}: Parquet needs pyarrow: pip install 'facetrain[parquet]'") from None


def write_embeddings_parquet(file: Path, names: Sequence[str], blocks: Iterable[NDArray[np.float32]]) -> None:
    """Write the columns `name`, text, and `embedding`, a list of D float32 a row, with one block in memory at a time.

    Args:
        file: The file.
        names: [n], of all embeddings.
        blocks: One or more, float32 [., D], together [n, D].
    """
    import pyarrow
    from pyarrow import parquet

    writer, first = None, 0
    try:
        for block in blocks:
            flat = pyarrow.array(np.ascontiguousarray(block).reshape(-1))
            column = pyarrow.FixedSizeListArray.from_arrays(flat, block.shape[1])
            table = pyarrow.table({"name": list(names[first : first + len(block)]), "embedding": column})
            writer = writer or parquet.ParquetWriter(file, table.schema)
            writer.write_table(table)
            first += len(block)
    finally:
        if writer:
            writer.close()
