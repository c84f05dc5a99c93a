"""The multi-class N-pair loss and its relatives over the pairs of all ranks.

Dims: n pairs on this rank, N pairs of the global batch (N = n * world size), t rows of a tile, D embedding width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from facetrain.config import LossConfig
from facetrain.world import GatherInFlight, World


@dataclass(frozen=True)
class LossValue:
    """This rank's share of the global loss: averaged over the ranks, each field is that of the global batch."""

    total: Tensor
    """What is differentiated: npair + l2_weight * mean squared norm. Scalar."""
    npair: Tensor
    """The N-pair loss alone, detached. Scalar."""
    squared_norm: Tensor
    """Mean ||f||^2 over the 2n embeddings, detached. Scalar."""


class NPairLoss:
    """N-pair-mc, N-pair-ovo or (N+1)-tuplet with a penalty on the norms; row-local anchors, negatives of all ranks.

    With anchors f_i, positives p_i, and sums over the j of other identities than i's:

        npair-mc    log(1 + sum_j exp(<f_i, p_j> - <f_i, p_i>))
        npair-ovo   sum_j log(1 + exp(<f_i, p_j> - <f_i, p_i>))
        tuplet      log(1 + sum_j exp(<f_i, f_j> - <f_i, p_i>))     negatives are the other pairs' anchors

    `loss.symmetric` (npair-mc) takes the mean of this and of the same with anchors and positives in each other's
    place. With `loss.temperature` inner products are cosines over the temperature; the penalty stays on raw norms.

    Source: Sohn, Improved deep metric learning with multi-class N-pair loss objective, NeurIPS 2016, equations 3, 7, 8.
    """

    def __init__(self, config: LossConfig, world: World) -> None:
        self.config = config
        self.world = world

    def start_gather(self, positives_nD: Tensor) -> GatherInFlight:
        """Start to gather what every rank needs of the others; what is computed before the loss runs beside it."""
        dtypes = {"float32": None, "bfloat16": torch.bfloat16}
        with torch.autocast(positives_nD.device.type, enabled=False):
            gathered = _at_least_float32(positives_nD)
            return self.world.start_gather_with_grad(gathered, reduce_dtype=dtypes[self.config.reduce_precision])

    def __call__(
        self, anchors_nD: Tensor, positives_nD: Tensor, labels_n: Tensor, gather: GatherInFlight | None = None
    ) -> LossValue:
        """Return this rank's share of the loss of the global batch.

        Only one side travels, the positives (tuplet: the anchors): it is gathered with gradient, so that averaging
        parameter gradients over ranks (what DeepSpeed does) gives the gradient of the global batch. Sums are divided
        by constants (n, 2n), never by what happens to be in the batch.

        Args:
            anchors_nD: Embeddings, not normalised; bf16 is raised to float32, float64 is kept.
            positives_nD: Embeddings of the same identities, row by row.
            labels_n: int64; pairs with one label are no negatives of each other.
            gather: What `start_gather` returned for these positives (tuplet: anchors); None gathers now.
        """
        config = self.config
        with torch.autocast(anchors_nD.device.type, enabled=False):
            anchors_nD, positives_nD = _at_least_float32(anchors_nD), _at_least_float32(positives_nD)
            squared_norm = (_SquaredSum.apply(anchors_nD) + _SquaredSum.apply(positives_nD)) / (2 * len(anchors_nD))
            # Over all ranks; each ends with all N negatives and labels, in rank order.
            gather = gather or self.start_gather(anchors_nD if config.name == "tuplet" else positives_nD)
            labels_N, negatives_ND = self.world.all_gather(labels_n), gather.finish()
            if config.temperature is not None:
                anchors_nD = F.normalize(anchors_nD) / config.temperature
                positives_nD, negatives_ND = F.normalize(positives_nD), F.normalize(negatives_ND)
            npair = self._sum(anchors_nD, positives_nD, negatives_ND, labels_n, labels_N) / len(anchors_nD)
            total = npair + config.l2_weight * squared_norm if config.l2_weight else npair
        return LossValue(total=total, npair=npair.detach(), squared_norm=squared_norm.detach())

    def _sum(
        self, anchors_nD: Tensor, positives_nD: Tensor, negatives_ND: Tensor, labels_n: Tensor, labels_N: Tensor
    ) -> Tensor:
        """Return the sum of the local pairs' losses."""
        tile_bytes = self.config.tile_bytes
        if self.config.name == "npair-ovo":
            return npair_ovo_rows(anchors_nD, positives_nD, negatives_ND, labels_n, labels_N, tile_bytes).sum()
        if self.config.name == "tuplet":
            return npair_mc_rows(anchors_nD, positives_nD, negatives_ND, labels_n, labels_N, tile_bytes).sum()
        if not self.config.symmetric:
            first = self.world.rank * len(anchors_nD)
            return _SumOfRows.apply(anchors_nD, negatives_ND, labels_n, labels_N, first, tile_bytes)  # type: ignore[no-any-return]
        rows_n, columns_n = _NegativesOfRowsAndColumns.apply(
            anchors_nD, negatives_ND, labels_n, labels_N, tile_bytes, self.world
        )
        own_n = _own_scores(anchors_nD, positives_nD)
        return -0.5 * (F.logsigmoid(own_n - rows_n) + F.logsigmoid(own_n - columns_n)).sum()


