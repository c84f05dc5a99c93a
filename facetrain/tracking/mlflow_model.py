"""A run's network in MLflow's pyfunc form, with its code, its requirements, a signature and an example."""

import logging
import shutil
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

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


def write_model(run_dir: Path) -> Path:
    """Write the model of a finished run into a folder of its own in the run folder, and return that.

    It holds weights as safetensors, and no pickle.

    Args:
        run_dir: Holds model.safetensors and config.yaml.
    """
    import mlflow.pyfunc
    import pandas
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # its import has made it talkative again
    folder = run_dir / MODEL_NAME
    shutil.rmtree(folder, ignore_errors=True)
    with TemporaryDirectory(prefix="mlflow-", dir=run_dir / "logs") as data:
        shutil.copyfile(run_dir / "model.safetensors", Path(data, "model.safetensors"))
        config = (run_dir / "config.yaml").read_text(encoding="utf-8")
        Path(data, "config.yaml").write_text(mask_secrets(config), encoding="utf-8")
        mlflow.pyfunc.save_model(
            path=folder,
            loader_module="facetrain.pyfunc",
            data_path=data,
            code_paths=[str(Path(facetrain.__file__).parent)],
            signature=ModelSignature(
                inputs=Schema([ColSpec("binary", "image")]),
                outputs=Schema([TensorSpec(np.dtype("float32"), (-1, -1))]),
            ),
            input_example=pandas.DataFrame({"image": [draw_somebody(112)]}),
            pip_requirements=[f"{name}=={version(name)}" for name in _REQUIREMENTS],
            metadata={"facetrain": facetrain.__version__},
        )
    return folder
