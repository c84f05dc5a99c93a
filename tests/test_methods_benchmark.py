"""benchmarks/methods.py: which runs it does, in which order, and what it takes from their lines."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from commands import ROOT

CHOSEN = ["untrained", "softmax", "npair-mc 32", "npair-mc 96"]
HELDOUT = {"untrained": 0.5, "softmax": 0.6, "npair-mc 32": 0.9, "npair-mc 96": 0.8}


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import methods

    return methods


@pytest.fixture
def args(methods: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    files = ("--shards", "s", "--lfw-images", "i", "--pairs", "p", "--open-set-people", "o", "--work", "w")
    chosen = ("--leaders", "1", "--rates", "0.001", "0.003", "--methods", *CHOSEN)
    monkeypatch.setattr(sys, "argv", ["methods.py", *files, *chosen, "--out", str(tmp_path / "methods.jsonl")])
    return methods.parse_arguments()  # type: ignore[no-any-return]


def record(run: Any, methods: ModuleType, args: Namespace) -> dict[str, Any]:
    """A finished run, which at 3e-3 is better on held-out people than at 1e-3, but for npair-mc 32."""
    better = (run.rate == 0.003) != (run.method == "npair-mc 32")
    heldout = HELDOUT[run.method] + 0.01 * better + 0.001 * run.seed
    return {"run": vars(run), "conditions": methods.conditions_of(args), "heldout": heldout, "step_s": 2.0}


def finish(methods: ModuleType, args: Namespace, *, at_most: int | None = None) -> list[tuple[str, str, float, int]]:
    """Do what is to be done, or the first runs of it, and return it."""
    done = []
    for run in methods.runs_to_do(args):
        if len(done) == at_most:
            break
        done.append((run.stage, run.method, run.rate, run.seed))
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record(run, methods, args)) + "\n")
    return done


def test_the_rate_and_the_leaders_are_chosen_on_held_out_people(methods: ModuleType, args: Namespace) -> None:
    done = finish(methods, args)
    trained = CHOSEN[1:]
    assert done[:6] == [("grid", method, rate, 0) for rate in (0.001, 0.003) for method in trained]
    best = {"softmax": 0.003, "npair-mc 32": 0.001, "npair-mc 96": 0.003}
    assert done[6:10] == [("final", "untrained", 0.001, 0), *(("final", method, best[method], 0) for method in trained)]
    assert done[10:12] == [("final", "npair-mc 32", 0.001, seed) for seed in (1, 2)]
    assert done[12:] == [("timing", method, 0.001, 0) for method in trained]


@pytest.mark.parametrize("stopped_after", [1, 6, 8, 11])
def test_it_goes_on_where_it_stopped(methods: ModuleType, args: Namespace, stopped_after: int) -> None:
    whole = finish(methods, args)
    args.out.unlink()
    assert finish(methods, args, at_most=stopped_after) + finish(methods, args) == whole
    assert finish(methods, args) == []


def test_runs_of_a_rate_that_is_no_longer_the_best_do_not_count(methods: ModuleType, args: Namespace) -> None:
    finish(methods, args)
    args.rates = [0.003]
    finish(methods, args)
    found = methods.finals(methods.read(args.out), args)
    assert {method: [r["run"]["rate"] for r in runs] for method, runs in found.items()} == {
        "untrained": [0.001],
        "softmax": [0.003],
        "npair-mc 32": [0.003, 0.003, 0.003],
        "npair-mc 96": [0.003],
    }


def test_runs_under_other_conditions_are_refused(methods: ModuleType, args: Namespace) -> None:
    finish(methods, args, at_most=1)
    methods.check_conditions(methods.read(args.out), args)
    args.precision = "float32"
    with pytest.raises(SystemExit, match=r"methods\.jsonl: holds runs of .*'precision': None.* got .*'float32'"):
        methods.check_conditions(methods.read(args.out), args)


def test_recall_and_triplet_loss_of_a_few_faces(methods: ModuleType) -> None:
    from methods_quality import recall_at_1, triplet_loss

    labels = np.array([4, 4, 6, 6])
    angles = torch.deg2rad(torch.tensor([0.0, 10.0, 100.0, 140.0]))
    units = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert recall_at_1(units, labels) == 1.0
    assert recall_at_1(units, np.array([4, 6, 6, 4])) == 0.0
    assert triplet_loss(units, labels) == 0.0  # the farthest positive is 40 degrees away, the nearest negative 90
    assert triplet_loss(torch.ones(4, 2) / 2**0.5, labels) == pytest.approx(0.2)
    apart = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[[0, 1, 0, 1]]  # the positive at 2, a negative at 0 or 2
    assert triplet_loss(apart, labels) == pytest.approx((2.2 + 0.2) / 2, rel=0.05)
