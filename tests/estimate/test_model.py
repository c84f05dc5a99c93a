"""The estimate of a whole run, and the command that prints it."""

import dataclasses
import json
from pathlib import Path

import pytest
from commands import CONFIG, CONFIGS

from facetrain.cli import main
from facetrain.command_line import load_config
from facetrain.config import Config, DataConfig, LossConfig, MiningConfig, ModelConfig, TrainConfig
from facetrain.estimate.cluster import Cluster
from facetrain.estimate.model import estimate, largest_fitting_micro_pairs

SMALL = Config(
    data=DataConfig(image_px=32, colour="grey"),
    model=ModelConfig(name="casianet"),
    mining=MiningConfig(mode="gathered", candidates=8192),
    train=TrainConfig(global_pairs=4096, precision="bfloat16"),
)


def with_train(config: Config, **changes) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


@pytest.mark.long
def test_every_shipped_config_can_be_estimated() -> None:
    for config in map(load_config, CONFIGS):
        found = estimate(config, Cluster(gpus_per_node=2), identities=10_000)
        assert found.images_per_s > 0
        assert found.seconds[found.bottleneck] == max(found.seconds.values())


def test_more_gpus_share_the_class_vectors_and_a_library_is_not_estimated() -> None:
    softmax = dataclasses.replace(SMALL, loss=LossConfig(name="softmax"), mining=MiningConfig())
    one, eight = (estimate(softmax, Cluster(gpus_per_node=W), identities=80_000).memory for W in (1, 8))
    assert one.kept["class vectors"] == 4 * 80_000 * 320 == 8 * eight.kept["class vectors"]
    with pytest.raises(ValueError, match=r"^loss\.name: estimated are .* 'triplet'"):
        estimate(dataclasses.replace(softmax, loss=LossConfig(name="triplet")), Cluster(), identities=80_000)


def test_slow_links_make_the_exchange_the_bottleneck_and_slow_decoders_the_images() -> None:
    unmined = dataclasses.replace(SMALL, mining=MiningConfig())
    fast = estimate(unmined, Cluster(nodes=2, decode_images_per_s=1e6), identities=10_000)
    assert fast.bottleneck == "network"
    slow_links = Cluster(nodes=2, decode_images_per_s=1e6, link_gb_per_s=0.1)
    assert estimate(unmined, slow_links, identities=10_000).bottleneck == "gradients"
    slow_decoders = Cluster(nodes=2, decode_images_per_s=300)
    found = estimate(unmined, slow_decoders, identities=10_000)
    assert found.bottleneck == "waiting for images"
    assert found.images_per_s == pytest.approx(16 * 300)


def test_chunks_take_less_memory_and_one_more_forward() -> None:
    cluster = Cluster(kernel_us=1e-3)  # small launches, or they bound small chunks
    whole = estimate(SMALL, cluster, identities=10_000)
    chunked = estimate(with_train(SMALL, micro_pairs=64), cluster, identities=10_000)
    assert chunked.memory.in_step["activations"] < whole.memory.in_step["activations"] / 7
    assert 1.2 < chunked.seconds["network"] / whole.seconds["network"] < 1.5


def test_zero_shards_the_optimizer_and_pays_with_traffic() -> None:
    plain, sharded = (
        estimate(with_train(SMALL, zero_stage=stage), Cluster(nodes=2), identities=10_000) for stage in (0, 1)
    )
    assert sharded.memory.kept["optimizer state"] < plain.memory.kept["optimizer state"] / 15
    sent = [sum(c.calls_per_step * c.sent_bytes(16) for c in found.collectives) for found in (plain, sharded)]
    assert sent[1] > sent[0]


def test_what_does_not_fit_is_given_chunks_that_do() -> None:
    small_gpu = Cluster(gpu_memory_gb=1.0, gpu_runtime_gb=0.2)
    assert not estimate(SMALL, small_gpu, identities=10_000).fits
    micro_pairs = largest_fitting_micro_pairs(SMALL, small_gpu, identities=10_000)
    assert micro_pairs is not None
    assert estimate(with_train(SMALL, micro_pairs=micro_pairs), small_gpu, identities=10_000).fits
    assert not estimate(with_train(SMALL, micro_pairs=2 * micro_pairs), small_gpu, identities=10_000).fits
    nothing = Cluster(gpu_memory_gb=0.01, gpu_runtime_gb=0)
    assert largest_fitting_micro_pairs(SMALL, nothing, identities=10_000) is None


def test_the_command_prints_one_screen_and_writes_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "estimate.json"
    config = ("--config", str(CONFIG))
    cluster = ("--nodes", "2", "--gpus-per-node", "4", "--link-gb-per-s", "25")
    main(["estimate", *config, *cluster, "--train.global_pairs", "1024", "--json", str(file)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 45
    assert max(len(line) for line in lines) <= 100
    assert "2 x 4 GPUs: 1024 pairs a step, 128 on each" in lines[0]
    assert "images/s" in lines[-1]
    record = json.loads(file.read_text())
    assert record["cluster"]["link_gb_per_s"] == 25
    assert record["config"]["train.global_pairs"] == 1024
    assert sum(record["seconds"].values()) == pytest.approx(record["step_s"])
    assert f"{record['images_per_s']:,.0f} images/s" in lines[-1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--nodes", "0"], ["--nodes", "0"]),
        (["--gpus-per-node", "many"], ["gpus_per_node", "many"]),
        (["--link-gb-per-s", "-1"], ["--link-gb-per-s", "-1"]),
        (["--nodez", "2"], ["nodez"]),
        (["--train.global_pairs", "30"], ["train.global_pairs", "30", "8"]),
        (["--loss.name", "lifted"], ["loss.name", "pytorch-metric-learning", "lifted"]),
        (["--train.micro_pairs", "3"], ["train.micro_pairs", "16", "3"]),
        (["--identities", "100"], ["--identities", "128 or more", "100"]),
        (["--mining.mode", "quota", "--mining.virtual_nodes", "4"], ["mining.virtual_nodes", "8 processes", "4"]),
    ],
)
def test_a_users_error_is_one_line(words: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["estimate", *words])
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for word in expected:
        assert word in err
