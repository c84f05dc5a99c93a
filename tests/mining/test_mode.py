import pytest

from facetrain.config import Config, MiningConfig, TrainConfig
from facetrain.mining.mode import check_mode, choose_mode


def config_of(global_pairs: int = 320, **mining: object) -> Config:
    return Config(train=TrainConfig(global_pairs=global_pairs), mining=MiningConfig(**mining))  # type: ignore[arg-type]


def test_auto_goes_by_the_number_of_identities_and_says_so() -> None:
    few = choose_mode(MiningConfig(mode="auto"), num_identities=90_000, num_pairs=320)
    assert few.name == "gathered"
    assert "90000 identities are at most 100000" in few.describe()
    many = choose_mode(MiningConfig(mode="auto"), num_identities=2_000_000, num_pairs=4096)
    assert many.name == "table"
    assert "2000000 identities are more than 100000; no forward passes" in many.describe()
    assert "of the last 2000 training steps, enough to renew 100%" in many.describe()  # 1024 a step, 2 million steps
    assert choose_mode(MiningConfig(mode="quota"), num_identities=50, num_pairs=8).reason == "mining.mode asks for it"


def test_cost_of_a_round_is_that_of_its_forward_passes() -> None:
    """10,000 candidates of two images against steps of 320 pairs: 20,000 / 1,920."""
    chosen = choose_mode(MiningConfig(mode="gathered"), num_identities=10_575, num_pairs=320)
    assert chosen.round_steps == pytest.approx(10.4, abs=0.02)
    assert "a round embeds for as long as 10.4 training steps, 0.33 for each of its 32 batches" in chosen.describe()
    assert choose_mode(MiningConfig(mode="quota"), num_identities=960, num_pairs=320).round_steps == 1


def test_what_a_mode_cannot_do_is_refused_by_its_key() -> None:
    check_mode(config_of(mode="gathered", candidates=320), num_identities=320, world_size=2)
    with pytest.raises(ValueError, match=r"mining\.candidates: expected at least train\.global_pairs = 320 .* got 300"):
        check_mode(config_of(mode="auto"), num_identities=300, world_size=2)
    with pytest.raises(ValueError, match=r"mining\.virtual_nodes: expected a multiple of the 3 processes, got 8"):
        check_mode(config_of(mode="quota"), num_identities=900, world_size=3)
    check_mode(config_of(mode="quota"), num_identities=900, world_size=4)
    with pytest.raises(ValueError, match=r"mining\.max_appearances: expected at least 32, so that 320 trained"):
        check_mode(config_of(mode="table", max_appearances=3), num_identities=320, world_size=1)
