"""What all tests share: real faces where they are at hand, and the reason why a test of a GPU is left out."""

import os
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


@pytest.fixture
def face_data() -> Path:
    """Folder of real faces and LFW's lists."""
    if "FACETRAIN_DATA" not in os.environ:
        pytest.skip("FACETRAIN_DATA is not set")
    folder = Path(os.environ["FACETRAIN_DATA"])
    assert folder.is_dir(), f"FACETRAIN_DATA: {folder} is no folder"
    return folder
