"""Everything a run reads, opened and checked before it starts."""

import platform
from dataclasses import dataclass
from pathlib import Path

from facetrain.checkpoint.weights import init_weights_from
from facetrain.config import Config
from facetrain.data.plan import Plan, pairs_per_rank
from facetrain.data.shards import ShardSet, open_shards
from facetrain.data.split import IdentitySplit, split_identities
from facetrain.data.window import WindowedPlan
from facetrain.evaluation.judge import Judge
from facetrain.mining.mode import check_mode
from facetrain.models import build_backbone
from facetrain.world import World


@dataclass(frozen=True)
class Inputs:
    """Everything a run reads, opened and checked before the process group starts."""

    shards: ShardSet
    split: IdentitySplit
    plan: Plan
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
        seed=config.run.seed,
        min_images=max(config.data.min_images, config.train.images_per_identity),
    )
    plan = _plan(config, shards, split)
    check_mode(config, num_identities=len(split.train), world_size=world_size)
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
