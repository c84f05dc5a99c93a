"""The estimate: memory of a GPU, seconds of a step by part, images a second and what bounds them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from facetrain.config import Config
from facetrain.data.plan import pairs_per_rank
from facetrain.estimate.cluster import Cluster
from facetrain.estimate.collectives import Collective, step_collectives
from facetrain.estimate.loss import measure_loss
from facetrain.estimate.memory import Memory, kept_by_loss, kept_memory, step_memory
from facetrain.estimate.mining import mining_work
from facetrain.estimate.network import Network, measure_network, measure_passes
from facetrain.estimate.schedule import Schedule, schedule_of


@dataclass(frozen=True)
class Estimate:
    """What a run of a config on a cluster would take."""

    cluster: Cluster
    network: Network
    flops_per_image: float
    """Of a forward; a multiplication and an addition are two."""
    schedule: Schedule
    memory: Memory
    mining_mode: str
    """As it was chosen: off, gathered, table or quota."""
    collectives: tuple[Collective, ...]
    """In the order in which a step issues them, those of mining last."""
    seconds: Mapping[str, float]
    """Of a step, by part."""
    images_per_step: int
    """2N."""

    @property
    def step_s(self) -> float:
        """Seconds of a step, mining included."""
        return sum(self.seconds.values())

    @property
    def images_per_s(self) -> float:
        """Images that all GPUs together train on in a second."""
        return self.images_per_step / self.step_s

    @property
    def bottleneck(self) -> str:
        """The part that takes the most of a step."""
        return max(self.seconds, key=lambda part: self.seconds[part])

    @property
    def fits(self) -> bool:
        """Whether the fullest moment fits into a GPU, the allowance for the runtime included."""
        free_bytes = 1e9 * (self.cluster.gpu_memory_gb - self.cluster.gpu_runtime_gb)
        return self.memory.total_bytes <= free_bytes


def estimate(config: Config, cluster: Cluster, *, identities: int) -> Estimate:
    """Estimate a run, from shapes alone: nothing is read, and no GPU is needed.

    Args:
        config: The run.
        cluster: The machines.
        identities: Trained identities, which bound mining's candidates, and for which losses learn vectors.

    Raises:
        ValueError: The pairs can't be divided among the GPUs, or those of a GPU into chunks of `train.micro_pairs`; or
            the loss is one of pytorch-metric-learning's, whose work isn't known.
    """
    W, train = cluster.world_size, config.train
    schedule = schedule_of(train, W)
    network = measure_network(config.model, config.data)
    passes = measure_passes(config.model, config.data, train.precision, images=schedule.images)
    loss = measure_loss(
        config.loss,
        pairs=schedule.pairs,
        global_pairs=train.global_pairs,
        embedding_dim=network.embedding_dim,
        classes=math.ceil(identities / W),
    )
    mining = mining_work(config, cluster, network, identities=identities)
    collectives = (*step_collectives(config, network, W), *mining.collectives)
    forward_s, backward_s = (work.seconds(cluster, cluster.gpu_tflops) for work in (passes.forward, passes.backward))
    seconds = {
        "network": schedule.forwards * forward_s + schedule.backwards * backward_s,
        "loss": loss.seconds(cluster),
        "update": _update_seconds(config, cluster, network, loss.class_numel),
        "mining": mining.seconds,
    }
    for collective in collectives:
        time_s = collective.calls_per_step * collective.seconds(cluster)
        if train.overlap and collective.part == "embeddings":  # the anchors' passes run beside the exchange
            beside_s = {"all-gather": forward_s, "reduce-scatter": backward_s}.get(collective.operation, 0.0)
            time_s = max(0.0, time_s - beside_s)
        seconds[collective.part] = seconds.get(collective.part, 0.0) + time_s
    seconds["waiting for images"] = _wait_seconds(config, cluster, 2 * schedule.pairs, busy_s=sum(seconds.values()))
    return Estimate(
        cluster=cluster,
        network=network,
        flops_per_image=float(passes.forward.flops.sum()) / passes.images,
        schedule=schedule,
        memory=Memory(
            kept=kept_memory(config, network, W) | kept_by_loss(config, loss) | mining.kept,
            in_step=step_memory(config, network, passes, loss, schedule, W),
            in_mining=mining.in_round,
        ),
        mining_mode=mining.mode,
        collectives=collectives,
        seconds=seconds,
        images_per_step=2 * config.train.global_pairs,
    )


def largest_fitting_micro_pairs(config: Config, cluster: Cluster, *, identities: int) -> int | None:
    """Return the largest `train.micro_pairs` with which the run fits into a GPU; None where not even one pair does."""
    pairs = pairs_per_rank(config.train.global_pairs, cluster.world_size)
    for micro_pairs in (m for m in range(pairs, 0, -1) if pairs % m == 0):
        smaller = replace(config, train=replace(config.train, micro_pairs=micro_pairs, overlap=False))
        if estimate(smaller, cluster, identities=identities).fits:
            return micro_pairs
    return None


def _update_seconds(config: Config, cluster: Cluster, network: Network, class_numel: int) -> float:
    """Return the time of the optimizer: weight, gradient and state are read, weight and state written."""
    state = {"sgd": int(config.train.momentum > 0), "adamw": 2}[config.train.optimizer]
    numel = network.parameters
    if config.train.zero_stage > 0:
        numel = network.padded_parameters(cluster.world_size) // cluster.world_size
    return 4 * (numel + class_numel) * (3 + 2 * state) / (1e9 * cluster.gpu_gb_per_s)


def _wait_seconds(config: Config, cluster: Cluster, images: int, *, busy_s: float) -> float:
    """Return how long a step waits for a rank's decoders, which run beside it, or in it where there are none."""
    workers = config.data.workers
    if workers == 0:
        return images / cluster.decode_images_per_s
    return max(0.0, images / (workers * cluster.decode_images_per_s) - busy_s)
