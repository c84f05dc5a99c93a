"""Backbone and images -> embeddings, over all ranks."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from facetrain.batch import network_input
from facetrain.world import World

Decode = Callable[[int], npt.NDArray[np.uint8]]
"""Image number -> uint8 [H, W, C], as the network sees it."""

BATCH_IMAGES = 128
"""Images of one forward, which are one rank's; a rank takes whole batches."""
MAX_BATCH_IMAGES = 1024
"""The most that are tried on a GPU."""


def embed_images(
    backbone: nn.Module,
    decode: Decode,
    num_images: int,
    *,
    world: World,
    precision: Literal["float32", "bfloat16"],
    mirror: bool = False,
    batch_images: int = BATCH_IMAGES,
    progress: str | None = None,
) -> Tensor:
    """Embed images 0 .. num_images - 1 in eval mode, each rank a share of them.

    The images are cut into the same batches whatever the number of ranks is, so that every rank ends with the same
    embeddings, to the bit, on any number of ranks. All ranks run equally many batches, since each is a collective
    where weights are shared out (ZeRO 3); what is surplus is dropped. Decoding runs in a thread beside the network.

    Args:
        backbone: On `world.device`; left in the mode in which it came.
        decode: Called from another thread.
        num_images: At least 1.
        world: All its ranks must call.
        precision: bfloat16 runs the forward under autocast.
        mirror: Add the embedding of the mirrored image.
        batch_images: Images of one forward.
        progress: Label of a progress bar on rank 0's terminal; None shows none.

    Returns:
        float32 [num_images, D] on `world.device`, not normalised, equal on all ranks.
    """
    starts = range(0, num_images, batch_images)
    share = starts[world.rank * len(starts) // world.world_size : (world.rank + 1) * len(starts) // world.world_size]
    batches = [range(start, min(start + batch_images, num_images)) for start in share]
    surplus = [range(1)] * (-(-len(starts) // world.world_size) - len(share))
    bar = tqdm(total=num_images, desc=progress, unit="img", disable=None if progress and world.is_main else True)
    was_training = backbone.training
    backbone.eval()
    blocks = []
    with torch.no_grad(), torch.autocast(world.device.type, torch.bfloat16, enabled=precision == "bfloat16"), bar:
        for images_BHWC in _decode_ahead(decode, [*batches, *surplus]):
            images_BCHW = network_input(images_BHWC.to(world.device))
            embeddings_BD = backbone(images_BCHW).float()
            if mirror:
                embeddings_BD = embeddings_BD + backbone(images_BCHW.flip(3)).float()
            blocks.append(embeddings_BD)
            bar.update(min(len(embeddings_BD) * world.world_size, num_images - bar.n))
    backbone.train(was_training)
    # Over all ranks: every rank ends with all rows in order.
    return world.all_gather_uneven(torch.cat([blocks[0][:0], *blocks[: len(batches)]]))


def fitting_batch(
    backbone: nn.Module, image_shape: tuple[int, int, int], *, world: World, precision: Literal["float32", "bfloat16"]
) -> int:
    """Return how many images of [H, W, C] one forward takes: BATCH_IMAGES, or on CUDA the most that fit.

    On CUDA, powers of two are tried, from MAX_BATCH_IMAGES down. All ranks must call, and get the same answer.

    Raises:
        ValueError: Not even one image fits.
    """
    if world.device.type != "cuda":
        return BATCH_IMAGES
    batch_images = MAX_BATCH_IMAGES
    while batch_images and not _fits(backbone, (batch_images, *image_shape), world.device, precision):
        batch_images //= 2
    batch_images = min(world.all_gather_object(batch_images))  # over all ranks: the smallest
    if batch_images == 0:
        raise ValueError(f"{world.device}: out of memory with a single image")
    return batch_images


def _fits(backbone: nn.Module, shape: tuple[int, ...], device: torch.device, precision: str) -> bool:
    images_BHWC = torch.zeros(shape, dtype=torch.uint8, device=device)
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            backbone.eval()(network_input(images_BHWC))
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return True


def _decode_ahead(decode: Decode, batches: list[range]) -> Iterator[Tensor]:
    """Yield each batch as uint8 [B, H, W, C], the next one being decoded meanwhile."""

    def read(batch: range) -> Tensor:
        return torch.from_numpy(np.stack([decode(image) for image in batch]))

    with ThreadPoolExecutor(max_workers=1) as thread:
        pending = [thread.submit(read, batch) for batch in batches[:1]]
        for following in [*batches[1:], None]:
            if following is not None:
                pending.append(thread.submit(read, following))
            if pending:
                yield pending.pop(0).result()
