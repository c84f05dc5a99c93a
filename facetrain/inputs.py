"""Everything a run reads, opened and checked before it starts."""

import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path

from facetrain.checkpoint.folder import begun
from facetrain.checkpoint.weights import init_weights_from
from facetrain.config import Config
from facetrain.data.partition import Held, PartitionedPlan, agree_on_parts
from facetrain.data.plan import Plan, pairs_per_rank
from facetrain.data.shards import ShardSet, open_shards
from facetrain.data.split import IdentitySplit, split_identities
from facetrain.data.window import WindowedPlan
from facetrain.evaluation.judge import Judge
from facetrain.losses.build import check_loss
from facetrain.mining.lists import check_appearances
from facetrain.mining.mode import check_mode
from facetrain.mining.round import MiningSchedule
from facetrain.models import build_backbone
from facetrain.world import World


@dataclass(frozen=True)
class Inputs:
    """Everything a run reads, opened and checked before the process group starts."""

    shards: ShardSet
    split: IdentitySplit
    plan: Plan
    """With data.partitioned that of `share_out`, which knows what the other nodes hold."""
    judge: Judge


def check_same_shards(shards: ShardSet, world: World) -> None:
    """Refuse to start where nodes hold different shards; every rank must call it.

    Raises:
        ValueError: On every rank, if the manifest of any rank isn't that of rank 0.
    """
    # Over all ranks: every rank ends with what each of them has opened.
    seen = world.all_gather_object((shards.manifest.sha256, platform.node(), shards.place))
    sha256, node, place = seen[0]
    for rank, (other_sha256, other_node, other_place) in enumerate(seen):
        if other_sha256 != sha256:
            raise ValueError(
                f"data.shards: {other_place} of rank {rank} on {other_node} isn't {place} of rank 0 on {node}: expected"
                f" the same manifest everywhere, got sha256 {other_sha256[:16]}... and {sha256[:16]}..."
            )


def share_out(inputs: Inputs, config: Config, world: World) -> Inputs:
    """Return the inputs with the plan of a set whose shards lie on several nodes; every rank must call it.

    Raises:
        ValueError: On every rank, where the nodes together don't hold each shard once, or can't share a batch evenly.
    """
    shards = inputs.shards.manifest.shards
    # Over all ranks: every rank ends with what each of them finds on its disk.
    held_W = world.all_gather_object(Held(platform.node(), inputs.shards.held))
    plan = PartitionedPlan(
        inputs.shards.table,
        inputs.split.train,
        global_pairs=config.train.global_pairs,
        seed=config.run.seed,
        shards=shards,
        parts=agree_on_parts(held_W, shards),
    )
    check_pools(plan, config)
    return replace(inputs, plan=plan)


def check_pools(plan: Plan, config: Config) -> None:
    """Refuse quota mining where a part of the plan has too few identities to mine from.

    Raises:
        ValueError: A round of the first pass would find fewer than it needs; one line with the settings that decide it.
            A later round that does has random batches instead.
    """
    mining, rounds = config.mining, MiningSchedule(config.mining)
    if mining.mode != "quota":
        return
    round_index, quota = 0, config.train.global_pairs // mining.virtual_nodes
    while (step := mining.warmup_steps + round_index * mining.batches_per_round) < config.train.steps:
        last_step = rounds.first_served_step(round_index) + mining.batches_per_round - 1
        pools = plan.pools(step, last_step)
        if pools is None or round_index * mining.batches_per_round > plan.steps_per_epoch:
            return
        if mining.virtual_nodes % len(pools):
            raise ValueError(
                f"mining.virtual_nodes: expected a multiple of the {len(pools)} parts that the nodes hold, got"
                f" {mining.virtual_nodes}"
            )
        fewest = min(len(pool) for pool in pools) // (mining.virtual_nodes // len(pools))
        if fewest < quota:
            raise ValueError(
                f"mining.batches_per_round: expected rounds during which the shards of {quota} identities of each of"
                f" {mining.virtual_nodes} virtual nodes stay, got {fewest} from step {step} to {last_step}"
                f" (mining.lag_steps = {mining.lag_steps}, batches_per_round = {mining.batches_per_round},"
                f" data.window_shards = {config.data.window_shards})"
            )
        if mining.max_appearances is not None:
            check_appearances(mining.max_appearances, mining.batches_per_round, quota, fewest)
        round_index += 1


def _check_room(plan: WindowedPlan, config: Config, shards: ShardSet, world_size: int) -> None:
    """Refuse windows that this machine's cache can't hold, before anything is fetched for them."""
    if shards.cache is None or shards.cache.max_bytes is None:
        return
    local_rank, rank = (int(os.environ.get(key, "0")) for key in ("LOCAL_RANK", "RANK"))
    here = range(rank - local_rank, rank - local_rank + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    ahead = config.data.workers * config.data.prefetch
    needed = plan.room_bytes(shards.manifest.shards, here, world_size, ahead)
    if needed > shards.cache.max_bytes:
        raise ValueError(
            f"data.cache_bytes: expected at least the {needed} bytes of the windows of ranks {here[0]} to {here[-1]}"
            f" on this machine, got {shards.cache.max_bytes}; fewer data.window_shards, data.workers or data.prefetch"
            " need less"
        )


def open_inputs(config: Config, *, world_size: int) -> Inputs:
    """Open and check what a run of `world_size` processes would read; no process group is needed.

    Raises:
        ValueError: Something can't be used; the message names the file or key.
    """
    pairs_here = pairs_per_rank(config.train.global_pairs, world_size)
    if config.train.micro_pairs is not None and pairs_here % config.train.micro_pairs:
        raise ValueError(
            f"train.micro_pairs: expected a divisor of the {pairs_here} pairs of a process (train.global_pairs /"
            f" {world_size} processes), got {config.train.micro_pairs}"
        )
    shards = open_shards(config.data)
    if shards.manifest.image_px != config.data.shard_px:
        raise ValueError(
            f"data.shard_px: {config.data.shards} holds images of {shards.manifest.image_px} px,"
            f" got {config.data.shard_px}"
        )
    split = split_identities(
        shards.table,
        holdout=config.data.holdout_identities,
        exclude=config.data.exclude,
        seed=config.data.holdout_seed,
        min_images=max(config.data.min_images, config.train.images_per_identity),
    )
    plan = _plan(config, shards, split)
    check_pools(plan, config)
    if isinstance(plan, WindowedPlan):
        _check_room(plan, config, shards, world_size)
    check_mode(config, num_identities=len(split.train), world_size=world_size)
    check_loss(config.loss, num_identities=len(split.train), world_size=world_size)
    if not begun(Path(config.run.dir)):  # else a checkpoint holds the weights
        backbone = build_backbone(config.model, channels=config.data.channels, image_px=config.data.image_px)
        if config.model.init_from is not None:
            init_weights_from(backbone, Path(config.model.init_from))
    return Inputs(shards=shards, split=split, plan=plan, judge=Judge.open(config, shards, split))


def _plan(config: Config, shards: ShardSet, split: IdentitySplit) -> Plan:
    pairs, seed = config.train.global_pairs, config.run.seed
    if config.data.window_shards is None:
        images = config.train.images_per_identity
        return Plan(shards.table, split.train, global_pairs=pairs, seed=seed, images_per_identity=images)
    return WindowedPlan(
        shards.table,
        split.train,
        global_pairs=pairs,
        seed=seed,
        shards=shards.manifest.shards,
        virtual_nodes=config.data.virtual_nodes,
        window_shards=config.data.window_shards,
    )
