"""How many photographs a core aligns by YuNet and packs in a second, by their size.

    OMP_NUM_THREADS=1 python benchmarks/alignment.py --photographs lfw.tar --detector face_detection_yunet.onnx

Photographs are enlarged to each size, as JPEGs of quality 90: what they show doesn't change, what they cost does.
"""

import argparse
import statistics
import time
from pathlib import Path

import cv2
import numpy as np

from facetrain.data.align import YunetDetector
from facetrain.data.manifest import PackSettings
from facetrain.data.prepare import prepare_image
from facetrain.data.sources import open_faces


def main() -> None:
    """Print a line for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, required=True, help="a tar or a folder, with a folder per person")
    parser.add_argument("--detector", type=Path, required=True, help="face_detection_yunet.onnx")
    parser.add_argument("--images", type=int, default=40, help="photographs of a turn")
    parser.add_argument("--sides", type=int, nargs="+", default=[250, 1500, 3500], help="longer sides in pixels")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    cv2.setNumThreads(0)
    faces, find = open_faces([args.photographs]), YunetDetector(args.detector)
    photographs = [faces.read(image) for image in range(min(args.images, len(faces.names)))]
    for side in args.sides:
        files = [enlarged(file, side) for file in photographs]
        rates = []
        for _ in range(args.turns):
            began = time.process_time()
            for file in files:
                prepare_image(file, PackSettings(), find)
            rates.append(len(files) / (time.process_time() - began))
        print(f"{side} px: {statistics.median(rates):.1f} photographs a second of a core")


def enlarged(file: bytes, side_px: int) -> bytes:
    """Return a photograph whose longer side has so many pixels, as a JPEG."""
    image = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR)
    scale = side_px / max(image.shape[:2])
    image = cv2.resize(image, None, None, scale, scale, cv2.INTER_CUBIC)
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


if __name__ == "__main__":
    main()
