"""Miner: when rounds take place, and one round on the network as it stands."""

import logging
import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facetrain.config import Config, LossConfig
from facetrain.data.plan import Plan
from facetrain.data.reading import FaceReader, report_replaced
from facetrain.data.shards import ShardSet
from facetrain.embed import embed_images
from facetrain.mining.embedding_table import EmbeddingTable
from facetrain.mining.gathered import mine_round
from facetrain.mining.mode import choose_mode
from facetrain.mining.quota import can_fill, mine_quota_round, spread_identities
from facetrain.mining.round import MinedRound, MiningSchedule
from facetrain.mining.table import mine_table_round
from facetrain.world import World

log = logging.getLogger(__name__)


class Miner:
    """Mines the batches of coming steps, over all ranks."""

    def __init__(self, config: Config, shards: ShardSet, plan: Plan, world: World) -> None:
        """Mine batches for the plan, among the identities that it trains on."""
        self.config, self.shards, self.plan, self.world = config, shards, plan, world
        self.identities = plan.identities_I
        self.replaced: list[str] = []
        """A line for each image that this rank embedded another for in the last round (`data.on_bad_image=skip`)."""
        self.schedule = MiningSchedule(config.mining)
        self.mode = choose_mode(config.mining, num_identities=len(self.identities), num_pairs=config.train.global_pairs)
        self.table: EmbeddingTable | None = None
        """What recent training steps have shown, in mode 'table': it belongs to the state of a run."""
        if self.mode.name == "table":
            dtype = getattr(torch, config.mining.table_dtype)
            self.table = EmbeddingTable(self.identities, dtype=dtype, world=world)

    def observe(self, step: int, labels_n: Tensor, embeddings_VnD: Tensor) -> None:
        """Learn from a step that was trained; every rank must call it. Only mode 'table' does."""
        if self.table is not None:
            self.table.observe(step, labels_n, as_scored(embeddings_VnD, self.config.loss))

    def is_due(self, step: int) -> bool:
        """Return whether a round takes place just before this step."""
        return self.schedule.round_at(step) is not None

    def mine_before(self, step: int, backbone: nn.Module) -> tuple[int, MinedRound] | None:
        """Mine if a round is due just before this step; every rank must call it with the same network.

        Returns:
            The first step that the round serves (`mining.lag_steps` later) and its lists; None if no round is due,
            if it would serve no step of the run, if the table isn't full enough, or if too few identities stay in the
            window of shards for as long as the round takes. Steps without a mined list have random batches.
        """
        round_index = self.schedule.round_at(step)
        if round_index is None:
            return None
        first_step = self.schedule.first_served_step(round_index)
        if first_step >= self.config.train.steps:
            return None
        mined = self._mine(round_index, step, backbone)
        if mined is None:
            return None
        s = mined.stats
        if self.config.data.on_bad_image == "skip" and self.table is None:
            s["mining/replaced_images"] = float(report_replaced(self.replaced, self.world))
            self.replaced = []
        seconds = [f"  {part} {s[f'mining/{part}_s']:.1f} s" for part in _PARTS if f"mining/{part}_s" in s]
        recall = f"  recall {s['mining/recall']:.1%}" if s.get("mining/recall", 1.0) < 1 else ""
        log.info(
            f"mining round {round_index}  {s['mining/candidates']:.0f} candidates"
            f"  violation {s['mining/violation']:.2f}  loss {s['mining/loss_mined']:.3f}"
            f" (random {s['mining/loss_random']:.3f})  ties {s['mining/tie_share']:.1%}"
            f"  overlap {s['mining/overlap']:.0%}{recall}{''.join(seconds)}"
        )
        return first_step, mined

    def _mine(self, round_index: int, step: int, backbone: nn.Module) -> MinedRound | None:
        config, seed = self.config.mining, self.config.run.seed
        num_pairs = self.config.train.global_pairs
        if self.table is not None:
            return mine_table_round(round_index, step, config, num_pairs=num_pairs, table=self.table, seed=seed)
        if self.mode.name == "quota":
            nodes = self._nodes(round_index, step)
            fewest = min(len(node) for node in nodes)
            if not can_fill(config, num_pairs, fewest):  # the plan decides it, so every rank comes to the same answer
                log.warning(
                    f"mining round {round_index} before step {step}: only {fewest} identities of a virtual node stay in"
                    f" its window of shards, too few for {num_pairs // config.virtual_nodes} in each of"
                    f" {config.batches_per_round} batches: random classes are served; larger data.window_shards or"
                    " smaller mining.batches_per_round or mining.lag_steps keep more"
                )
                return None
            return mine_quota_round(
                round_index,
                config,
                num_pairs=num_pairs,
                table=self.shards.table,
                nodes=nodes,
                embed=lambda image_idx: self._embed(backbone, image_idx, World(device=self.world.device)),
                seed=seed,
                world=self.world,
            )
        return mine_round(
            round_index,
            config,
            num_pairs=num_pairs,
            table=self.shards.table,
            identities=self.identities,
            embed=lambda image_idx: self._embed(backbone, image_idx, self.world),
            seed=seed,
            world=self.world,
        )

    def _nodes(self, round_index: int, step: int) -> list[npt.NDArray[np.int64]]:
        """Deal what a round may choose from to the virtual nodes, those of a part of the shards to as many each."""
        mining, seed = self.config.mining, self.config.run.seed
        last_step = self.schedule.first_served_step(round_index) + mining.batches_per_round - 1
        pools = self.plan.pools(step, last_step) or [self.identities]
        nodes_of_a_pool = mining.virtual_nodes // len(pools)
        return [node for pool in pools for node in spread_identities(pool, nodes_of_a_pool, seed)]

    def _embed(self, backbone: nn.Module, image_idx: npt.NDArray[np.int64], world: World) -> Tensor:
        """Embed images over the ranks of `world`: all of the run's, or this one alone."""
        reader = FaceReader(self.shards, self.config.data)

        def decode(i: int) -> npt.NDArray[np.uint8]:
            return reader.face(int(image_idx[i]), self.replaced)

        precision = self.config.train.precision
        embeddings = embed_images(backbone, decode, len(image_idx), world=world, precision=precision)
        return as_scored(embeddings, self.config.loss)


def as_scored(embeddings: Tensor, config: LossConfig) -> Tensor:
    """Return embeddings, float [..., D], whose inner products are the scores that the loss compares.

    A loss of unit vectors needs unit vectors here: as they are, the longest would look the hardest.
    """
    if not config.of_unit_vectors:
        return embeddings
    return F.normalize(embeddings, dim=-1) / math.sqrt(config.temperature or 1.0)


_PARTS = ("embed", "graph", "search", "exchange")
"""Parts of a round whose seconds are logged, where it has them."""
