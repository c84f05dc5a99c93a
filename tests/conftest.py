"""What all tests share: real faces where they are at hand, and the reason why a test of a GPU is left out."""

import os
from pathlib import Path

import pytest

# As in tests/run.sh, and before torch is imported: what is forked from a process with OpenMP threads hangs in torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch


@pytest.hookimpl(tryfirst=True)  # before xdist looks for groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("cluster"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))  # a file's one after another: they share servers
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))
    items.sort(key=lambda item: not (item.get_closest_marker("slow") or item.get_closest_marker("long")))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws from torch's own generator is the same each time, so that a failure repeats."""
    torch.manual_seed(0)


@pytest.fixture
def face_data() -> Path:
    """Folder of real faces and LFW's lists."""
    if "FACETRAIN_DATA" not in os.environ:
        pytest.skip("FACETRAIN_DATA is not set")
    folder = Path(os.environ["FACETRAIN_DATA"]).absolute()
    assert folder.is_dir(), f"FACETRAIN_DATA: {folder} is no folder"
    return folder


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with drawn people in faces/ (48 to train on, 24 to evaluate on) and their shards/."""
    from facetrain.data.pack import pack
    from facetrain.data.synthetic import synthesize

    folder = tmp_path_factory.mktemp("synthetic")
    synthesize(folder / "faces", num_identities=48, images_per_identity=4, heldout_identities=24, workers=1)
    pack([folder / "faces" / "train"], folder / "shards", workers=1)
    return folder
