"""A training comes through every fault with the weights of an undisturbed one."""

from collections.abc import Callable
from pathlib import Path

import pytest
from cluster.faults import FAULTS
from cluster.measure import SAVE_EVERY, TIMEOUT_S, Bench, Outcome
from cluster.network_faults import ON_TWO_HOSTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def bench(synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("faults"), synthetic / "shards")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_training_comes_through(fault: Callable[[Bench], Outcome], bench: Bench) -> None:
    if reason := FAULTS[fault]():
        pytest.skip(reason)
    seen = fault(bench)
    assert seen.is_equal
    assert 0 <= seen.steps_lost <= 2 * SAVE_EVERY  # two where the newest checkpoint is damaged
    if seen.detected_s is not None and fault in ON_TWO_HOSTS:
        assert seen.detected_s < TIMEOUT_S + 15  # after the timeout, signs of life are compared, with time for each
