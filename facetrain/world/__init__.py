"""World: this process among the others. Sole importer of torch.distributed.

A World of one process needs no launcher, and its collectives are the identity.
"""

from facetrain.world.gather import GatherInFlight
from facetrain.world.start import (
    REPORT_TIMEOUT_S,
    SHARE_CORES_VARIABLE,
    launched_world_size,
    mixed_devices,
    start_world,
)
from facetrain.world.world import World

__all__ = [
    "REPORT_TIMEOUT_S",
    "SHARE_CORES_VARIABLE",
    "GatherInFlight",
    "World",
    "launched_world_size",
    "mixed_devices",
    "start_world",
]
