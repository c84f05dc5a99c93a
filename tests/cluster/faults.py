"""All faults, and why one can't be made on this machine."""

from collections.abc import Callable

from cluster import network_faults, run_faults
from cluster.hosts import missing_network
from cluster.measure import Bench, Outcome
from small_disk import missing_disk

FAULTS: dict[Callable[[Bench], Outcome], Callable[[], str]] = {
    **dict.fromkeys(network_faults.ON_TWO_HOSTS, missing_network),
    **dict.fromkeys(run_faults.ON_A_SMALL_DISK, missing_disk),
    **dict.fromkeys((*network_faults.ON_ANY_MACHINE, *run_faults.ON_ANY_MACHINE), str),
}
"""The reason is empty where it can be made."""
