"""train.profile_steps: what it says adds up, and it changes nothing of the training."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from distributed.ranks import run_ranks
from safetensors.torch import load_file

from facetrain.config import Config, DataConfig, EvalConfig, ModelConfig, RunConfig, TrackingConfig, TrainConfig
from facetrain.estimate.network import measure_passes
from facetrain.inputs import open_inputs
from facetrain.run_folder import claim_run_folder
from facetrain.train import Run
from facetrain.watch.flops import matmul_flops_per_s, training_flops_per_image
from facetrain.watch.health import slow_precision_warning
from facetrain.watch.phases import PhaseClock
from facetrain.watch.profile import PHASES, StepProfile, StepShares
from facetrain.world import World

pytestmark = pytest.mark.xdist_group("profile")  # the runs are made once

CASES = {
    "plain": {},
    "profiled": {"profile_steps": "2:8"},
    "ZeRO 1 in chunks": {"profile_steps": "2:8", "zero_stage": 1, "micro_pairs": 2},
}


def go(world, shards, folder):
    """Run each case on these ranks, in one process group: DeepSpeed takes no second one."""
    for name, settings in CASES.items():
        config = Config(
            run=RunConfig(dir=f"{folder}/{name}", device="cpu"),
            data=DataConfig(shards=shards, image_px=16, workers=0),
            train=TrainConfig(global_pairs=8, steps=8, log_every_steps=2, **settings),
            eval=EvalConfig(at_start=False),
            tracking=TrackingConfig(backend="none"),
        )
        inputs = open_inputs(config, world_size=world.world_size)
        with claim_run_folder(config, world) as run_folder:
            Run(config, inputs, run_folder, world).go()


@pytest.fixture(scope="module")
def runs(synthetic, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    run_ranks(go, 2, str(synthetic / "shards"), str(folder), timeout_s=280)
    return folder


@pytest.mark.slow
def test_a_profile_changes_no_bit(runs):
    plain, profiled = (load_file(runs / name / "model.safetensors") for name in ("plain", "profiled"))
    assert all(torch.equal(profiled[name], plain[name]) for name in plain)
    assert not (runs / "plain" / "profile").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["profiled", "ZeRO 1 in chunks"])
def test_the_phases_add_up_and_are_on_one_screen(runs, name):
    found = json.loads((runs / name / "profile" / "profile.json").read_text())
    assert found["steps"] == 3  # the other three are traced
    assert sum(found["phases_s"].values()) == pytest.approx(found["step_s"])
    assert list(found["phases_s"]) == list(PHASES)
    assert all(seconds > 0 for seconds in found["phases_s"].values())
    assert all(found["slowest_s"][phase] >= seconds for phase, seconds in found["phases_s"].items())
    assert found["mfu"] == pytest.approx(found["flops_per_s"] / found["peak_flops_per_s"])
    records = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    assert [record["train/mfu"] for record in records if "train/mfu" in record] == [found["mfu"]]
    lines = (runs / name / "profile" / "profile.txt").read_text().splitlines()
    assert len(lines) <= 24
    assert all(len(line) <= 100 for line in lines)


@pytest.mark.slow
def test_the_trace_holds_the_last_steps(runs):
    with gzip.open(runs / "profiled" / "profile" / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    steps = [event for event in events if event.get("name", "").startswith("Optimizer.step")]
    assert len(steps) == 3


def test_a_profile_that_can_not_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").touch()  # where its folder would be
    profile = object.__new__(StepProfile)  # without a network, which it doesn't look at any more
    profile.config, profile.steps, profile.world = Config(run=RunConfig(dir=str(tmp_path))), range(2, 8), World()
    seconds = dict.fromkeys(PHASES, 0.1)
    profile._write(StepShares(3, 1.0, seconds, seconds, 8.0, 1e9, 1e10))
    profile.clock, profile._num_timed = PhaseClock(torch.device("cpu")), 3
    profile._trace = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    profile._trace.start()
    profile.before(8)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [warning.partition(" (")[0] for warning in warnings] == [
        f"{tmp_path / 'profile'}: the profile can't be written",
        f"{tmp_path / 'profile' / 'trace.json.gz'}: the trace can't be written",
    ]


def test_moments_are_taken_only_while_the_clock_is_on() -> None:
    clock = PhaseClock(torch.device("cpu"))
    clock.mark("forward")
    clock.is_on = True
    assert clock.seconds() == {}
    for phase in ("between", "forward", "loss", "forward"):
        clock.mark(phase)
    assert set(clock.seconds()) == {"forward", "loss"}
    assert clock.seconds() == {}


@pytest.mark.parametrize("network", ["casianet", "iresnet18"])
def test_operations_of_training_are_those_of_the_estimate(network: str) -> None:
    model, data = ModelConfig(name=network), DataConfig(image_px=32)
    passes = measure_passes(model, data, "float32", images=4)
    expected = (passes.forward.flops.sum() + passes.backward.flops.sum()) / 4
    assert training_flops_per_image(model, data) == pytest.approx(expected, rel=1e-6)


def test_an_iresnet50_takes_about_38_gflop_an_image() -> None:
    flops = training_flops_per_image(ModelConfig(name="iresnet50"), DataConfig(image_px=112))
    assert flops == pytest.approx(38e9, rel=0.02)


def test_the_peak_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    assert matmul_flops_per_s(torch.device("cpu"), "float32") > 1e8
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("text", ["10", "3:4", "5:99", "-1:4", "a:b", "8:4", "1:2:3", ""])
def test_wrong_steps_are_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"train\.profile_steps: expected A:B.*up to train\.steps = 20") as error:
        TrainConfig(steps=20, profile_steps=text)
    assert "\n" not in str(error.value)
    assert f"'{text}'" in str(error.value)


@pytest.mark.parametrize(
    ("cpu", "is_slow"),
    [
        ("vendor_id : GenuineIntel\nflags : fpu avx512_bf16 amx_bf16 amx_tile", False),
        ("vendor_id : GenuineIntel\nflags : fpu avx512_bf16", True),
        ("vendor_id : AuthenticAMD\nflags : fpu avx512_bf16", False),
        ("Features : fp asimd svebf16 bf16", False),
        ("vendor_id : AuthenticAMD\nflags : fpu avx2", True),
    ],
)
def test_bfloat16_is_doubted_on_slow_cpus_alone(tmp_path: Path, cpu: str, is_slow: bool) -> None:
    (tmp_path / "cpuinfo").write_text(cpu)
    warning = slow_precision_warning("bfloat16", torch.device("cpu"), cpu_file=tmp_path / "cpuinfo")
    assert (warning is not None) == is_slow
    assert slow_precision_warning("float32", torch.device("cpu"), cpu_file=tmp_path / "cpuinfo") is None
    assert slow_precision_warning("bfloat16", torch.device("cuda"), cpu_file=tmp_path / "cpuinfo") is None
