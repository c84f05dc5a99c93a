"""What a miner compares: the scores of the chosen loss."""

import numpy as np
import pytest
import torch
from data.numbered_faces import SIDE_PX, numbered_shards
from torch import Tensor, nn

from facetrain.config import Config, DataConfig, LossConfig, MiningConfig, TrainConfig
from facetrain.data.plan import Plan
from facetrain.data.shards import ShardSet
from facetrain.mining.miner import Miner, as_scored
from facetrain.mining.round import MinedRound
from facetrain.world import World

NUM_IDENTITIES, PAIRS = 40, 6
UNIT = LossConfig(name="triplet")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("shards")
    return ShardSet.open(numbered_shards(folder, [3] * NUM_IDENTITIES).folder)


class Backbone(nn.Module):
    """The same directions with norms of 1, or with ones from 0.05 to 20 that no identity shares."""

    def __init__(self, *, uneven: bool) -> None:
        super().__init__()
        self.uneven = uneven
        torch.manual_seed(0)
        self.layer = nn.Linear(3 * SIDE_PX**2, 8)

    def forward(self, images: Tensor) -> Tensor:
        directions = nn.functional.normalize(self.layer(images.flatten(1)))
        norms = torch.exp(3 * torch.sin(1e4 * directions[:, :1])) if self.uneven else torch.ones(len(images), 1)
        return directions * norms


def mined(shards: ShardSet, mode: str, loss: LossConfig, *, uneven: bool) -> MinedRound:
    mining = MiningConfig(mode=mode, virtual_nodes=2, warmup_steps=0, lag_steps=1, batches_per_round=4)  # type: ignore[arg-type]
    config = Config(
        data=DataConfig(shards="unused", workers=0, shard_px=SIDE_PX, image_px=SIDE_PX),
        loss=loss,
        mining=mining,
        train=TrainConfig(global_pairs=PAIRS, steps=100),
    )
    plan = Plan(shards.table, np.arange(NUM_IDENTITIES), global_pairs=PAIRS, seed=0)
    found = Miner(config, shards, plan, World()).mine_before(0, Backbone(uneven=uneven))
    assert found is not None
    return found[1]


@pytest.mark.parametrize("mode", ["gathered", "quota"])
def test_norms_choose_no_classes_for_a_loss_of_unit_vectors(shards: ShardSet, mode: str) -> None:
    def lists(loss: LossConfig, *, uneven: bool) -> list[list[int]]:
        return mined(shards, mode, loss, uneven=uneven).identities_BN.tolist()

    assert lists(UNIT, uneven=True) == lists(UNIT, uneven=False) == lists(LossConfig(), uneven=False)
    assert lists(LossConfig(), uneven=True) != lists(LossConfig(), uneven=False)


def test_scores_have_the_losss_temperature(shards: ShardSet) -> None:
    cosines, warm = (mined(shards, "gathered", loss, uneven=True).stats for loss in (UNIT, LossConfig(temperature=0.5)))
    assert warm["mining/violation"] == pytest.approx(2 * cosines["mining/violation"], rel=1e-5)


def test_a_table_holds_what_the_loss_compares(shards: ShardSet) -> None:
    plan = Plan(shards.table, np.arange(NUM_IDENTITIES), global_pairs=PAIRS, seed=0)
    mining = MiningConfig(mode="table", table_dtype="float32")
    embeddings = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    for loss in (LossConfig(), UNIT):
        config = Config(data=DataConfig(shards="unused"), loss=loss, mining=mining)
        miner = Miner(config, shards, plan, World())
        miner.observe(0, torch.tensor([4, 7, 9]), embeddings)
        assert miner.table is not None
        kept = torch.stack(miner.table.lookup(np.array([4, 7, 9])))
        assert torch.equal(kept, as_scored(embeddings, loss))
    torch.testing.assert_close(kept.norm(dim=-1), torch.ones(2, 3))
