"""Networks for other programs: ONNX and torch.export, compared with PyTorch on the spot."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facetrain.batch import network_input
from facetrain.checkpoint.weights import load_backbone
from facetrain.config import DataConfig
from facetrain.data.decode import present_face
from facetrain.models.onnx_backbone import ONNX_DATA_KEY, OnnxBackbone, OnnxInput
from facetrain.models.pixels import FacePixels
from facetrain.whole_file import part_of, put_in_place

Form = Literal["onnx", "torch"]

MAX_DIFFERENCE = 1e-4
"""Largest difference of a number of an embedding of unit length that an export may have."""
OPSET = 23
"""Of ONNX: the newest that torch 2.15 writes."""
_CHECK_BATCHES = (1, 5)


def export_network(run: Path, out: Path, *, form: Form, preprocess: bool) -> str:
    """Write a run's network for other programs, if it then computes what PyTorch does; return a line that says so.

    Its input is `images`, float32 [B, C, image_px, image_px] in [-1, 1], or with `preprocess` aligned faces as uint8
    [B, shard_px, shard_px, 3], RGB, that it crops, shrinks and scales itself. Its output is `embeddings`, float32
    [B, D], not normalised. B is any number.

    Args:
        run: A run folder or .safetensors.
        out: The file; it is replaced whole or not at all. Its folder is made if missing.
        form: onnx, or torch for what `torch.export.load` reads.
        preprocess: Include cropping, shrinking and scaling.

    Raises:
        ValueError: The weights can't be used, `out` is a folder, a package is missing, or the export differs from
            PyTorch.
    """
    if out.is_dir():
        raise ValueError(f"--out: expected a file, {out} is a folder")
    backbone, config = load_backbone(run)
    data = config.data
    network = (nn.Sequential(FacePixels(data), backbone) if preprocess else backbone).eval()
    faces = _check_faces(data)
    inputs = {size: _inputs(faces[:size], data, preprocess) for size in _CHECK_BATCHES}
    aside = part_of(out).with_suffix(out.suffix)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        if form == "onnx":
            _write_onnx(network, inputs[max(inputs)], aside, _stated_data(data, preprocess))
            exported: Any = _session(aside, preprocess)
        else:
            _write_torch(network, inputs[max(inputs)], aside)
            exported = torch.export.load(aside).module()
        differences = [_difference(backbone, exported, faces[:size], inputs[size], data) for size in inputs]
        difference = float(np.max(differences))  # NaN where any is
        if not difference <= MAX_DIFFERENCE:
            raise ValueError(
                f"{out}: embeddings differ from PyTorch's by {difference:.1e}, more than {MAX_DIFFERENCE:g}"
            )
        put_in_place(aside, out)
    finally:
        aside.unlink(missing_ok=True)
    shape = ", ".join(["B", *map(str, inputs[1].shape[1:])])
    kind = "uint8" if preprocess else "float32"
    return f"{out}: {kind} [{shape}]; embeddings of unit length differ from PyTorch's by {difference:.1e} at most"


def _check_faces(data: DataConfig) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return smooth noise, uint8 [5, shard_px, shard_px, 3]; its edges are where a wrong layout or crop would show."""
    noise = torch.rand(max(_CHECK_BATCHES), 3, 9, 9, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(noise, (data.shard_px, data.shard_px), mode="bicubic").clamp(0, 1)
    return (smooth * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _inputs(faces: np.ndarray[Any, np.dtype[np.uint8]], data: DataConfig, preprocess: bool) -> Tensor:
    return torch.from_numpy(faces) if preprocess else _seen(faces, data)


def _seen(faces: np.ndarray[Any, np.dtype[np.uint8]], data: DataConfig) -> Tensor:
    """Return what the network sees of faces, by way of training's evaluation."""
    pixels = np.stack([present_face(face, data) for face in faces])
    return network_input(torch.from_numpy(pixels)).contiguous()


@torch.no_grad()
def _difference(
    backbone: nn.Module, exported: Any, faces: np.ndarray[Any, np.dtype[np.uint8]], images: Tensor, data: DataConfig
) -> float:
    expected = F.normalize(backbone(_seen(faces, data)))
    return float((F.normalize(exported(images)) - expected).abs().max())


def _write_onnx(network: nn.Module, images: Tensor, file: Path, stated: str) -> None:
    try:
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError:
        raise ValueError("--format: onnx needs onnxscript and onnxruntime: pip install 'facetrain[onnx]'") from None
    program = torch.onnx.export(
        network,
        (images,),
        input_names=["images"],
        output_names=["embeddings"],
        opset_version=OPSET,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props[ONNX_DATA_KEY] = stated
    program.save(file)


def _write_torch(network: nn.Module, images: Tensor, file: Path) -> None:
    program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, file)


def _stated_data(data: DataConfig, preprocess: bool) -> str:
    """Return the keys of the section data by which evaluation prepares images for the exported network, as JSON."""
    if preprocess:
        return json.dumps({"shard_px": data.shard_px, "image_px": data.shard_px})
    return json.dumps({key: getattr(data, key) for key in ("shard_px", "crop_px", "image_px", "colour")})


def _session(file: Path, preprocess: bool) -> Any:
    """Return the file as a function of its own input."""
    backbone = OnnxBackbone(file, OnnxInput())

    def run(images: Tensor) -> Tensor:
        return backbone(network_input(images) if preprocess else images)  # type: ignore[no-any-return]

    return run
