"""Greedy selection of hard classes: each added class is the one that violates most against those chosen before.

Dims: C candidate classes, D embedding width, N classes selected (`num`).
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class GreedyResult:
    """Classes in the order in which they were added."""

    order: NDArray[np.int64]
    """int64 [N]; rows of the candidates, none twice."""

    violations: NDArray[np.float32]
    """float32 [N]; each class's score when it was added, as an inner product; 0 for the first, a random one."""

    ties: int
    """How many of the added classes were drawn among several of equal score."""


@torch.no_grad()
def greedy_classes(
    anchors_CD: Tensor,
    positives_CD: Tensor,
    num: int,
    generator: np.random.Generator,
    *,
    hinge: bool = False,
    margin: float = 0.0,
    groups_C: NDArray[np.int64] | None = None,
    group_quota: int = 0,
) -> GreedyResult:
    """Select classes that are hard for one another, exactly and one at a time.

    Starts from a random class and keeps adding the class c with the largest

        score(c | S) = max over s in S of <a_s, p_c> - <a_s, p_s>

    where S are the classes selected so far. Equal scores are drawn uniformly at random. Each added class costs one
    product with all positives and O(C) besides; memory is O(C) beyond the embeddings. Everything stays on the
    embeddings' device, and the host waits for it only at the end.

    Args:
        anchors_CD: float32; one embedding of each class.
        positives_CD: float32; an embedding of another image of each class, on the same device.
        num: Classes to select, 1 to C.
        generator: Draws the first class and the ties.
        hinge: Add `margin` to scores and clip them at 0 from below, so that all classes that don't violate tie.
        margin: Margin of the hinge, in units of the inner product; without the hinge it would change nothing.
        groups_C: int64; the group of each class, from 0. None is no groups.
        group_quota: Most classes that are selected from a group; every group has at least as many.

    Raises:
        ValueError: `num` is out of bounds, or an embedding isn't finite.

    Source: Sohn, NeurIPS 2016, section 3, which leaves the score open; the maximum is ours.
    """
    C = anchors_CD.shape[0]
    if not 1 <= num <= C:
        raise ValueError(f"classes to select: expected 1 to {C}, the number of candidates, got {num}")
    if not (anchors_CD.isfinite().all() and positives_CD.isfinite().all()):
        raise ValueError("embeddings of the candidates: expected finite numbers, got NaN or infinity")
    draws_N = torch.from_numpy(generator.random(num)).to(anchors_CD.device)
    lowest, shift = (0.0, margin) if hinge else (-torch.inf, 0.0)
    best_C = anchors_CD.new_full((C,), lowest)
    taken_C = torch.zeros(C, dtype=torch.bool, device=anchors_CD.device)
    groups_C = np.zeros(C, dtype=np.int64) if groups_C is None else groups_C
    group_on_device_C = torch.from_numpy(groups_C).to(anchors_CD.device)
    room_G = torch.full((int(groups_C.max()) + 1,), group_quota or num, device=anchors_CD.device)

    chosen = (draws_N[:1] * C).long()
    order, violations, choices = [chosen], [best_C.new_zeros(1)], [chosen.new_ones(1)]
    for n in range(1, num):
        taken_C.index_fill_(0, chosen, True)
        room_G[group_on_device_C[chosen]] -= 1
        products_C = positives_CD @ anchors_CD[chosen].squeeze(0)  # indexing by a scalar tensor would wait for it
        # <a_s, p_s> is read from the same product, so that classes with equal embeddings have equal scores.
        best_C = torch.maximum(best_C, products_C - products_C[chosen] + shift)
        open_C = best_C.masked_fill(taken_C | (room_G[group_on_device_C] == 0), -torch.inf)
        violation = open_C.max().view(1)
        rank_among_equals_C = (open_C == violation).cumsum(0)
        num_equal = rank_among_equals_C[-1:]
        # The draw is below 1 and num_equal far below 2^53, so their product never rounds up to num_equal.
        chosen = torch.searchsorted(rank_among_equals_C, (draws_N[n : n + 1] * num_equal).long() + 1)
        order.append(chosen)
        violations.append(violation)
        choices.append(num_equal)
    return GreedyResult(
        order=torch.cat(order).cpu().numpy(),
        violations=torch.cat(violations).float().cpu().numpy(),
        ties=int((torch.cat(choices) > 1).sum()),
    )
