"""Every shipped config holds together, before anybody spends a night on it."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import CONFIGS, run

from facetrain.command_line import config_yaml, load_config
from facetrain.config import Config
from facetrain.data.plan import pairs_per_rank
from facetrain.models import build_backbone

each_config = pytest.mark.parametrize("file", CONFIGS, ids=[file.stem for file in CONFIGS])

WORLD_SIZES = {"quickstart": (1, 2, 4, 8), "faces_cpu": (1, 2, 4, 8), "casia_npair320": (1, 2, 4, 8)}
RETRIEVAL = {"cub200_group", "cars196_group", "sop_group"}
WORLD_SIZES |= dict.fromkeys(RETRIEVAL, (1, 2))


def test_the_recipes_are_there() -> None:
    assert {file.stem for file in CONFIGS} == {
        "quickstart",
        "faces_cpu",
        "casia_npair320",
        "casia_iresnet50",
    } | RETRIEVAL


@each_config
def test_a_config_embeds_images_of_its_size(file: Path) -> None:
    config = load_config(file)
    model = replace(config.model, imagenet_weights=None)  # a file that the user brings
    backbone = build_backbone(model, channels=config.data.channels, image_px=config.data.image_px).eval()
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


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn people, 16 of 8 images each."""
    from facetrain.data.pack import pack
    from facetrain.data.synthetic import synthesize

    folder = tmp_path_factory.mktemp("configs")
    synthesize(folder / "faces", num_identities=16, images_per_identity=8, heldout_identities=20, workers=1)
    pack([folder / "faces" / "train"], folder / "shards", workers=1)
    return folder / "shards"


@pytest.mark.slow
@each_config
def test_a_config_trains_for_a_few_steps(file: Path, shards: Path, tmp_path: Path) -> None:
    few = {
        "run.dir": tmp_path / "run",
        "data.shards": shards,
        "data.shard_px": 112,
        "data.crop_px": "null",
        "data.crop_jitter_px": 4,
        "data.image_px": 48 if "iresnet" in file.stem else 64,
        "data.holdout_identities": 0,
        "data.exclude": "[]",
        "data.workers": 1,
        "model.imagenet_weights": "null",
        "mining.warmup_steps": 1,
        "mining.lag_steps": 4,
        "mining.batches_per_round": 1,
        "train.global_pairs": 8,
        "train.precision": "float32",  # the CPU takes longer for bfloat16, which test_train.py trains in
        "train.steps": 7,
        "train.log_every_steps": 3,
        "eval.every_steps": 0,
        "eval.at_start": "false",
        "eval.images": "[]",
        "eval.pairs": "null",
        "eval.open_set_people": "null",
        "tracking.backend": "none",
    }
    words = [word for key, value in few.items() for word in (f"--{key}", str(value))]
    launcher = (sys.executable, "-m", "facetrain.train", "--config", file)
    done = run(*launcher, *words, cwd=tmp_path, timeout_s=280)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "results.json").is_file()
