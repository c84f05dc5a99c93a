"""What is imported on the way to the first step, and what isn't: imports are most of a start."""

import json
import subprocess
import sys

# Each takes from half a second to some seconds to import, and nothing before the end of a run needs it.
HEAVY = (
    "mlflow",
    "pandas",
    "scipy",
    "matplotlib",
    "torchvision",
    "onnxruntime",
    "pyarrow",
    "faiss",
    "webdataset",
    "sklearn",
)
HEAVIER = ("torch", "numpy", "deepspeed", "cv2", "jsonargparse", "yaml", *HEAVY)


def imported_by(code: str, names: tuple[str, ...]) -> list[str]:
    """Which of the modules a new Python has after the code."""
    ending = f"\nimport json, sys\nprint('\\n' + json.dumps([name for name in {names!r} if sys.modules.get(name)]))"
    done = subprocess.run([sys.executable, "-c", code + ending], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_help_imports_nothing_heavy() -> None:
    assert imported_by("from facetrain.cli import main\nmain(['--help'])", HEAVIER) == []


def test_an_engine_that_takes_steps_imports_nothing_it_does_not_use_and_runs_no_compiler() -> None:
    code = """
import sys
started = []
sys.addaudithook(lambda event, args: started.append(str(args[0])) if event == "subprocess.Popen" else None)
import torch
import facetrain.train
from facetrain.config import TrainConfig
from facetrain.engine import Engine
from facetrain.world import start_world
with start_world("cpu", 60.0) as world:
    engine = Engine(torch.nn.Linear(4, 2), TrainConfig(), world, pairs_per_rank=2)
    engine.backward(engine(torch.ones(3, 4)).sum())
    engine.step(0.1)
assert all(program.endswith("ldconfig") for program in started), started
"""
    assert imported_by(code, HEAVY) == []
