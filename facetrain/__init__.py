"""Distributed training of face embeddings with the multi-class N-pair loss and hard negative class mining."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from facetrain.embedder import Embedder, load

__version__ = "0.1.0"
__all__ = ["Embedder", "load"]


def __getattr__(name: str) -> Any:
    """Import the Python interface when it is first asked for: it takes torch, which no command's help needs."""
    if name in __all__:
        return getattr(importlib.import_module("facetrain.embedder"), name)
    raise AttributeError(f"module 'facetrain' has no attribute {name!r}")