def npair_mc_rows(
    anchors_nD: Tensor,
    positives_nD: Tensor,
    negatives_ND: Tensor,
    labels_n: Tensor,
    labels_N: Tensor,
    tile_bytes: int = LossConfig.tile_bytes,
) -> Tensor:
    """Return log(1 + sum_j exp(<f_i, g_j> - <f_i, p_i>)) for each local anchor i, over all j of another identity.

    Computed as softplus(logsumexp_j s_ij - s_ii). The own positive never enters the logsumexp: written as a
    cross-entropy the attracting gradient p_ii - 1 cancels once the loss is small (it is lost below about 1e-7 in
    float32), and written as in the formula the exponential overflows. A row without negatives has loss 0, gradient 0.

    Args:
        anchors_nD: Local anchors, [n, D].
        positives_nD: Their positives, row by row, [n, D].
        negatives_ND: Embeddings g of all ranks, [N, D]: the positives (N-pair-mc) or the anchors (tuplet).
        labels_n: int64, identities of the local rows.
        labels_N: int64, identities of the gathered rows.
        tile_bytes: Size of a tile of logits, 1 or more; about two tiles exist at a time, in forward and in backward.

    Returns:
        [n], in the dtype of the embeddings.
    """
    negatives_n: Tensor = _NegativesLogsumexp.apply(anchors_nD, negatives_ND, labels_n, labels_N, tile_bytes)
    return -F.logsigmoid(_own_scores(anchors_nD, positives_nD) - negatives_n)


def npair_ovo_rows(
    anchors_nD: Tensor,
    positives_nD: Tensor,
    negatives_ND: Tensor,
    labels_n: Tensor,
    labels_N: Tensor,
    tile_bytes: int = LossConfig.tile_bytes,
) -> Tensor:
    """Return sum_j log(1 + exp(<f_i, g_j> - <f_i, p_i>)) for each local anchor i; arguments as in `npair_mc_rows`."""
    own_n = _own_scores(anchors_nD, positives_nD)
    return _OneVsOne.apply(anchors_nD, negatives_ND, own_n, labels_n, labels_N, tile_bytes)  # type: ignore[no-any-return]


class _NegativesLogsumexp(torch.autograd.Function):
    """logsumexp over j of <f_i, g_j>, without the j of i's own identity; -inf for a row without negatives.

    All tensors are local. No more than a tile of rows of the n x N logits exists at a time: forward keeps one number
    a row, and backward computes each tile again, so that memory doesn't grow with n.
    """

    @staticmethod
    def forward(
        ctx: Any, anchors_nD: Tensor, negatives_ND: Tensor, labels_n: Tensor, labels_N: Tensor, tile_bytes: int
    ) -> Tensor:
        ctx.tile_bytes = tile_bytes
        tiles = _logit_tiles(anchors_nD, negatives_ND, labels_n, labels_N, tile_bytes)
        sums_n = torch.cat([logits_tN.logsumexp(dim=1) for _, logits_tN in tiles])
        ctx.save_for_backward(anchors_nD, negatives_ND, labels_n, labels_N, sums_n)
        return sums_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_n: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        *inputs, sums_n = ctx.saved_tensors
        shifts_n = _finite_shifts(sums_n)

        def grad_of_logits(tile: slice, logits_tN: Tensor) -> Tensor:
            return logits_tN.sub_(shifts_n[tile, None]).exp_().mul_(grad_n[tile, None])

        return *_gradients(inputs, ctx.tile_bytes, grad_of_logits), None, None, None


