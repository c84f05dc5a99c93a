"""Weights on disk: the network alone, with the config beside it, for whoever wants to embed or to start from it."""

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file
from torch import Tensor, nn

from facetrain.checkpoint.folder import newest_checkpoint
from facetrain.command_line import config_yaml, load_config
from facetrain.config import Config
from facetrain.models import Backbone, build_backbone
from facetrain.whole_file import flush, write_text

log = logging.getLogger(__name__)

ArrayT = TypeVar("ArrayT")


def save_weights(weights: dict[str, Tensor], config: Config, folder: Path) -> None:
    """Write `model.safetensors` and the config beside it, each by a rename."""
    save_tensors(weights, folder / ".model.tmp")
    flush(folder / ".model.tmp")
    os.replace(folder / ".model.tmp", folder / "model.safetensors")
    save_config(config, folder)


def save_config(config: Config, folder: Path) -> None:
    """Write `config.yaml`, at once or not at all."""
    write_text(folder / "config.yaml", config_yaml(config))


def load_backbone(run: Path) -> tuple[Backbone, Config]:
    """Build the backbone of a run and load its weights, on the CPU.

    Args:
        run: A run folder (or a checkpoint's folder), or a .safetensors file with `config.yaml` beside it.

    Raises:
        ValueError: The weights are damaged or don't fit the config's backbone.
        FileNotFoundError: There are no weights or there is no config.
    """
    file = weights_file(run)
    config = load_config(file.parent / "config.yaml")
    model = replace(config.model, imagenet_weights=None)  # the run's own weights take their place
    backbone = build_backbone(model, channels=config.data.channels, image_px=config.data.image_px)
    load_weights(backbone, file)
    return backbone, config


def weights_file(run: Path) -> Path:
    """Return the weights of a run: `model.safetensors`, or the newest checkpoint's where the run isn't finished.

    Raises:
        FileNotFoundError: There are none.
    """
    if run.suffix == ".safetensors":
        if not run.is_file():
            raise FileNotFoundError(f"{run}: no such weights")
        return run
    if (run / "model.safetensors").is_file():
        return run / "model.safetensors"
    newest, damaged = newest_checkpoint(run)
    for path, damage in damaged.items():
        log.warning(f"{path}: damaged ({damage}); passed over")
    if newest is not None:
        return newest / "model.safetensors"
    raise FileNotFoundError(f"{run}: expected a run folder with model.safetensors, or a .safetensors file")


def load_weights(backbone: nn.Module, file: Path) -> None:
    """Put weights into a backbone, all of them.

    Raises:
        ValueError: The file is damaged, or of another backbone; the message names the first layers that don't fit.
    """
    unfit, _ = _load_fitting(backbone, file)
    if unfit:
        raise ValueError(f"{file}: weights of another backbone; {len(unfit)} layers don't fit: {', '.join(unfit[:3])}")


def init_weights_from(backbone: nn.Module, run: Path) -> list[str]:
    """Start a backbone from earlier weights (`model.init_from`), leaving layers that don't fit as they are.

    Returns:
        What doesn't fit, a phrase per layer.

    Raises:
        ValueError: The file is damaged, or nothing in it fits.
        FileNotFoundError: There are no weights.
    """
    file = weights_file(run)
    unfit, num_fitting = _load_fitting(backbone, file)
    if num_fitting == 0:
        raise ValueError(f"model.init_from: no layer of {file} fits this backbone, such as {unfit[0]}")
    return unfit


def _load_fitting(backbone: nn.Module, file: Path) -> tuple[list[str], int]:
    """Load the layers that fit; return a phrase for each that is missing, of another shape or unknown; and how many."""
    weights = read_tensors(load_tensors, file)
    expected = backbone.state_dict()
    unfit = [f"{name} (missing)" for name in expected if name not in weights]
    unfit += [f"{name} (unknown)" for name in weights if name not in expected]
    unfit += [
        f"{name} ({list(weights[name].shape)}, expected {list(tensor.shape)})"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    fitting = {n: w for n, w in weights.items() if n in expected and w.shape == expected[n].shape}
    backbone.load_state_dict(fitting, strict=False)
    return unfit, len(fitting)


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a .safetensors file, for whom its folder is: safetensors leaves its files to their owner alone.

    Raises:
        OSError: The disk is full, or the file can't be written for another reason.
    """
    try:
        save_file(tensors, file)
    except SafetensorError as error:
        raise OSError(f"{file}: {error}") from None
    file.chmod(file.parent.stat().st_mode & 0o666)


def read_tensors(load: Callable[[Path], dict[str, ArrayT]], file: Path) -> dict[str, ArrayT]:
    """Read a .safetensors file by one of the library's `load_file`.

    Raises:
        ValueError: The file is missing or damaged; the message names it.
    """
    if not file.is_file():
        raise ValueError(f"{file}: missing")
    try:
        return load(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged ({error})") from None
