"""Normalisation: the layer that `model.norm` names, and batch statistics over the images of all ranks."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from facetrain.world import World

Norm = Literal["batch", "group", "none"]
"""batch: BatchNorm; group: GroupNorm, each image by itself; none: no normalisation at all."""

CHANNELS_PER_GROUP = 16
"""Channels that GroupNorm normalises together. Source: Wu and He, "Group Normalization", ECCV 2018, table 3."""


def norm2d(norm: Norm, channels: int) -> nn.Module:
    """Return the normalisation of a feature map [B, channels, H, W]; channels is a multiple of 16 for 'group'."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        return nn.GroupNorm(channels // CHANNELS_PER_GROUP, channels)
    return nn.Identity()


def convert_sync_batchnorm(module: nn.Module, world: World) -> nn.Module:
    """Let every BatchNorm of a network take its training statistics over the images of all ranks.

    Call it before the optimizer and the engine are made. Parameters, buffers and the names of both stay as they are,
    so that weights load with and without it. One rank needs no exchange and keeps its layers. Otherwise:
    torch.nn.SyncBatchNorm on CUDA and, since that refuses CPU tensors, AllRanksBatchNorm on CPU.

    Args:
        module: The network; its layers are replaced in place.
        world: The ranks that the statistics go over.

    Returns:
        The network, which is another object only where `module` itself is a BatchNorm.
    """
    if world.world_size == 1:
        return module
    if world.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-any-return]
    if isinstance(module, _BatchNorm):
        return AllRanksBatchNorm(module, world)
    for name, child in module.named_children():
        setattr(module, name, convert_sync_batchnorm(child, world))
    return module


class AllRanksBatchNorm(_BatchNorm):
    """BatchNorm of [B, D] or [B, D, ...] whose training statistics are over the images of all ranks, on any device.

    Ranks may hold different numbers of images, but each at least one, and all must run forward and backward together.
    Statistics are float32 or better, also for bfloat16 input. Normalises by the biased variance; the running
    variance takes the unbiased one, as torch.nn.BatchNorm2d does.
    """

    def __init__(self, source: _BatchNorm, world: World) -> None:
        """Take over the parameters, buffers and settings of `source`, which are shared with it, not copied."""
        super().__init__(
            source.num_features, source.eps, source.momentum, source.affine, source.track_running_stats, device="meta"
        )
        self.world = world
        self.weight, self.bias = source.weight, source.bias
        self.running_mean, self.running_var = source.running_mean, source.running_var
        self.num_batches_tracked = source.num_batches_tracked
        self.train(source.training)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [B, D, ...]; the output has the input's shape, dtype and memory format."""
        if not self.training and self.running_mean is not None:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        mean, var, count = _global_statistics(input.detach(), self.world)
        if self.training and self.running_mean is not None:
            self._update_running(mean, var * (count / (count - 1)))
        return _Normalise.apply(input, self.weight, self.bias, mean, var, count, self.eps, self.world)  # type: ignore[no-any-return]

    @torch.no_grad()
    def _update_running(self, mean: Tensor, unbiased_var: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        # torch's convention: without a momentum, running statistics are the plain average over all batches so far.
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased_var.to(self.running_var.dtype), share)


def _global_statistics(x: Tensor, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean [D], biased variance [D] and the number of values per channel [] over all ranks.

    Source: Chan, Golub and LeVeque, "Updating formulae ... for computing sample variances", 1979: the squared
    deviations of the parts, plus those of their means. E[x^2] - E[x]^2 would cancel where |mean| >> std.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = torch.zeros(2, x.shape[1], dtype=dtype, device=x.device)
    # Means and biased variances come in the dtype of the running buffers it is handed; those are not used otherwise.
    mean_D, var_D = torch.batch_norm_update_stats(x, wide[0], wide[1], 0.0)
    count = mean_D.new_tensor([x.numel() // x.shape[1]])
    # Over all ranks: every rank gets the statistics of every rank's own images.
    gathered = world.all_gather(torch.cat([mean_D, var_D, count])[None])
    means_WD, vars_WD, counts_W1 = gathered.tensor_split((len(mean_D), 2 * len(mean_D)), dim=1)
    total = counts_W1.sum()
    shares_W1 = counts_W1 / total
    mean = (shares_W1 * means_WD).sum(0)
    var = (shares_W1 * (vars_WD + (means_WD - mean).square())).sum(0)
    return mean, var, total


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, where mean and var depend on the x of all ranks.

    Backward is that of fixed statistics, dx0, less a term that is affine in x (w weight, s = sqrt(var + eps), x^ the
    normalised input, M values per channel; sums over all ranks):
        dx = dx0 - w / (s M) * (sum dy + x^ * sum (dy x^)).
    Gradients of weight and bias are of the local images; the engine reduces those over ranks like any other.
    Source: Ioffe and Szegedy, ICML 2015, section 3, collected.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        eps: float,
        world: World,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps, ctx.world = eps, world
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, count = ctx.saved_tensors
        scale = torch.ones_like(mean) if weight is None else weight
        dx0, sum_dy_xhat, sum_dy = torch.ops.aten.native_batch_norm_backward(
            dy, x, scale, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        # Over all ranks: every rank gets both sums of every rank's own images.
        total_dy_xhat, total_dy = ctx.world.all_gather(torch.stack([sum_dy_xhat, sum_dy])[None]).sum(0)
        factor = scale * (var + ctx.eps).rsqrt() / count
        dx = dx0 - F.batch_norm(x, mean, var, factor * total_dy_xhat, factor * total_dy, eps=ctx.eps)
        d_weight, d_bias = (None, None) if weight is None else (sum_dy_xhat, sum_dy)
        return dx, d_weight, d_bias, None, None, None, None, None
