"""What training is judged on."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distributed.ranks import run_ranks
from torch import Tensor, nn

from facetrain.config import Config, DataConfig, EvalConfig
from facetrain.data.shards import ShardSet
from facetrain.data.split import split_identities
from facetrain.evaluation.judge import Judge
from facetrain.world import World


class MeanColour(nn.Module):
    """Embeds images as their mean colour, or as zero where the bias is low."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, images: Tensor) -> Tensor:
        return (images.mean(dim=(2, 3)) + self.bias).relu()


def test_embeddings_of_zero_are_no_score_and_end_no_run(synthetic: Path, caplog: pytest.LogCaptureFixture) -> None:
    faces = synthetic / "faces"
    lists = EvalConfig(images=(str(faces / "heldout"),), pairs=str(faces / "heldout_pairs.txt"), dataset="drawn")
    config = Config(data=DataConfig(shards=str(synthetic / "shards"), image_px=32), eval=lists)
    shards = ShardSet.open(synthetic / "shards")
    split = split_identities(shards.table, holdout=20, exclude=(), seed=0)
    judge = Judge.open(config, shards, split)
    measured = judge.judge(MeanColour(bias=2.0), World()).metrics()
    assert {"heldout/accuracy", "drawn/verification/accuracy"} < measured.keys()
    assert not caplog.records
    assert judge.judge(MeanColour(bias=-2.0), World()).metrics() == {}
    for warning, what in zip(caplog.messages, ("heldout", "drawn"), strict=True):
        assert warning.startswith(f"{what}: not measured: the network embeds ")


class SlowJudge(Judge):
    """Takes longer over its figures than a collective may wait."""

    def _compute(self, scores: object, embeddings: object) -> str:  # type: ignore[override]
        time.sleep(3)
        return "figures"


def judge_slowly(world: World) -> object:
    hasty = replace(world, timeout_s=1)
    hasty.limit_waiting()
    return SlowJudge(config=Config(), shards=None, heldout=None, faces=None).judge(nn.Identity(), hasty)  # type: ignore[arg-type]


def test_the_other_ranks_wait_for_figures_longer_than_for_a_step() -> None:
    assert run_ranks(judge_slowly, 2) == ["figures", "figures"]
