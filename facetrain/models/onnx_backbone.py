"""Networks from anywhere as ONNX files. Sole importer of onnxruntime, which is optional."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facetrain.config import DataConfig

ONNX_DATA_KEY = "facetrain.data"
"""Metadata of an ONNX file of ours: what images go through before the network, as JSON of keys of the section data."""


@dataclass(frozen=True)
class OnnxInput:
    """What the pixels of an ONNX network's input look like: (pixel - mean) / std, channels in this order.

    A network of ours says it itself; one of uint8 takes pixels as they are.
    """

    mean: float = 127.5
    """In [0, 255]."""
    std: float = 127.5
    """In [0, 255], more than 0."""
    colour: Literal["rgb", "bgr"] = "rgb"

    def __post_init__(self) -> None:
        """Check the bounds."""
        if not self.std > 0:
            raise ValueError(f"--onnx-std: expected more than 0, got {self.std}")


class OnnxBackbone(nn.Module):
    """A backbone that onnxruntime runs, on the CPU or, where that build has CUDA, on the images' device."""

    def __init__(self, file: Path, pixels: OnnxInput) -> None:
        """Open the file.

        Raises:
            ValueError: not an ONNX network of one input [B, C, H, H], C = 1 or 3, in float32, float16 or uint8; what it
                states of its images doesn't fit its input; onnxruntime isn't installed.
            FileNotFoundError: there is no such file.
        """
        super().__init__()
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such ONNX file")
        self._device = torch.device("cpu")
        self._session = _open(file, self._device)
        inputs = self._session.get_inputs()
        shape = inputs[0].shape
        kind = inputs[0].type
        if kind not in ("tensor(float)", "tensor(float16)", "tensor(uint8)"):
            raise ValueError(f"{file}: expected an input of float, float16 or uint8, got {kind}")
        self._takes_bytes, self._takes_halves = kind == "tensor(uint8)", kind == "tensor(float16)"
        if self._takes_bytes and len(shape) == 4:  # channels last
            shape = [shape[0], shape[3], *shape[1:3]]
        square = len(shape) == 4 and shape[2] == shape[3] and isinstance(shape[2], int)
        if len(inputs) != 1 or not square or shape[1] not in (1, 3):
            raise ValueError(
                f"{file}: expected one input [B, 1 or 3, H, H] of fixed H, got {[i.shape for i in inputs]}"
            )
        if self._takes_bytes and (pixels.mean, pixels.std) != (OnnxInput.mean, OnnxInput.std):
            raise ValueError(f"--onnx-mean, --onnx-std: {file} takes pixels as they are, uint8")
        stated = self._session.get_modelmeta().custom_metadata_map.get(ONNX_DATA_KEY)
        self._file, self._input, self._pixels = file, inputs[0].name, OnnxInput() if stated else pixels
        self._batch = shape[0] if isinstance(shape[0], int) else None
        self.channels: int = shape[1]
        self.image_px: int = shape[2]
        self.data = self._stated_data(stated) if stated else self._guessed_data()
        """What images go through before the network."""

    def _guessed_data(self) -> DataConfig:
        # Straight to the network's size: by way of another, larger faces would lose detail.
        return DataConfig(
            shard_px=self.image_px, image_px=self.image_px, colour="rgb" if self.channels == 3 else "grey"
        )

    def _stated_data(self, stated: str) -> DataConfig:
        """Read what `facetrain export` has written."""
        try:
            data = DataConfig(**json.loads(stated))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self._file}: damaged metadata {ONNX_DATA_KEY}: {error}") from None
        if (data.channels, data.image_px) != (self.channels, self.image_px):
            raise ValueError(
                f"{self._file}: damaged metadata {ONNX_DATA_KEY}: expected {self.channels} channels of {self.image_px}"
                f" px, as the input has, got {data.channels} of {data.image_px} px"
            )
        return data

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Embed a batch as `network_input` makes it, in [-1, 1]; float32 [B, D] on the device of the images."""
        if images_BCHW.device != self._device:
            self._device = images_BCHW.device
            self._session = _open(self._file, self._device)
        if self._takes_bytes:
            pixels = (images_BCHW.float() * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
            if self._pixels.colour == "bgr":
                pixels = pixels.flip(3)
            return self._run_blocks(pixels).to(images_BCHW.device, torch.float32)
        pixels = (images_BCHW.float() * 127.5 + (127.5 - self._pixels.mean)) / self._pixels.std
        if self._pixels.colour == "bgr":
            pixels = pixels.flip(1)
        if self._takes_halves:
            pixels = pixels.half()
        return self._run_blocks(pixels).to(images_BCHW.device, torch.float32)

    def _run_blocks(self, pixels: Tensor) -> Tensor:
        blocks = pixels.cpu().contiguous().split(self._batch or len(pixels))
        return torch.cat([self._run(block) for block in blocks])

    def _run(self, block_bCHW: Tensor) -> Tensor:
        """Embed as many images as the network takes at once, or fewer."""
        num_images = len(block_bCHW)
        if self._batch is not None:  # a network of a fixed batch takes no fewer
            block_bCHW = F.pad(block_bCHW, (0,) * 7 + (self._batch - num_images,))
        output = self._session.run(None, {self._input: block_bCHW.numpy()})[0]
        if output.ndim != 2 or len(output) < num_images:
            raise ValueError(f"{self._file}: expected embeddings [B, D] as its first output, got {list(output.shape)}")
        return torch.from_numpy(output)[:num_images]


def _open(file: Path, device: torch.device) -> Any:
    """Open the file for a device; what onnxruntime can't run there, it runs on the CPU."""
    try:
        import onnxruntime
    except ImportError:
        raise ValueError(f"{file}: an ONNX file needs onnxruntime: pip install 'facetrain[onnx]'") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors, which are raised as well
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=providers)
    except Exception as error:  # onnxruntime's own exceptions share no base class
        raise ValueError(f"{file}: not a readable ONNX network: {' '.join(str(error).split())}") from None
