import pytest
import torch
from distributed.ranks import run_ranks

from facetrain.world import World


def collectives(world):
    rank = world.rank
    own = torch.full((rank, 2), float(rank))  # rank 0 has no rows
    caught = None
    try:
        with world.main_first():
            if world.is_main:
                raise ValueError("rank 0 could not")
    except ValueError as error:
        caught = str(error)
    order = []
    with world.main_first():
        order.append(rank)
    return {
        "even": world.all_gather(torch.tensor([rank])).tolist(),
        "uneven": world.all_gather_uneven(own)[:, 0].tolist(),
        "objects": world.all_gather_object({"rank": rank}),
        "broadcast": world.broadcast_object(f"from {rank}"),
        "mean": world.all_reduce_mean_(torch.tensor([float(rank)])).item(),
        "any": (world.any(rank == 1), world.any(False)),
        "caught": caught,
        "order": order,
    }


def test_every_rank_ends_with_the_same_values():
    results = run_ranks(collectives, 3)
    for rank, result in enumerate(results):
        assert result["even"] == [0, 1, 2]
        assert result["uneven"] == [1.0, 2.0, 2.0]
        assert result["objects"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert result["broadcast"] == "from 0"
        assert result["mean"] == 1.0
        assert result["any"] == (True, False)
        assert result["caught"] == "rank 0 could not"
        assert result["order"] == [rank]


def test_a_world_of_one_needs_no_process_group():
    world = World()
    x = torch.randn(3, 2, requires_grad=True)
    assert world.all_gather_with_grad(x) is x
    assert world.all_gather_uneven(x) is x
    assert world.broadcast_object(7) == 7
    with pytest.raises(ValueError, match="seen"), world.main_first():
        raise ValueError("seen")
