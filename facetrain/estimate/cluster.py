"""Cluster: how many GPUs, and what one of them and its links can do."""

from dataclasses import dataclass, field, fields
from typing import Any


def _flag(default: float, help: str) -> Any:
    """Return a field that is a flag of `facetrain estimate` with this help."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Machines of one kind; each field's metadata says what it is.

    Speeds are what is sustained: the defaults are about 70% of what an H100's data sheet and its links promise.
    """

    nodes: int = _flag(1, "machines")
    gpus_per_node: int = _flag(8, "GPUs, and with them processes, of a machine")
    gpu_memory_gb: float = _flag(80.0, "memory of a GPU, in 10^9 bytes")
    gpu_runtime_gb: float = _flag(
        1.5, "what the CUDA context, NCCL, cuDNN and fragmentation take of it: an allowance, not counted from anything"
    )
    gpu_tflops: float = _flag(
        400.0, "matrix products and convolutions in train.precision, in 10^12 operations a second"
    )
    gpu_float32_tflops: float = _flag(45.0, "matrix products in float32 (the loss), in 10^12 operations a second")
    gpu_gb_per_s: float = _flag(2300.0, "memory bandwidth of a GPU, in 10^9 bytes a second")
    kernel_us: float = _flag(5.0, "microseconds that an operation takes at least: its launch")
    node_link_gb_per_s: float = _flag(
        350.0, "bandwidth of a GPU to the others of its machine, one direction, in 10^9 bytes a second"
    )
    link_gb_per_s: float = _flag(
        45.0,
        "bandwidth of a GPU to other machines, one direction, in 10^9 bytes a second; 50 is a 400 Gb/s adapter each",
    )
    latency_us: float = _flag(
        10.0, "microseconds of a hop between machines; one inside a machine is counted as a tenth of it"
    )
    decode_images_per_s: float = _flag(
        9000.0,
        "images that a decoding process (data.workers of them per GPU) turns out a second; 9,000 RGB of 112 px a core",
    )

    def __post_init__(self) -> None:
        """Check the bounds."""
        for key in fields(self):
            value = getattr(self, key.name)
            if key.name in ("nodes", "gpus_per_node"):
                is_fine, expected = value >= 1, "1 or more"
            elif key.name == "gpu_runtime_gb":
                is_fine, expected = value >= 0, "0 or more"
            else:
                is_fine, expected = value > 0, "more than 0"
            if not is_fine:
                raise ValueError(f"--{key.name.replace('_', '-')}: expected {expected}, got {value}")

    @property
    def world_size(self) -> int:
        """W, a rank per GPU."""
        return self.nodes * self.gpus_per_node

    @property
    def ring_bytes_per_s(self) -> float:
        """Bandwidth of the slowest link of a ring through all GPUs.

        Between machines, NCCL lays a ring through every adapter, so that all of a machine's adapters work at once.
        """
        inside = self.node_link_gb_per_s
        between = self.link_gb_per_s * self.gpus_per_node
        return 1e9 * (between if self.gpus_per_node == 1 else inside if self.nodes == 1 else min(inside, between))
