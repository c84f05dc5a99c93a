"""From JPEGs to the pixels that the network sees on a GPU, a whole batch at a time.

Dims: B images, H x W pixels, C channels.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from facetrain.config import DataConfig
from facetrain.data.augment import Augmentation


def check_decoder(config: DataConfig, device: torch.device | None) -> None:
    """Refuse to decode on a GPU where there is none.

    Raises:
        ValueError: data.decode is 'gpu', and the device is none.
    """
    if config.decode == "gpu" and (device is None or device.type != "cuda"):
        raise ValueError(f"data.decode: 'gpu' needs a CUDA device, got {device or 'cpu'}; expected 'cpu' here")


def decode_on_device(
    jpegs: Sequence[bytes], changes: Sequence[Augmentation], config: DataConfig, device: torch.device
) -> Tensor:
    """Decode faces as `decode_augmented` does, on a device.

    Augmentation is that of the CPU within one grey level, rounding being another; nvJPEG's pixels differ a little more.

    Args:
        jpegs: [B], each shard_px x shard_px.
        changes: [B]; what happens to each.
        config: As for `decode_augmented`.
        device: Where they are decoded, and stay.

    Returns:
        uint8 [B, image_px, image_px, C] on the device; RGB order where C = 3.

    Raises:
        ValueError: An image can't be decoded or has another size.
    """
    # Here, because torchvision takes seconds to import and nothing else of a loader needs it.
    from torchvision.io import ImageReadMode, decode_jpeg

    encoded = [torch.frombuffer(bytearray(jpeg), dtype=torch.uint8) for jpeg in jpegs]
    mode = ImageReadMode.RGB if config.colour == "rgb" else ImageReadMode.GRAY
    try:
        images_BCHW = torch.stack(decode_jpeg(encoded, mode=mode, device=device))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"data.decode: an image of the batch can't be decoded: {reason}; 'cpu' names it") from None
    rows, columns = _windows(changes, config)
    b = torch.arange(len(jpegs), device=device)[:, None, None]
    rows_BH1, columns_B1W = (torch.from_numpy(x).to(device) for x in (rows[:, :, None], columns[:, None, :]))
    faces_BHWC = images_BCHW.permute(0, 2, 3, 1)[b, rows_BH1, columns_B1W]
    side = config.crop_px or config.shard_px
    if side == config.image_px and not config.colour_jitter:
        return faces_BHWC
    return _recoloured(_resized(faces_BHWC.float(), config.image_px), changes)


def _windows(
    changes: Sequence[Augmentation], config: DataConfig
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the rows and columns that each image's window shows, [B, side]; what is outside is a reflection."""
    side, last = config.crop_px or config.shard_px, config.shard_px - 1
    corner, steps = (config.shard_px - side) // 2, np.arange(side)
    rows = np.array([corner + change.shift_y_px + steps for change in changes])
    columns = np.array([corner + change.shift_x_px + (steps[::-1] if change.mirrored else steps) for change in changes])
    if last == 0:
        return 0 * rows, 0 * columns
    # Back and forth without repeating the border: a triangle wave.
    return last - np.abs(last - rows % (2 * last)), last - np.abs(last - columns % (2 * last))


def _resized(faces_BHWC: Tensor, side: int) -> Tensor:
    height = faces_BHWC.shape[1]
    if height == side:
        return faces_BHWC
    faces_BCHW = faces_BHWC.permute(0, 3, 1, 2)
    # As on the CPU: averages of areas where faces shrink.
    faces_BCHW = F.interpolate(faces_BCHW, size=side, mode="area" if height > side else "bilinear")
    return faces_BCHW.permute(0, 2, 3, 1).round()


def _recoloured(faces_BHWC: Tensor, changes: Sequence[Augmentation]) -> Tensor:
    factors_2B = torch.tensor([[c.brightness for c in changes], [c.contrast for c in changes]])
    brightness_B111, contrast_B111 = factors_2B.to(faces_BHWC.device)[:, :, None, None, None]
    mean_B111 = faces_BHWC.mean(dim=(1, 2, 3), keepdim=True)
    changed_BHWC = brightness_B111 * (mean_B111 + contrast_B111 * (faces_BHWC - mean_B111))
    pixels_BHWC: Tensor = changed_BHWC.round().clamp(0, 255).to(torch.uint8)
    return pixels_BHWC
