"""What mining takes: its collectives, its time per step, and its memory, for each mode.

Dims: C candidates of a round, V images of each, B batches of a round, N identities of a batch, D embedding width,
I identities, F of them fresh in the table, K neighbours in a graph, W ranks.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from facetrain.config import Config
from facetrain.embed import BATCH_IMAGES
from facetrain.estimate.cluster import Cluster
from facetrain.estimate.collectives import Collective
from facetrain.estimate.network import Network, measure_embedding
from facetrain.mining.mode import choose_mode
from facetrain.mining.neighbours import graph_pays, neighbours_needed
from facetrain.mining.round import num_random_classes, subset_size

_PICK_US = 40.0
"""Microseconds of the best-first search per class that it adds, on the host: 40 ms for 1,000 of 10,000 classes."""
_GREEDY_KERNELS = 10
"""Operations of a pick of the greedy search, besides its product: passes over one number per candidate."""


@dataclass(frozen=True)
class MiningWork:
    """Mining on one GPU; what a round takes is spread over the steps that it serves."""

    mode: str = "off"
    """As `choose_mode` names it."""
    collectives: tuple[Collective, ...] = ()
    """Of steps and rounds."""
    seconds: float = 0.0
    """Of a step, the collectives apart."""
    kept: dict[str, int] = field(default_factory=dict)
    """Bytes that stay on the GPU."""
    in_round: dict[str, int] = field(default_factory=dict)
    """Bytes that a round takes on the GPU."""


def mining_work(config: Config, cluster: Cluster, network: Network, *, identities: int) -> MiningWork:
    """Return what mining among `identities` takes."""
    if config.mining.mode == "off":
        return MiningWork()
    N, W = config.train.global_pairs, cluster.world_size
    mode = choose_mode(config.mining, num_identities=identities, num_pairs=N).name
    work = _table_work if mode == "table" else _embedding_work
    found = work(config, cluster, network, mode, identities)
    return found if W > 1 else MiningWork(mode, (), found.seconds, found.kept, found.in_round)


def _embedding_work(config: Config, cluster: Cluster, network: Network, mode: str, identities: int) -> MiningWork:
    """Return the work of modes 'gathered' and 'quota', which embed candidates in every round."""
    mining, W, D = config.mining, cluster.world_size, network.embedding_dim
    C, V = min(mining.candidates, identities), mining.images_per_class
    rate = 1 / mining.batches_per_round
    if mode == "quota":
        parts, C = mining.virtual_nodes, C // mining.virtual_nodes * mining.virtual_nodes
        images, rows = V * C // W, V * C // W
        batches = parts // W * math.ceil(V * C / parts / BATCH_IMAGES)
        collectives = [Collective("mining", "embeddings", "all-gather", 4 * V * C * D, rate)]
    else:
        images = rows = most_images_of_a_rank(V * C, W)
        batches = math.ceil(images / BATCH_IMAGES)
        collectives = [
            Collective("mining", "sizes and counts", "all-gather", 8 * W, rate),
            Collective("mining", "embeddings", "all-gather", 4 * W * rows * D, rate),
        ]
    forward = measure_embedding(config.model, config.data, config.train.precision, images=BATCH_IMAGES)
    # One thread decodes beside the network.
    embed_s = max(batches * forward.seconds(cluster, cluster.gpu_tflops), images / cluster.decode_images_per_s)
    size = subset_size(mining, config.train.global_pairs, C)
    has_graph = mode == "gathered" and graph_pays(C, size, _num_mined(config), mining.batches_per_round)
    graph_s = _graph_seconds(cluster, C, D) if has_graph else 0.0
    if has_graph:
        collectives += _graph_collectives(C, neighbours_needed(C, size, _num_mined(config)), W, rate)
    pick_s = 1e-6 * _PICK_US if has_graph else _greedy_pick_seconds(cluster, size, D)
    return MiningWork(
        mode=mode,
        collectives=(*collectives, *_lists(config, W)),
        seconds=rate * (embed_s + graph_s + _search_seconds(config, cluster, pick_s)),
        # As they were embedded, and in float64 for the search; they arrive padded.
        in_round={"candidates": 12 * V * C * D + 4 * W * rows * D, "embedding": forward.peak_bytes},
    )


def _table_work(config: Config, cluster: Cluster, network: Network, mode: str, identities: int) -> MiningWork:
    """Return the work of mode 'table': what each step shows of it, and a graph of the fresh classes per round."""
    mining, W, D, N = config.mining, cluster.world_size, network.embedding_dim, config.train.global_pairs
    rate = 1 / mining.batches_per_round
    entry_bytes = {"float32": 4, "bfloat16": 2}[mining.table_dtype]
    # Of random batches; mined ones meet fewer classes, which `mining.table_refresh_share` is for.
    F = round(identities * (1 - (1 - min(1.0, N / identities)) ** mining.table_max_age_steps))
    collectives = [
        Collective("mining", "labels of a step", "all-gather", 8 * N, 1),
        Collective("mining", "embeddings of a step", "all-gather", 2 * N * D * entry_bytes, 1),
        Collective("mining", "fresh rows", "all-gather", 8 * F, rate),
    ]
    if mining.table_exact_limit < F:
        K, P = mining.table_neighbours, mining.table_probes
        # Clusters, own scores and norms of a class; its embeddings; what each rank found for it.
        collectives += [
            Collective("mining", "sizes and counts", "all-gather", 8 * W, 5 * rate),
            Collective("mining", "clusters of classes", "all-gather", (8 + 8 * P + 12) * F, rate),
            Collective("mining", "all embeddings", "all-gather", 2 * entry_bytes * F * D, rate),
            Collective("mining", "neighbours and their scores", "all-gather", 8 * W * F * K, rate),
        ]
        graph_s = _approximate_seconds(cluster, F, D, P)
        on_gpu = (2 * entry_bytes * D + 8 * K + 16 * P) * F
    else:
        collectives.append(Collective("mining", "fresh embeddings", "all-gather", 8 * F * D, rate))
        graph_s = _graph_seconds(cluster, F, D)
        on_gpu = (8 + 16) * F * D
        collectives += _graph_collectives(F, neighbours_needed(F, subset_size(mining, N, F), min(N, F)), W, rate)
    collectives.append(Collective("mining", "mined embeddings", "all-gather", 8 * N * D, 2 * rate))
    return MiningWork(
        mode=mode,
        collectives=(*collectives, *_lists(config, W)),
        seconds=rate * (graph_s + _search_seconds(config, cluster, 1e-6 * _PICK_US)),
        kept={"mining table": math.ceil(identities / W) * (2 * D * entry_bytes + 4)},
        in_round={"fresh embeddings": on_gpu},
    )


def _num_mined(config: Config) -> int:
    return config.train.global_pairs - num_random_classes(config.mining, config.train.global_pairs)


def _search_seconds(config: Config, cluster: Cluster, pick_s: float) -> float:
    """Return the time of a round's search: whole batches are dealt out, and picks follow one another."""
    return math.ceil(config.mining.batches_per_round / cluster.world_size) * _num_mined(config) * pick_s


