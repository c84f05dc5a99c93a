"""ClassVectors: one learned vector for each identity, sharded over the ranks, and how losses sum over all of them.

Dims: C classes, c of them on this rank, M faces of the global batch, t classes of a tile, D embedding width.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from facetrain.config import ClassesConfig, TrainConfig
from facetrain.world import World


class ClassVectors:
    """The weights of a classifier, or proxies: rank r holds rows r C / W to (r + 1) C / W - 1, and their optimizer.

    They stand beside the engine, not in it. DeepSpeed averages what all ranks hold; here each rank alone holds its
    rows, and computes their whole gradient, since it scores the faces of all ranks against them. So memory and time
    shrink with the number of ranks, they have a learning rate of their own, and nothing depends on the ZeRO stage.
    Clipping concerns the network alone.
    """

    def __init__(
        self,
        identities_C: NDArray[np.int64],
        embedding_dim: int,
        config: ClassesConfig,
        train: TrainConfig,
        world: World,
        *,
        seed: int,
    ) -> None:
        """Draw the vectors, by the seed and whatever the number of ranks.

        Args:
            identities_C: Labels of the classes, ascending.
            embedding_dim: D.
            config: Learning rate and weight decay.
            train: Which optimizer.
            world: The ranks.
            seed: 0 or more.
        """
        self.config, self.world = config, world
        bounds = np.arange(world.world_size + 1) * len(identities_C) // world.world_size
        self.first, self.end = (int(bound) for bound in bounds[world.rank : world.rank + 2])
        self._identities_C = torch.from_numpy(identities_C).to(world.device)
        rows = _normal_rows(self.first, self.end, embedding_dim, seed) / embedding_dim**0.5
        self.rows_cD = rows.to(world.device).requires_grad_()
        """This rank's vectors, about as long as 1 at first; its `.grad` collects the gradient of a step."""
        parameters = {"params": [self.rows_cD], "weight_decay": config.weight_decay}
        self._optimizer: torch.optim.Optimizer = (
            torch.optim.SGD([parameters], lr=train.learning_rate, momentum=train.momentum)
            if train.optimizer == "sgd"
            else torch.optim.AdamW([parameters], lr=train.learning_rate)
        )

    def classes_of(self, labels_M: Tensor) -> Tensor:
        """Return the class numbers of labels."""
        return torch.searchsorted(self._identities_C, labels_M)

    def update(self, learning_rate: float) -> None:
        """Take an optimizer step at the network's learning rate times the factor, and clear the gradient."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * self.config.learning_rate_factor
        self._optimizer.step()
        self._optimizer.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """Return the vectors and their optimizer's state as whole CPU tensors; every rank must call it.

        Over all ranks: an all-gather of each; every rank ends with all.
        """
        local = {"rows": self.rows_cD.detach(), **self._optimizer.state.get(self.rows_cD, {})}
        return {
            name: (self.world.all_gather_uneven(x) if x.ndim else x).to("cpu", copy=True)
            for name, x in local.items()
            if isinstance(x, Tensor)
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put back this rank's rows of what `state` gave, at any number of ranks.

        Raises:
            ValueError: It is of other classes, or of embeddings of another width.
        """
        expected = [len(self._identities_C), self.rows_cD.shape[1]]
        if "rows" not in state or list(state["rows"].shape) != expected:
            raise ValueError(f"expected class vectors {expected}, got {list(state.get('rows', torch.empty(0)).shape)}")
        own = {name: x[self.first : self.end].clone() if x.ndim else x.clone() for name, x in state.items()}
        with torch.no_grad():
            self.rows_cD.copy_(own.pop("rows"))
        if own:
            self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": {0: own}})


def each_rank_its_classes(x: Tensor, world: World) -> Tensor:
    """Return gathered embeddings for a loss of which each rank computes the part of its own classes.

    Their gradient on a rank is then a part: the sum over the ranks, which the gather takes, is the gradient, and is
    multiplied by W, because the network's gradients are averaged over the ranks afterwards.
    """
    scaled: Tensor = _ScaleGradient.apply(x, world.world_size)
    return scaled


