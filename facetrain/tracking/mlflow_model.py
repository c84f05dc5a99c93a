"""A run's network in MLflow's pyfunc form, with its code, its requirements, a signature and an example."""

import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np

import facetrain
from facetrain.data.synthetic import draw_somebody
from facetrain.masking import mask_secrets

MODEL_NAME = "model"
"""Folder of the model among the artifacts of MLflow's run."""
_REQUIREMENTS = (
    *("torch", "torchvision", "numpy", "opencv-python-headless", "safetensors", "jsonargparse", "docstring-parser"),
    *("typeshed-client", "tqdm", "pyyaml", "pandas"),
)


def write_model(run_dir: Path, folder: Path) -> None:
    """Write the model of a finished run into a new folder; it holds weights as safetensors and no pickle.

    Args:
        run_dir: Holds model.safetensors and config.yaml.
        folder: Doesn't exist yet.
    """
    import mlflow.pyfunc
    import pandas
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    data = folder.with_name("run")
    data.mkdir(parents=True)
    shutil.copyfile(run_dir / "model.safetensors", data / "model.safetensors")
    config = (run_dir / "config.yaml").read_text(encoding="utf-8")
    (data / "config.yaml").write_text(mask_secrets(config), encoding="utf-8")
    mlflow.pyfunc.save_model(
        path=folder,
        loader_module="facetrain.pyfunc",
        data_path=str(data),
        code_paths=[str(Path(facetrain.__file__).parent)],
        signature=ModelSignature(
            inputs=Schema([ColSpec("binary", "image")]),
            outputs=Schema([TensorSpec(np.dtype("float32"), (-1, -1))]),
        ),
        input_example=pandas.DataFrame({"image": [draw_somebody(112)]}),
        pip_requirements=[f"{name}=={version(name)}" for name in _REQUIREMENTS],
        metadata={"facetrain": facetrain.__version__},
    )
