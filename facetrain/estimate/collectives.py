"""Which collectives a step issues, and what each carries, sends and takes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from facetrain.config import Config
from facetrain.config.loss import NPAIR_LOSSES
from facetrain.estimate.cluster import Cluster
from facetrain.estimate.network import Network, padded_numel
from facetrain.estimate.schedule import schedule_of

Operation = Literal["all-gather", "reduce-scatter", "all-reduce"]


@dataclass(frozen=True)
class Collective:
    """A collective over all ranks that steps or mining rounds repeat."""

    part: str
    """The part of a step that it belongs to, under which its time is summed."""
    carries: str
    """What travels."""
    operation: Operation
    """What the ranks end with: everything, their own share of the sum, or the whole sum."""
    payload_bytes: int
    """Of one call: the gathered result, or the tensor that is summed."""
    calls_per_step: float
    """Calls in a step; a fraction where a mining round serves several steps."""

    def sent_bytes(self, world_size: int) -> float:
        """Return what each rank sends per call.

        Source: Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH", 2005:
        a gather or a scatter by a ring sends (W - 1) / W of the payload, an all-reduce both.
        """
        return (2 if self.operation == "all-reduce" else 1) * self.payload_bytes * (world_size - 1) / world_size

    def seconds(self, cluster: Cluster) -> float:
        """Return the time of one call: bytes over the slowest link of the ring, and its hops.

        A ring passes each rank once, an all-reduce twice; a small all-reduce goes by trees, of which NCCL takes the
        faster. Hops inside a machine take a tenth of `latency_us`.
        """
        inside, between = 1e-7 * cluster.latency_us, 1e-6 * cluster.latency_us
        turns = 2 if self.operation == "all-reduce" else 1
        ring = turns * ((cluster.world_size - cluster.nodes) * inside + (cluster.nodes - 1) * between)
        tree = turns * ((cluster.gpus_per_node - 1) * inside + math.ceil(math.log2(cluster.nodes)) * between)
        hops = min(ring, tree) if self.operation == "all-reduce" else ring
        return self.sent_bytes(cluster.world_size) / cluster.ring_bytes_per_s + hops


def step_collectives(config: Config, network: Network, world_size: int) -> Iterator[Collective]:
    """Yield the collectives of a step; none in a world of one. Logging, saving and evaluating are left out.

    Counted from what facetrain calls and, for the engine, from what DeepSpeed 0.19.8 is seen to call.
    """
    if world_size == 1:
        return
    yield from _loss_collectives(config, network)
    if config.model.sync_batchnorm:
        yield from _batch_statistics(config, network, world_size)
    yield from _engine_collectives(config, network, world_size)
    if network.running_statistics:
        yield Collective("running statistics", "their mean", "all-reduce", 4 * network.running_statistics, 1)


def _loss_collectives(config: Config, network: Network) -> Iterator[Collective]:
    """Yield what a loss gathers, one side of the pairs or both, and what it sums over the classes of all ranks."""
    N, D, loss = config.train.global_pairs, network.embedding_dim, config.loss
    if loss.name in NPAIR_LOSSES:
        side, faces = ("anchors" if loss.name == "tuplet" else "positives"), N
    else:
        side, faces = "both sides", 2 * N
    yield Collective("embeddings", side, "all-gather", 4 * faces * D, 1)
    yield Collective("embeddings", "labels", "all-gather", 8 * N, 1)
    if loss.symmetric:
        yield Collective("embeddings", "columns: maxima, then sums", "all-reduce", 4 * N, 2)
        yield Collective("embeddings", "gradient of columns", "all-gather", 4 * N, 1)
    if loss.has_classes:
        # Own scores, maxima, sums; and Group Loss's maxima, own answers, and the sums of each normalisation twice.
        sums = 3 + (2 + 2 * (1 + loss.group.iterations) if loss.name == "group" else 0)
        yield Collective("class scores", "of faces: own, maxima, sums", "all-reduce", 4 * faces, sums)
    reduced_bytes = {"float32": 4, "bfloat16": 2}[loss.reduce_precision]
    yield Collective("embeddings", f"gradient of {side}", "reduce-scatter", reduced_bytes * faces * D, 1)


def _batch_statistics(config: Config, network: Network, world_size: int) -> Iterator[Collective]:
    """Yield what each BatchNorm over all ranks exchanges: mean, variance and count, and two sums in backward."""
    schedule = schedule_of(config.train, world_size)
    on_cpu = config.run.device == "cpu"  # then the layers are our own, which gather where torch's reduce
    for width in network.batchnorm_widths:
        of_all = 4 * world_size * (2 * width + 1)
        yield Collective("batch statistics", "of layers", "all-gather", of_all, schedule.forwards)
        operation: Operation = "all-gather" if on_cpu else "all-reduce"
        sums = 4 * 2 * width * (world_size if on_cpu else 1)
        yield Collective("batch statistics", "gradients", operation, sums, schedule.backwards)


def _engine_collectives(config: Config, network: Network, world_size: int) -> Iterator[Collective]:
    """Yield DeepSpeed's: at ZeRO 1 and 2 it sums whole buckets on every rank and then keeps a share of them.

    So its "reduce-scatter" is an all-reduce (`use_multi_rank_bucket_allreduce`, its default), and the parameters'
    all-gather comes on top. ZeRO 2 sums after every chunk, since no rank keeps whole gradients. ZeRO 3 is approximate:
    how it gathers weights, all at once or layer by layer, it decides while it runs.
    """
    stage, schedule = config.train.zero_stage, schedule_of(config.train, world_size)
    whole = 4 * network.parameters
    if stage == 3:
        gathers = schedule.forwards + (schedule.backwards if schedule.is_chunked else 0)
        yield Collective("parameters", "weights, about", "all-gather", whole, gathers)
        yield Collective("gradients", "of the parameters, about", "reduce-scatter", whole, schedule.backwards)
        return
    reductions = schedule.backwards if stage == 2 and schedule.is_chunked else 1
    yield Collective("gradients", "of the parameters", "all-reduce", whole, reductions)
    if stage > 0:
        groups = network.group_parameters
        yield Collective("gradients", "squared norms of groups", "all-reduce", 4, len(groups))
        for numel in groups:
            yield Collective("parameters", "updated shares", "all-gather", 4 * padded_numel(numel, world_size), 1)
