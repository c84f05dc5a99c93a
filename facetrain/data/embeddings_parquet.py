"""Embeddings as Parquet, for tools that read tables."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def check_parquet(file: Path) -> None:
    """Raise ValueError, naming the file, where Parquet can't be written here."""
    try:
        import pyarrow  # noqa: F401 - asked for before hours of work, not after
    except ImportError:
        raise ValueError(f"{file}: Parquet needs pyarrow: pip install 'facetrain[parquet]'") from None


def write_embeddings_parquet(file: Path, names: Sequence[str], embeddings: NDArray[np.float32]) -> None:
    """Write the columns `name`, text, and `embedding`, a list of D float32 a row."""
    import pyarrow
    from pyarrow import parquet

    flat = pyarrow.array(np.ascontiguousarray(embeddings).reshape(-1))
    column = pyarrow.FixedSizeListArray.from_arrays(flat, embeddings.shape[1])
    parquet.write_table(pyarrow.table({"name": list(names), "embedding": column}), file)
