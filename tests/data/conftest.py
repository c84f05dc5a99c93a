"""Fixtures of the data tests."""

from pathlib import Path

import pytest
from drawn_faces import FaceFolder, write_faces


@pytest.fixture
def face_folder(tmp_path: Path) -> FaceFolder:
    """Makes a folder of identities with so many images each, 112x112 JPEG."""
    return lambda counts: write_faces(tmp_path / "faces", counts)
