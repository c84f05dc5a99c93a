"""Every shipped config holds together, before anybody spends a night on it."""

from pathlib import Path

import pytest
import torch
from commands import CONFIGS

from facetrain.command_line import config_yaml, load_config
from facetrain.config import Config
from facetrain.data.plan import pairs_per_rank
from facetrain.models import build_backbone

each_config = pytest.mark.parametrize("file", CONFIGS, ids=[file.stem for file in CONFIGS])

WORLD_SIZES = {"quickstart": (1, 2, 4, 8), "faces_cpu": (1, 2, 4, 8), "casia_npair320": (1, 2, 4, 8)}


def test_the_recipes_are_there() -> None:
    assert {file.stem for file in CONFIGS} == {"quickstart", "faces_cpu", "casia_npair320", "casia_iresnet50"}


@each_config
def test_a_config_embeds_images_of_its_size(file: Path) -> None:
    config = load_config(file)
    backbone = build_backbone(config.model, channels=config.data.channels, image_px=config.data.image_px).eval()
    with torch.no_grad():
        embeddings_BD = backbone(torch.zeros(2, config.data.channels, config.data.image_px, config.data.image_px))
    assert embeddings_BD.shape == (2, backbone.embedding_dim)


@each_config
def test_a_config_divides_among_the_processes_it_is_for(file: Path) -> None:
    for world_size in WORLD_SIZES.get(file.stem, (8,)):
        pairs_per_rank(load_config(file).train.global_pairs, world_size)


@each_config
def test_a_config_mines_and_drops_within_its_steps(file: Path) -> None:
    config = load_config(file)
    assert config.mining.warmup_steps + config.mining.lag_steps + config.mining.batches_per_round < config.train.steps
    assert all(config.train.warmup_steps < step < config.train.steps for step in config.train.drop_steps)
    assert config.mining.candidates >= config.train.global_pairs


@each_config
def test_a_configs_head_says_command_hardware_and_expectation(file: Path) -> None:
    head = [line for line in file.read_text().splitlines() if line.startswith("#")]
    for word in ("# Command:", "# Hardware:", "# Expected:"):
        assert any(line.startswith(word) for line in head)
    assert any(f"configs/{file.name}" in line or "quickstart.sh" in line for line in head)


@each_config
def test_a_resolved_config_reads_back(file: Path, tmp_path: Path) -> None:
    config = load_config(file)
    (tmp_path / "config.yaml").write_text(config_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config != Config()


@pytest.mark.parametrize("name", ["casia_npair320", "casia_iresnet50"])
def test_people_of_lfw_are_left_out_of_casia(name: str) -> None:
    excluded = load_config(next(file for file in CONFIGS if file.stem == name)).data.exclude
    assert set(excluded) == {"0166921", "1056413", "1193098"}


def test_the_papers_recipe_is_the_papers() -> None:
    config = load_config(next(file for file in CONFIGS if file.stem == "casia_npair320"))
    assert (config.model.name, config.loss.name, config.train.global_pairs) == ("casianet", "npair-mc", 320)
    assert (config.train.steps, config.train.drop_steps) == (240_000, (160_000, 200_000))
    assert config.mining.mode == "gathered"
