"""The multi-class N-pair loss and its relatives over the pairs of all ranks.

Dims: n pairs on this rank, N pairs of the global batch (N = n * world size), D embedding width.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from facetrain.config import LossConfig
from facetrain.losses.logit_tiles import one_vs_all, one_vs_one, rows_and_columns, sum_of_rows
from facetrain.losses.loss import Loss
from facetrain.losses.memory import BatchMemory
from facetrain.world import GatherInFlight, World


class NPairLoss(Loss):
    """N-pair-mc, N-pair-ovo or (N+1)-tuplet with a penalty on the norms; row-local anchors, negatives of all ranks.

    With anchors f_i, positives p_i, and sums over the j of other identities than i's:

        npair-mc    log(1 + sum_j exp(<f_i, p_j> - <f_i, p_i>))
        npair-ovo   sum_j log(1 + exp(<f_i, p_j> - <f_i, p_i>))
        tuplet      log(1 + sum_j exp(<f_i, f_j> - <f_i, p_i>))     negatives are the other pairs' anchors

    `loss.symmetric` (npair-mc) takes the mean of this and of the same with anchors and positives in each other's
    place. With `loss.temperature` inner products are cosines over the temperature; the penalty stays on raw norms.
    With `loss.memory_batches` the sums go over the pairs of past batches too, as they were embedded then.

    Source: Sohn, Improved deep metric learning with multi-class N-pair loss objective, NeurIPS 2016, equations 3, 7, 8.
    """

    def __init__(self, config: LossConfig, world: World) -> None:
        super().__init__(config, world)
        self._memory = BatchMemory(config.memory_batches) if config.memory_batches else None

    def data_loss(
        self, anchors_nD: Tensor, positives_nD: Tensor, labels_n: Tensor, gather: GatherInFlight | None, step: int
    ) -> Tensor:
        """Return the mean over the local pairs.

        Only one side travels, the positives (tuplet: the anchors): it is gathered with gradient, so that averaging
        parameter gradients over ranks (what DeepSpeed does) gives the gradient of the global batch. Sums are divided
        by constants (n, 2n), never by what happens to be in the batch. With a memory a call is a step.
        """
        config = self.config
        # Over all ranks; each ends with all N negatives and labels, in rank order.
        gather = gather or self.start_gather(anchors_nD if config.name == "tuplet" else positives_nD)
        labels_N, negatives_ND = self.world.all_gather(labels_n), gather.finish()
        past = None
        if self._memory is not None:
            past = self._memory.past()
            self._memory.remember(labels_N, negatives_ND)
        if config.temperature is not None:
            anchors_nD = F.normalize(anchors_nD) / config.temperature
            positives_nD, negatives_ND = F.normalize(positives_nD), F.normalize(negatives_ND)
            past = past and (past[0], F.normalize(past[1]))
        return self._sum(anchors_nD, positives_nD, negatives_ND, labels_n, labels_N, past) / len(anchors_nD)

    def state(self) -> dict[str, Tensor]:
        """Return what the memory holds."""
        return self._memory.state() if self._memory is not None else {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put it back."""
        if self._memory is not None:
            self._memory.load(state, self.world.device)

    def _sum(
        self,
        anchors_nD: Tensor,
        positives_nD: Tensor,
        negatives_ND: Tensor,
        labels_n: Tensor,
        labels_N: Tensor,
        past: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Return the sum of the local pairs' losses."""
        tile_bytes = self.config.tile_bytes
        if self.config.symmetric:
            rows_n, columns_n = rows_and_columns(
                anchors_nD, negatives_ND, labels_n, labels_N, tile_bytes=tile_bytes, world=self.world
            )
            own_n = _own_scores(anchors_nD, positives_nD)
            return -0.5 * (F.logsigmoid(own_n - rows_n) + F.logsigmoid(own_n - columns_n)).sum()
        return sum_of_rows(
            one_vs_one if self.config.name == "npair-ovo" else one_vs_all,
            anchors_nD,
            negatives_ND,
            labels_n,
            labels_N,
            first=self.world.rank * len(anchors_nD),
            own_n=_own_scores(anchors_nD, positives_nD) if self.config.name == "tuplet" else None,
            past=past,
            tile_bytes=tile_bytes,
        )


def _own_scores(anchors_nD: Tensor, positives_nD: Tensor) -> Tensor:
    return (anchors_nD * positives_nD).sum(dim=1)
