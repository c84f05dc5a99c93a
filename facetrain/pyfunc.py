"""What `mlflow.pyfunc.load_model` loads: faces as bytes in, embeddings out. MLflow calls `_load_pyfunc` by its name."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrain.embedder import Embedder, load


class FaceModel:
    """Embeds the column `image` of a table: image files as bytes."""

    def __init__(self, embedder: Embedder) -> None:
        """Take what embeds."""
        self.embedder = embedder

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> NDArray[np.float32]:
        """Embed a table's images, aligned faces each.

        Args:
            model_input: pandas.DataFrame with the column `image`.
            params: None are known.

        Returns:
            float32 [n, D], rows of unit length.

        Raises:
            ValueError: An image can't be read; the message says which row's.
        """
        return self.embedder.embed([bytes(image) for image in model_input["image"]])


def _load_pyfunc(path: str) -> FaceModel:
    return FaceModel(load(path))