def _greedy_pick_seconds(cluster: Cluster, size: int, width: int) -> float:
    """Return the time of a pick without a graph: one product with all positives, in float64."""
    launch_s = 1e-6 * cluster.kernel_us
    return max(8 * size * width / (1e9 * cluster.gpu_gb_per_s), launch_s) + _GREEDY_KERNELS * launch_s


def _graph_seconds(cluster: Cluster, classes: int, width: int) -> float:
    """Return the time of an exact graph: all products in float64, as fast as float32 here, and three passes over them.

    Ranks share its rows.
    """
    products_s = 2 * classes**2 * width / (1e12 * cluster.gpu_float32_tflops)
    return (products_s + 3 * 8 * classes**2 / (1e9 * cluster.gpu_gb_per_s)) / cluster.world_size


def _approximate_seconds(cluster: Cluster, classes: int, width: int, probes: int) -> float:
    """Return the time of a graph found in 4 sqrt(F) clusters: all classes against all centres, and in their clusters.

    Ranks share both.
    """
    clusters = 4 * math.sqrt(classes)
    products = 2 * classes * clusters + probes * classes * classes / clusters
    return 2 * width * products / (1e12 * cluster.gpu_float32_tflops * cluster.world_size)


def _graph_collectives(classes: int, neighbours: int, world_size: int, rate: float) -> Iterator[Collective]:
    """Yield the exchange of a graph's rows and scores; capped pairs, if any, aren't known before."""
    rows = world_size * math.ceil(classes / world_size)
    yield Collective("mining", "sizes and counts", "all-gather", 8 * world_size, 3 * rate)
    yield Collective("mining", "neighbours and their scores", "all-gather", 4 * rows * neighbours, 2 * rate)


def _lists(config: Config, world_size: int) -> Iterator[Collective]:
    """Yield the exchange of lists: pickled objects, of which the identities are counted, and their sizes."""
    rate = 1 / config.mining.batches_per_round
    lists = math.ceil(config.mining.batches_per_round / world_size)
    yield Collective("mining", "sizes and counts", "all-gather", 8 * world_size, rate)
    yield Collective("mining", "lists", "all-gather", 8 * world_size * lists * config.train.global_pairs, rate)


def most_images_of_a_rank(images: int, world_size: int) -> int:
    """Return the most images that a rank embeds: whole batches are dealt out, so that some ranks may have none."""
    batches = math.ceil(images / BATCH_IMAGES)
    bounds = [min(images, rank * batches // world_size * BATCH_IMAGES) for rank in range(world_size + 1)]
    return max(stop - start for start, stop in itertools.pairwise(bounds))
