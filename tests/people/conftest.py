"""A run without training: enough for all that embeds."""

from pathlib import Path

import pytest
import torch

from facetrain.checkpoint.weights import save_weights
from facetrain.config import Config, DataConfig, ModelConfig
from facetrain.models import build_backbone


def make_run(folder: Path, *, seed: int = 0, data: DataConfig | None = None, norm: str = "batch") -> Path:
    """Write a small network with weights of a seed."""
    data = data or DataConfig(image_px=40)
    config = Config(data=data, model=ModelConfig(name="casianet", embedding_dim=16, norm=norm))  # type: ignore[arg-type]
    torch.manual_seed(seed)
    backbone = build_backbone(config.model, channels=data.channels, image_px=data.image_px)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(dict(backbone.state_dict()), config, folder)
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))
