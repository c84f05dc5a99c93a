import pytest
import torch
from distributed.ranks import run_ranks
from torch.utils.checkpoint import checkpoint

from facetrain.config import Config, LossConfig, TrainConfig
from facetrain.losses.npair import NPairLoss
from facetrain.world import World

PAIRS, WIDTH, STEPS = 8, 5, 5
CASES = [
    LossConfig(memory_batches=2),
    LossConfig(memory_batches=2, name="npair-ovo", temperature=0.5),
    LossConfig(memory_batches=9, name="tuplet"),
]


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Embeddings [2, N, D] and labels [N] of some steps; identities come back in later batches."""
    generator = torch.Generator().manual_seed(3)
    draw = {"generator": generator, "dtype": torch.float64}
    return [
        (torch.randn(2, PAIRS, WIDTH, **draw), torch.randperm(12, generator=generator)[:PAIRS]) for _ in range(STEPS)
    ]


def by_the_formula(config: LossConfig, step: int) -> torch.Tensor:
    """The loss of a step's pairs against those of its batch and of the batches remembered then, each pair in turn."""
    past = batches()[max(0, step - config.memory_batches) : step + 1]
    columns = torch.cat([faces[0 if config.name == "tuplet" else 1] for faces, _ in past])
    labels_K = torch.cat([labels for _, labels in past])
    (anchors, positives), labels_N = past[-1]
    if config.temperature:
        anchors, positives, columns = (torch.nn.functional.normalize(x) for x in (anchors, positives, columns))
        anchors = anchors / config.temperature
    losses = []
    for anchor, positive, label in zip(anchors, positives, labels_N, strict=True):
        margins = [anchor @ c - anchor @ positive for c, other in zip(columns, labels_K, strict=True) if other != label]
        exps = torch.stack(margins).exp()
        losses.append(exps.log1p().sum() if config.name == "npair-ovo" else exps.sum().log1p())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("config", CASES, ids=lambda config: config.name)
def test_negatives_are_those_of_this_batch_and_of_the_ones_remembered(config: LossConfig) -> None:
    loss = NPairLoss(config, World())
    for step, (faces, labels) in enumerate(batches()):
        torch.testing.assert_close(loss(*faces, labels).data, by_the_formula(config, step), rtol=1e-12, atol=0)


@pytest.mark.parametrize("config", CASES, ids=lambda config: config.name)
def test_gradients_are_right_and_none_goes_into_the_past(config: LossConfig) -> None:
    (before, its_labels), (faces, labels), *_ = batches()

    def data_loss(anchors: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
        loss = NPairLoss(config, World())
        loss(*before, its_labels)
        return loss(anchors, positives, labels).total

    def recomputed(*faces: torch.Tensor) -> torch.Tensor:  # gradcheck goes backward more than once
        return checkpoint(data_loss, *faces, use_reentrant=False)

    assert torch.autograd.gradcheck(recomputed, [x.requires_grad_() for x in faces])


def of_steps(world: World) -> list[list[tuple[float, torch.Tensor]]]:
    """Each case's mean loss and this rank's gradient, step by step; the loss is made anew from its state after two."""
    outcomes = []
    n = PAIRS // world.world_size
    for config in CASES:
        loss, outcomes_of_case = NPairLoss(config, world), []
        for step, (faces, labels) in enumerate(batches()):
            if step == 2:
                state = loss.state()
                loss = NPairLoss(config, world)
                loss.load_state(state)
            own = slice(world.rank * n, (world.rank + 1) * n)
            local = faces[:, own].clone().requires_grad_()
            value = loss(*local, labels[own])
            value.total.backward()
            mean = world.all_reduce_mean_(value.data.clone()).item()
            outcomes_of_case.append((mean, local.grad / world.world_size))
        outcomes.append(outcomes_of_case)
    return outcomes


def test_any_number_of_ranks_remembers_and_resumes_like_one() -> None:
    expected = of_steps(World())
    by_rank = run_ranks(of_steps, 4)
    for case, steps in enumerate(expected):
        for step, (mean, gradient) in enumerate(steps):
            assert [outcomes[case][step][0] for outcomes in by_rank] == pytest.approx([mean] * 4, rel=1e-12)
            parts = torch.cat([outcomes[case][step][1] for outcomes in by_rank], dim=1)
            torch.testing.assert_close(parts, gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("settings", "got"),
    [({"name": "softmax"}, "'softmax'"), ({"symmetric": True}, "loss.symmetric"), ({"memory_batches": -1}, "-1")],
)
def test_what_has_no_memory_is_refused(settings: dict[str, object], got: str) -> None:
    with pytest.raises(ValueError, match=f"loss.memory_batches: .*{got}"):
        LossConfig(**{"memory_batches": 1, **settings})  # type: ignore[arg-type]


def test_a_state_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a memory of labels and rows, got"):
        NPairLoss(CASES[0], World()).load_state({})


def test_a_tile_holds_a_row_with_what_is_remembered() -> None:
    with pytest.raises(
        ValueError, match=r"loss\.tile_bytes: .* 128 bytes of a row of scores, 4 for each .* = 8, got 127"
    ):
        Config(train=TrainConfig(global_pairs=8), loss=LossConfig(memory_batches=3, tile_bytes=127))