class _SumOfRows(torch.autograd.Function):
    """The sum of `npair_mc_rows` where the own positive p_i is row `first` + i of the gathered embeddings.

    All tensors are local. The gradient is made beside the value, since it is known but for a factor: of the logits of a
    row it is sigmoid(loss's argument) times softmax for the negatives, and minus that sigmoid for the own positive. So
    there are three products instead of the four of computing a tile again in backward, all logits are made in one tile
    that is overwritten step by step, and nothing but the two gradients waits for backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchors_nD: Tensor,
        negatives_ND: Tensor,
        labels_n: Tensor,
        labels_N: Tensor,
        first: int,
        tile_bytes: int,
    ) -> Tensor:
        with_gradient = any(ctx.needs_input_grad)
        rows = max(1, tile_bytes // (len(negatives_ND) * anchors_nD.element_size()))
        buffer_tN = anchors_nD.new_empty(min(rows, len(anchors_nD)), len(negatives_ND))
        grads = (torch.empty_like(anchors_nD), torch.empty_like(negatives_ND)) if with_gradient else ()
        limits, losses = torch.finfo(anchors_nD.dtype), []
        for start in range(0, len(anchors_nD), rows):
            tile = slice(start, start + rows)
            anchors_tD = anchors_nD[tile]
            logits_tN = torch.mm(anchors_tD, negatives_ND.T, out=buffer_tN[: len(anchors_tD)])
            own_t = logits_tN.diagonal(first + start)[: len(anchors_tD)]  # a view: the own positives' logits
            own_scores_t = own_t.clone()
            logits_tN.masked_fill_(labels_n[tile, None] == labels_N, -torch.inf)
            # Where a row has no negatives its maximum is -inf, its sum 0, its loss and its gradient 0.
            maxima_t1 = logits_tN.amax(dim=1, keepdim=True).clamp_min_(limits.min)
            sums_t = logits_tN.sub_(maxima_t1).exp_().sum(dim=1)
            margins_t = own_scores_t.sub_(maxima_t1[:, 0]).sub_(sums_t.log())
            losses.append(F.logsigmoid(margins_t))
            if grads:
                pull_t = margins_t.neg_().sigmoid_()
                grad_tN = logits_tN.mul_((pull_t / sums_t.clamp_min_(limits.tiny))[:, None])
                own_t.copy_(pull_t).neg_()
                torch.mm(grad_tN, negatives_ND, out=grads[0][tile])
                grads[1].addmm_(grad_tN.T, anchors_tD, beta=0 if start == 0 else 1)
        ctx.grads = grads
        return -torch.cat(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_anchors_nD, grad_negatives_ND = ctx.grads
        return grad_anchors_nD * grad, grad_negatives_ND * grad, None, None, None, None


class _SquaredSum(torch.autograd.Function):
    """The sum of squares, without a temporary as large as the tensor in forward, with one in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.dot(x.reshape(-1), x.reshape(-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        return x * (2 * grad)


class _OneVsOne(torch.autograd.Function):
    """sum over j of softplus(<f_i, g_j> - own_i), without the j of i's own identity, in tiles; all tensors local."""

    @staticmethod
    def forward(
        ctx: Any,
        anchors_nD: Tensor,
        negatives_ND: Tensor,
        own_n: Tensor,
        labels_n: Tensor,
        labels_N: Tensor,
        tile_bytes: int,
    ) -> Tensor:
        ctx.tile_bytes = tile_bytes
        ctx.save_for_backward(anchors_nD, negatives_ND, labels_n, labels_N, own_n)
        tiles = _logit_tiles(anchors_nD, negatives_ND, labels_n, labels_N, tile_bytes)
        return torch.cat([F.softplus(logits_tN.sub_(own_n[tile, None])).sum(dim=1) for tile, logits_tN in tiles])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_n: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        *inputs, own_n = ctx.saved_tensors
        grad_own_n = torch.empty_like(own_n)

        def grad_of_logits(tile: slice, logits_tN: Tensor) -> Tensor:
            weights_tN = logits_tN.sub_(own_n[tile, None]).sigmoid_().mul_(grad_n[tile, None])
            grad_own_n[tile] = -weights_tN.sum(dim=1)
            return weights_tN

        return *_gradients(inputs, ctx.tile_bytes, grad_of_logits), grad_own_n, None, None, None


class _NegativesOfRowsAndColumns(torch.autograd.Function):
    """The logsumexp of each local row, as `_NegativesLogsumexp`, and of each local pair's column over all ranks' rows.

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
    rows = max(1, tile_bytes // (len(negatives_ND) * anchors_nD.element_size()))
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


def _finite_shifts(logsumexps: Tensor) -> Tensor:
    """Return what to subtract from logits: where nothing was summed exp(-inf - inf) is 0, exp(-inf - -inf) is NaN."""
    return logsumexps.masked_fill(logsumexps.isneginf(), torch.inf)


def _own_scores(anchors_nD: Tensor, positives_nD: Tensor) -> Tensor:
    return (anchors_nD * positives_nD).sum(dim=1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
