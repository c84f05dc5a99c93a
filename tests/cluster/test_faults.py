"""A training comes through every fault with the weights of an undisturbed one."""

from collections.abc import Callable
from pathlib import Path

import pytest
from cluster.faults import ON_A_SMALL_DISK, ON_ANY_MACHINE, ON_TWO_HOSTS
from cluster.hosts import missing_network
from cluster.measure import TIMEOUT_S, Bench, Outcome
from small_disk import missing_disk

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def bench(synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("faults"), synthetic / "shards")


@pytest.mark.parametrize("fault", [*ON_TWO_HOSTS, *ON_A_SMALL_DISK, *ON_ANY_MACHINE], ids=lambda fault: fault.__name__)
def test_a_training_comes_through(fault: Callable[[Bench], Outcome], bench: Bench) -> None:
    reason = missing_network() if fault in ON_TWO_HOSTS else missing_disk() if fault in ON_A_SMALL_DISK else ""
    if reason:
        pytest.skip(reason)
    seen = fault(bench)
    assert seen.is_equal
    if seen.detected_s is not None and fault in ON_TWO_HOSTS:
        assert seen.detected_s < TIMEOUT_S + 15  # two signs of life are compared, 10 s at most each, after the timeout
