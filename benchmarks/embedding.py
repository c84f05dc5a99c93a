"""Embedding faces for an evaluation beside the training forward of as many images that are in memory already.

    OMP_NUM_THREADS=1 python benchmarks/embedding.py --images lfw_aligned-00.tar lfw_aligned-01.tar
        [--config configs/faces_cpu.yaml] [--limit 2048] [--turns 5] [--device cuda]

Reading, decoding and cropping count, the mirrored image doesn't: each image goes through the network once on both
sides. Both take turns in one process, with batches of the same size and the precision of the config; medians.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from facetrain.batch import network_input
from facetrain.command_line import load_config
from facetrain.data.decode import decode_face
from facetrain.data.sources import open_faces
from facetrain.embed import BATCH_IMAGES, embed_images
from facetrain.models import build_backbone
from facetrain.world import World

WISH = 1.10


def main() -> None:
    """Measure and print the seconds of both, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, nargs="+", required=True, help="aligned faces: folders or tars")
    parser.add_argument("--config", type=Path, default=Path("configs/faces_cpu.yaml"))
    parser.add_argument("--limit", type=int, default=2048, help="images of a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    config, world = load_config(args.config), World.alone(args.device)
    source, precision = open_faces(args.images), config.train.precision
    num_images = min(args.limit, len(source.names)) // BATCH_IMAGES * BATCH_IMAGES
    backbone = build_backbone(config.model, channels=config.data.channels, image_px=config.data.image_px)
    backbone.to(world.device)
    side = config.data.image_px
    images_BHWC = torch.randint(0, 256, (BATCH_IMAGES, side, side, config.data.channels), dtype=torch.uint8)

    def wait() -> None:
        if world.device.type == "cuda":
            torch.cuda.synchronize()

    def embed() -> None:
        def decode(image: int) -> npt.NDArray[np.uint8]:
            return decode_face(source.read(image), config.data, source.names[image])

        embed_images(backbone, decode, num_images, world=world, precision=precision)

    def forward() -> None:
        backbone.train()
        for _ in range(num_images // BATCH_IMAGES):
            with torch.autocast(world.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                backbone(network_input(images_BHWC.to(world.device)))

    seconds: dict[str, list[float]] = {"embedding": [], "training forward": []}
    for turn in range(args.turns + 1):  # the first warms up
        for name, work in (("embedding", embed), ("training forward", forward)):
            wait()
            started_at = time.perf_counter()
            work()
            wait()
            if turn:
                seconds[name].append(time.perf_counter() - started_at)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name:18}{median:8.2f} s  {num_images / median:8.0f} images/s")
    print(f"ratio {medians['embedding'] / medians['training forward']:.2f} (wanted: at most {WISH})")


if __name__ == "__main__":
    main()
