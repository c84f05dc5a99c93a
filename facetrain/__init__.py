"""Distributed training of face embeddings with the multi-class N-pair loss and hard negative class mining."""

__version__ = "0.1.0"
