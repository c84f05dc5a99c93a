"""Losses over the n x N logits of a rank, which never exist whole: they are made in tiles of rows.

Dims: n local rows, N columns (the rows of all ranks), P columns of the past, K = N + P, t rows of a tile, D embedding
width. All tensors are local. The logits <f_i, g_j> of one identity are masked: pairs with one label are no negatives of
each other.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from facetrain.config import LossConfig
from facetrain.world import World

RowLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From logits [t, N], the lowest number where masked, and own scores [t]: the rows' losses, and their derivatives by
the own score, negated. What it leaves in the place of the logits are the derivatives by them."""


def one_vs_all(logits_tN: Tensor, own_t: Tensor) -> tuple[Tensor, Tensor]:
    """Take log(1 + sum_j exp(s_ij - own_i)) of each row i: a RowLoss.

    Computed as softplus(logsumexp_j s_ij - own_i). The own score never enters the logsumexp: written as a
    cross-entropy the attracting gradient p_ii - 1 cancels once the loss is small (it is lost below about 1e-7 in
    float32), and written as in the formula the exponential overflows. A row without negatives has loss 0, gradient 0.
    """
    maxima_t = logits_tN.amax(dim=1)
    softmax_tN = torch.softmax(logits_tN, dim=1, out=logits_tN)  # uniform in a row without negatives; its pull is 0
    margins_t = own_t.sub(maxima_t).add_(softmax_tN.amax(dim=1).log_())  # the largest is exp(0) over the row's sum
    pull_t = margins_t.neg().sigmoid_()
    softmax_tN.mul_(pull_t[:, None])
    return -F.logsigmoid(margins_t), pull_t


def one_vs_one(logits_tN: Tensor, own_t: Tensor) -> tuple[Tensor, Tensor]:
    """Take sum_j log(1 + exp(s_ij - own_i)) of each row i: a RowLoss."""
    losses_t = F.softplus(logits_tN.sub_(own_t[:, None])).sum(dim=1)
    return losses_t, logits_tN.sigmoid_().sum(dim=1)


def sum_of_rows(
    row_loss: RowLoss,
    anchors_nD: Tensor,
    negatives_ND: Tensor,
    labels_n: Tensor,
    labels_N: Tensor,
    *,
    first: int = 0,
    own_n: Tensor | None = None,
    past: tuple[Tensor, Tensor] | None = None,
    tile_bytes: int = LossConfig.tile_bytes,
) -> Tensor:
    """Return the sum of a loss of each row, with gradient.

    Args:
        row_loss: What a row's loss is.
        anchors_nD: Embeddings f of the rows.
        negatives_ND: Embeddings g of the columns.
        labels_n: int64, identities of the rows.
        labels_N: int64, identities of the columns.
        first: Column of the own positive of row 0; that of row i is first + i.
        own_n: Scores of the own positives where they are no columns; `first` then says nothing.
        past: Labels [P] and embeddings [P, D] of further columns, which take no gradient.
        tile_bytes: Size of a tile of logits, 1 or more; a tile is a row at least.
    """
    labels_K, past_PD = (labels_N, None) if past is None else (torch.cat([labels_N, past[0]]), past[1])
    total: Tensor = _SumOfRows.apply(
        row_loss, anchors_nD, negatives_ND, past_PD, own_n, labels_n, labels_K, first, tile_bytes
    )
    return total


