"""Greedy selection of hard classes: each added class is the one that violates most against those chosen before.

Dims: C candidate classes, D embedding width, N classes selected (`num`).
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facetrain.mining.scores import norms, on_grid


@dataclass(frozen=True)
class GreedyResult:
    """Classes in the order in which they were added."""

    order: NDArray[np.int64]
    """int64 [N]; rows of the candidates, none twice."""

    violations: NDArray[np.float32]
    """float32 [N]; each class's score when it was added, as an inner product; 0 for the first and for fillers."""

    ties: int
    """How many of the added classes were drawn among several of equal score."""

    fillers: int = 0
    """How many of the added classes were drawn without regard to scores, because none was left to be scored."""

    @property
    def mean_violation(self) -> float:
        """Mean score of the classes that were added for their score; 0 if there are none."""
        num_scored = len(self.order) - 1 - self.fillers
        return float(self.violations.sum(dtype=np.float64)) / num_scored if num_scored else 0.0


@torch.no_grad()
def greedy_classes(
    anchors_CD: Tensor,
    positives_CD: Tensor | None,
    num: int,
    generator: np.random.Generator,
    *,
    hinge: bool = False,
    margin: float = 0.0,
    similarity_cap: float | None = None,
    groups_C: NDArray[np.int64] | None = None,
    group_quota: int | None = None,
) -> GreedyResult:
    """Select classes that are hard for one another, exactly and one at a time.

    Starts from a random class and keeps adding the class c with the largest

        score(c | S) = max over s in S of <a_s, p_c> - <a_s, p_s>

    where S are the classes selected so far. Equal scores are drawn uniformly at random. Each added class costs one
    product with all positives and O(C) besides; memory is O(C) beyond the embeddings. Everything stays on the
    embeddings' device, and the host waits for it only at the end. `best_first_classes` gives the same lists from a
    graph that many batches share.

    Args:
        anchors_CD: one embedding of each class.
        positives_CD: an embedding of another image of each class, on the same device; None where there is one image a
            class: p = a then, and the second term is dropped.
        num: Classes to select, 1 to C.
        generator: Draws the first class and the ties.
        hinge: Add `margin` to scores and clip them at 0 from below, so that all classes that don't violate tie.
        margin: Margin of the hinge, in units of the inner product; without the hinge it would change nothing.
        similarity_cap: A class c with cos(a_s, p_c) above this for a selected s isn't added: it may be the same
            person. Where that leaves no class, any unselected one is drawn and counted as a filler.
        groups_C: the group of each class, from 0; None is one group.
        group_quota: Most classes that are selected from a group; every group has at least as many. None is `num`.

    Raises:
        ValueError: `num` is out of bounds, or an embedding isn't finite.

    Source: Sohn, NeurIPS 2016, section 3, which leaves the score open; the maximum is ours.
    """
    C, device = anchors_CD.shape[0], anchors_CD.device
    check_number(num, C)
    if not (anchors_CD.isfinite().all() and (positives_CD is None or positives_CD.isfinite().all())):
        raise ValueError("embeddings of the candidates: expected finite numbers, got NaN or infinity")
    # Rounded, so that classes with equal embeddings have equal scores and any other way to compute them gives the same.
    anchors_CD = on_grid(anchors_CD)
    p_CD = anchors_CD if positives_CD is None else on_grid(positives_CD)
    norm_a_C, norm_p_C = norms(anchors_CD), norms(p_CD)
    draws_N = torch.from_numpy(generator.random(num)).to(device)
    lowest, shift = (0.0, margin) if hinge else (-torch.inf, 0.0)
    best_C = torch.full((C,), lowest, device=device)
    taken_C = torch.zeros(C, dtype=torch.bool, device=device)
    capped_C = torch.zeros_like(taken_C)
    group_C = (
        torch.zeros_like(taken_C, dtype=torch.int64) if groups_C is None else torch.from_numpy(groups_C).to(device)
    )
    room_G = torch.full((int(group_C.max()) + 1,), group_quota or num, device=device)

    chosen = (draws_N[:1] * C).long()
    order, violations, choices = [chosen], [best_C.new_full((1,), -torch.inf)], [chosen.new_ones(1)]
    for n in range(1, num):
        taken_C.index_fill_(0, chosen, True)
        room_G[group_C[chosen]] -= 1
        closed_C = taken_C | (room_G[group_C] == 0)
        products_C = p_CD @ anchors_CD[chosen].squeeze(0)  # indexing by a scalar tensor would wait for it
        if similarity_cap is not None:
            capped_C |= products_C > similarity_cap * norm_a_C[chosen] * norm_p_C
        scores_C = products_C.float()
        if positives_CD is not None:
            scores_C = scores_C - scores_C[chosen]
        best_C = torch.maximum(best_C, scores_C + shift)
        open_C = best_C.masked_fill(closed_C | capped_C, -torch.inf)
        violation = open_C.max().view(1)
        equals_C = torch.where(violation.isneginf(), ~closed_C, open_C == violation)
        rank_among_equals_C = equals_C.cumsum(0)
        num_equal = rank_among_equals_C[-1:]
        # The draw is below 1 and num_equal far below 2^53, so their product never rounds up to num_equal.
        chosen = torch.searchsorted(rank_among_equals_C, (draws_N[n : n + 1] * num_equal).long() + 1)
        order.append(chosen)
        violations.append(violation)
        choices.append(num_equal)
    scored_N = ~torch.cat(violations).isneginf()
    return GreedyResult(
        order=torch.cat(order).cpu().numpy(),
        violations=torch.cat(violations).where(scored_N, 0.0).cpu().numpy(),
        ties=int((scored_N & (torch.cat(choices) > 1)).sum()),
        fillers=num - 1 - int(scored_N.sum()),
    )


def check_number(num: int, num_candidates: int) -> None:
    """Raise ValueError unless 1 <= num <= num_candidates."""
    if not 1 <= num <= num_candidates:
        raise ValueError(f"classes to select: expected 1 to {num_candidates}, the number of candidates, got {num}")
