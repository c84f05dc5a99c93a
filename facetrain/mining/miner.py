"""Miner: when rounds take place, and one round on the network as it stands."""

import logging

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from facetrain.config import Config
from facetrain.data.decode import decode_face
from facetrain.data.shards import ShardSet
from facetrain.embed import embed_images
from facetrain.mining.gathered import MinedRound, MiningSchedule, choose_mode, mine_round
from facetrain.world import World

log = logging.getLogger(__name__)


class Miner:
    """Mines the batches of coming steps, over all ranks."""

    def __init__(self, config: Config, shards: ShardSet, identities: npt.NDArray[np.int64], world: World) -> None:
        """Mine among `identities`, int64 [I], rows of the shards' class table that are trained on."""
        self.config, self.shards, self.identities, self.world = config, shards, identities, world
        self.schedule = MiningSchedule(config.mining)

    def describe(self) -> str:
        """Return the mode and why it was chosen, for the log."""
        return "mining: {}; {}".format(*choose_mode(self.config.mining, len(self.identities)))

    def mine_before(self, step: int, backbone: nn.Module) -> tuple[int, MinedRound] | None:
        """Mine if a round is due just before this step; every rank must call it with the same network.

        Returns:
            The first step that the round serves (`mining.lag_steps` later) and its lists; None if no round is due or
            it would serve no step of the run.
        """
        round_index = self.schedule.round_at(step)
        if round_index is None:
            return None
        first_step = self.schedule.first_served_step(round_index)
        if first_step >= self.config.train.steps:
            return None
        mined = mine_round(
            round_index,
            self.config.mining,
            num_pairs=self.config.train.global_pairs,
            table=self.shards.table,
            identities=self.identities,
            embed=lambda image_idx: self._embed(backbone, image_idx),
            seed=self.config.run.seed,
            world=self.world,
        )
        s = mined.stats
        log.info(
            f"mining round {round_index}  {s['mining/candidates']:.0f} candidates"
            f"  violation {s['mining/violation']:.2f}  loss {s['mining/loss_mined']:.3f}"
            f" (random {s['mining/loss_random']:.3f})  ties {s['mining/tie_share']:.1%}"
            f"  overlap {s['mining/overlap']:.0%}  embed {s['mining/embed_s']:.1f} s"
            f"  graph {s['mining/graph_s']:.1f} s  search {s['mining/search_s']:.1f} s"
            f"  exchange {s['mining/exchange_s']:.1f} s"
        )
        return first_step, mined

    def _embed(self, backbone: nn.Module, image_idx: npt.NDArray[np.int64]) -> Tensor:
        def decode(i: int) -> npt.NDArray[np.uint8]:
            image = int(image_idx[i])
            return decode_face(self.shards.read(image), self.config.data, self.shards.where(image))

        return embed_images(backbone, decode, len(image_idx), world=self.world, precision=self.config.train.precision)