class _SumOfRows(torch.autograd.Function):
    """`sum_of_rows`. The gradient is made beside the value, since it is known but for a factor.

    So there are three products instead of the four of computing a tile again in backward, all logits are made in one
    tile that is overwritten step by step, and nothing but the gradients waits for backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        row_loss: RowLoss,
        anchors_nD: Tensor,
        negatives_ND: Tensor,
        past_PD: Tensor | None,
        own_n: Tensor | None,
        labels_n: Tensor,
        labels_K: Tensor,
        first: int,
        tile_bytes: int,
    ) -> Tensor:
        with_gradient = any(ctx.needs_input_grad)
        columns_KD = negatives_ND if past_PD is None else torch.cat([negatives_ND, past_PD])
        rows = _rows_of_a_tile(anchors_nD, columns_KD, tile_bytes)
        buffer_tK = anchors_nD.new_empty(min(rows, len(anchors_nD)), len(columns_KD))
        grads = [torch.empty_like(x) for x in (anchors_nD, negatives_ND)] if with_gradient else []
        losses, pulls = [], []
        for start in range(0, len(anchors_nD), rows):
            tile = slice(start, start + rows)
            anchors_tD = anchors_nD[tile]
            logits_tK = torch.mm(anchors_tD, columns_KD.T, out=buffer_tK[: len(anchors_tD)])
            diagonal_t = logits_tK.diagonal(first + start)[: len(anchors_tD)]  # a view: the own positives' logits
            own_t = diagonal_t.clone() if own_n is None else own_n[tile]
            logits_tK.masked_fill_(labels_n[tile, None] == labels_K, torch.finfo(logits_tK.dtype).min)
            losses_t, pull_t = row_loss(logits_tK, own_t)
            losses.append(losses_t)
            if with_gradient:
                if own_n is None:
                    diagonal_t.copy_(pull_t).neg_()
                pulls.append(pull_t)
                torch.mm(logits_tK, columns_KD, out=grads[0][tile])
                grads[1].addmm_(logits_tK[:, : len(negatives_ND)].T, anchors_tD, beta=0 if start == 0 else 1)
        if with_gradient and own_n is not None:
            grads.append(torch.cat(pulls).neg_())
        ctx.save_for_backward(*grads)
        return torch.cat(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a second backward through the same graph is refused by autograd, never wrong.
        grad_anchors_nD, grad_negatives_ND, *grad_own = (x.mul_(grad) for x in ctx.saved_tensors)
        grad_own_n = grad_own[0] if grad_own else None
        return None, grad_anchors_nD, grad_negatives_ND, None, grad_own_n, None, None, None, None


def rows_and_columns(
    anchors_nD: Tensor, negatives_ND: Tensor, labels_n: Tensor, labels_N: Tensor, *, tile_bytes: int, world: World
) -> tuple[Tensor, Tensor]:
    """Return the logsumexp [n] of each local row and of each local pair's column over all ranks' rows, with gradient.

    -inf where a row or column has no negatives. Arguments as in `sum_of_rows`.
    """
    rows_n, columns_n = _RowsAndColumns.apply(anchors_nD, negatives_ND, labels_n, labels_N, tile_bytes, world)
    return rows_n, columns_n


class _RowsAndColumns(torch.autograd.Function):
    """`rows_and_columns`. No more than two tiles exist at a time: backward computes each of them again.

    Forward: an all-reduce of the N columns' maxima and one of their sums of exponentials; every rank ends with both
    whole. Backward: an all-gather of the columns' gradients (N numbers), which only their owners know; then each
    rank's rows give its share of every column's gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchors_nD: Tensor,
        negatives_ND: Tensor,
        labels_n: Tensor,
        labels_N: Tensor,
        tile_bytes: int,
        world: World,
    ) -> tuple[Tensor, Tensor]:
        rows, columns_N = [], anchors_nD.new_full((len(negatives_ND),), -torch.inf)
        for _, logits_tN in _logit_tiles(anchors_nD, negatives_ND, labels_n, labels_N, tile_bytes):
            rows.append(logits_tN.logsumexp(dim=1))
            columns_N = torch.logaddexp(columns_N, logits_tN.logsumexp(dim=0))
        # Over all ranks: the columns' parts are added where the largest of them is 1, so that nothing overflows.
        maxima_N = world.all_reduce_max_(columns_N.clone())
        finite_N = maxima_N.masked_fill(maxima_N.isneginf(), 0.0)
        sums_N = world.all_reduce_sum_((columns_N - finite_N).exp_())
        columns_N, rows_n = sums_N.log_().add_(finite_N), torch.cat(rows)
        ctx.tile_bytes, ctx.world = tile_bytes, world
        ctx.save_for_backward(anchors_nD, negatives_ND, labels_n, labels_N, rows_n, columns_N)
        return rows_n, columns_N[world.rank * len(rows_n) :][: len(rows_n)].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows_n: Tensor, grad_columns_n: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, rows_n, columns_N = ctx.saved_tensors
        grad_columns_N = ctx.world.all_gather(grad_columns_n)
        shifts_n, shifts_N = _finite_shifts(rows_n), _finite_shifts(columns_N)

        def grad_of_logits(tile: slice, logits_tN: Tensor) -> Tensor:
            by_columns_tN = (logits_tN - shifts_N).exp_().mul_(grad_columns_N)
            by_rows_tN = logits_tN.sub_(shifts_n[tile, None]).exp_().mul_(grad_rows_n[tile, None])
            return by_rows_tN.add_(by_columns_tN)

        return *_gradients(inputs, ctx.tile_bytes, grad_of_logits), None, None, None, None


def _logit_tiles(
    anchors_nD: Tensor, negatives_ND: Tensor, labels_n: Tensor, labels_N: Tensor, tile_bytes: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the logits [t, N] of each tile of rows, -inf where the identities are the same; free to be overwritten."""
    rows = _rows_of_a_tile(anchors_nD, negatives_ND, tile_bytes)
    for start in range(0, len(anchors_nD), rows):
        tile = slice(start, start + rows)
        logits_tN = anchors_nD[tile] @ negatives_ND.T
        yield tile, logits_tN.masked_fill_(labels_n[tile, None] == labels_N, -torch.inf)


def _gradients(
    inputs: Sequence[Tensor], tile_bytes: int, grad_of_logits: Callable[[slice, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the gradients of anchors and negatives, tile by tile, from what makes a tile's gradient of its logits."""
    anchors_nD, negatives_ND, labels_n, labels_N = inputs
    grad_anchors_nD, grad_negatives_ND = torch.empty_like(anchors_nD), torch.zeros_like(negatives_ND)
    for tile, logits_tN in _logit_tiles(anchors_nD, negatives_ND, labels_n, labels_N, tile_bytes):
        grad_tN = grad_of_logits(tile, logits_tN)
        torch.mm(grad_tN, negatives_ND, out=grad_anchors_nD[tile])
        grad_negatives_ND.addmm_(grad_tN.T, anchors_nD[tile])
    return grad_anchors_nD, grad_negatives_ND


def _rows_of_a_tile(anchors_nD: Tensor, negatives_ND: Tensor, tile_bytes: int) -> int:
    return max(1, tile_bytes // (len(negatives_ND) * anchors_nD.element_size()))


def _finite_shifts(logsumexps: Tensor) -> Tensor:
    """Return what to subtract from logits: where nothing was summed exp(-inf - inf) is 0, exp(-inf - -inf) is NaN."""
    return logsumexps.masked_fill(logsumexps.isneginf(), torch.inf)
