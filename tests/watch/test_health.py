import json
import math

import pytest
import torch

from facetrain.config import LossConfig
from facetrain.step import StepStats
from facetrain.watch.health import CollapseWatch, FiniteWatch, loss_of_equal_scores, not_finite_error
from facetrain.world import World


def stats(grad_norm, loss=1.0):
    one = torch.tensor(loss)
    return StepStats(
        loss=one, data_loss=one, squared_norm=one, grad_norm=torch.tensor(grad_norm), embeddings_VnD=torch.ones(2, 1, 1)
    )


def test_the_first_step_that_is_not_finite_is_remembered(tmp_path):
    watch = FiniteWatch(World())
    watch.observe(1, stats(2.0))
    assert watch.first_bad_step() is None
    watch.observe(2, stats(math.inf, loss=7.0))
    watch.observe(3, stats(2.0))
    watch.observe(4, stats(math.nan))
    bad = watch.first_bad_step()
    assert bad["step"] == 2
    assert bad["train/loss"] == 7.0

    (tmp_path / "logs").mkdir()
    error = not_finite_error(bad, ["ann", "bob"], learning_rate=0.1, folder=tmp_path, is_main=True)
    assert "step 2: train/loss is 7, train/grad_norm inf" in str(error)
    assert json.loads((tmp_path / "logs" / "not_finite.json").read_text())["identities"] == ["ann", "bob"]


@pytest.mark.parametrize(
    ("data_loss", "spread"), [(math.log(64), 0.9), (3.0, 0.001)], ids=["loss of equal scores", "no spread"]
)
def test_a_collapse_is_said_once_after_three_log_lines(data_loss, spread):
    watch = CollapseWatch(loss_of_equal_scores(LossConfig(), 64))
    healthy = {"train/data_loss": 3.0, "train/spread": 0.9}
    collapsed = {"train/data_loss": data_loss, "train/spread": spread}
    said = [watch.warning(f) for f in (collapsed, collapsed, healthy, collapsed, collapsed, collapsed, collapsed)]
    assert [bool(warning) for warning in said] == [False, False, False, False, False, True, False]
    assert "collapsed" in said[5]