def sum_over_ranks(x: Tensor, world: World, *, for_own_classes: bool = False) -> Tensor:
    """Return the sum of all ranks' x, with gradient.

    Args:
        x: This rank's part.
        world: The ranks.
        for_own_classes: Each rank goes on with its own classes, so that the sum's gradient is in parts too, and is
            summed; otherwise all go on to compute the same of it, and each knows the gradient.
    """
    total: Tensor = _SumOverRanks.apply(x, world, for_own_classes)
    return total


def own_entries(x_Mc: Tensor, columns_M: Tensor, world: World) -> Tensor:
    """Return each face's entry in the column of its own class, [M], on every rank.

    Args:
        x_Mc: This rank's columns.
        columns_M: Class numbers less that of the first column here; other ranks' are out of bounds.
        world: The ranks.
    """
    last = x_Mc.shape[1] - 1
    return _from_its_rank(x_Mc.gather(1, columns_M.clamp(0, last)[:, None])[:, 0], columns_M, last, world)


def own_products(x_MD: Tensor, y_cD: Tensor, columns_M: Tensor, world: World) -> Tensor:
    """Return each face's inner product with the vector of its own class, [M], on every rank; see `own_entries`."""
    last = len(y_cD) - 1
    return _from_its_rank(torch.linalg.vecdot(x_MD, y_cD[columns_M.clamp(0, last)]), columns_M, last, world)


def _from_its_rank(x_M: Tensor, columns_M: Tensor, last: int, world: World) -> Tensor:
    return sum_over_ranks(torch.where((columns_M >= 0) & (columns_M <= last), x_M, 0.0), world)


def logsumexp_of_others(x_MD: Tensor, y_cD: Tensor, columns_M: Tensor, *, tile_bytes: int, world: World) -> Tensor:
    """Return the logsumexp of each face's inner products with the vectors of all other classes, [M], on every rank.

    Over all ranks: an all-reduce of the M maxima and one of the sums. The M x c scores of a rank exist in tiles, and
    are made again in backward. Arguments are those of `own_products`.
    """
    classes_of_tile = max(1, tile_bytes // (len(x_MD) * x_MD.element_size()))
    parts = []
    for start in range(0, len(y_cD), classes_of_tile):
        tile = (x_MD, y_cD[start : start + classes_of_tile], columns_M - start)
        parts.append(checkpoint(_logsumexp_of_tile, *tile, use_reentrant=False, preserve_rng_state=False))
    part_M = torch.stack(parts).logsumexp(dim=0)
    maxima_M = world.all_reduce_max_(part_M.detach().clone())
    return sum_over_ranks((part_M - maxima_M).exp(), world).log() + maxima_M


def _logsumexp_of_tile(x_MD: Tensor, y_tD: Tensor, columns_M: Tensor) -> Tensor:
    scores_Mt = x_MD @ y_tD.T
    is_own_Mt = torch.arange(len(y_tD), device=x_MD.device) == columns_M[:, None]
    # Not -inf: where a tile has no other class its part is 0 beside the others', and so is its gradient.
    return scores_Mt.masked_fill(is_own_Mt, torch.finfo(scores_Mt.dtype).min).logsumexp(dim=1)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class _SumOverRanks(torch.autograd.Function):
    """Over all ranks: an all-reduce in forward, and one in backward where the gradient is in parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, world: World, for_own_classes: bool) -> Tensor:
        ctx.world = world if for_own_classes else World()
        return world.all_reduce_sum_(x.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.world.all_reduce_sum_(grad.clone()), None, None


def _normal_rows(first: int, end: int, width: int, seed: int) -> Tensor:
    """Return rows of a matrix of normal numbers, float32, without drawing all that come before."""
    drawn = []
    for block in range(first // _BLOCK, -(-end // _BLOCK)):
        rng = np.random.default_rng([seed, _CLASS_VECTORS, block])
        drawn.append(torch.from_numpy(rng.standard_normal((_BLOCK, width), dtype=np.float32)))
    start = first // _BLOCK * _BLOCK
    return torch.cat(drawn)[first - start : end - start].clone()


# A stream of random numbers that shares the run's seed with those of the plan, the split and the window.
_CLASS_VECTORS = 6
_BLOCK = 4096
