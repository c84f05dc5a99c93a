"""Neighbours of each of millions of classes, found in clusters that the ranks share: approximate, the same for any W.

Dims: F classes, L clusters, P probed clusters of a class, K neighbours, m members of a cluster, q classes that probe
it, D embedding width.
"""

import torch
from torch import Tensor

from facetrain.search import similarity_blocks
from facetrain.world import World

_NONE = torch.iinfo(torch.int64).min
_MERGED_ROWS = 1 << 16


def neighbours_in_clusters(
    anchors_FD: Tensor, positives_FD: Tensor, cluster_F: Tensor, probed_FP: Tensor, *, num_neighbours: int, world: World
) -> tuple[Tensor, Tensor]:
    """Return the classes c of largest <a_s, p_c> for each class s, among those in the clusters that s probes.

    Cluster by cluster, all classes that probe it meet all its members in one product, and each keeps its best. Rank r
    takes clusters r, r + W, .. So every product has the same operands at any number of ranks, and what is kept doesn't
    depend on the order in which it is found: among equal scores the lower class comes first.

    Over all ranks: an all-gather of W * 8 F K bytes, in parts; every rank ends with all neighbours.

    Args:
        anchors_FD: The same on every rank, of any floating type; products are float32.
        positives_FD: As anchors.
        cluster_F: int64, the cluster of each class's positive.
        probed_FP: int64, the distinct clusters that each class probes.
        num_neighbours: K.
        world: The ranks that share the work.

    Returns:
        Classes, int32 [F, K], best first, without the class itself, -1 where too few were found; and their scores,
        float32 [F, K], -inf there.
    """
    num_classes, num_probes = probed_FP.shape
    best_FK = torch.full((num_classes, num_neighbours), _NONE, device=anchors_FD.device)
    members, first_member = _by_cluster(cluster_F)
    visits, first_visit = _by_cluster(probed_FP.flatten())
    for cluster in range(world.rank, min(len(first_member), len(first_visit)) - 1, world.world_size):
        members_m = members[first_member[cluster] : first_member[cluster + 1]]
        queries_q = visits[first_visit[cluster] : first_visit[cluster + 1]] // num_probes
        if len(members_m) == 0:
            continue
        items_mD = positives_FD[members_m].float()
        for rows, scores_qm in similarity_blocks(anchors_FD[queries_q].float(), items_mD):
            found = scores_qm.topk(min(num_neighbours + 1, len(members_m)), dim=1)
            classes_qk, who_q = members_m[found.indices], queries_q[rows]
            keys_qk = _keys(found.values, classes_qk).masked_fill_(classes_qk == who_q[:, None], _NONE)
            best_FK[who_q] = torch.cat([best_FK[who_q], keys_qk], dim=1).topk(num_neighbours, dim=1).values
    if world.world_size > 1:
        for block_bK in best_FK.split(_MERGED_ROWS):
            every_bWK = world.all_gather(block_bK).unflatten(0, (world.world_size, -1)).transpose(0, 1)
            block_bK.copy_(every_bWK.flatten(1).topk(num_neighbours, dim=1).values)
    return _classes_and_scores(best_FK)


def _by_cluster(cluster_X: Tensor) -> tuple[Tensor, list[int]]:
    """Return the places of cluster_X in the order of clusters, where each cluster starts among them, and the end."""
    counts = cluster_X.bincount().cumsum(0).tolist()
    return cluster_X.argsort(stable=True), [0, *counts]


def _keys(scores: Tensor, classes: Tensor) -> Tensor:
    """Return int64 keys in the order of the scores, of equal scores the lower class above the higher."""
    bits = scores.view(torch.int32)
    return (_monotone(bits).long() << 32) | (torch.iinfo(torch.int32).max - classes)


def _classes_and_scores(keys: Tensor) -> tuple[Tensor, Tensor]:
    classes = (torch.iinfo(torch.int32).max - (keys & 0xFFFFFFFF)).int()
    scores = _monotone((keys >> 32).int()).view(torch.float32)
    is_none = keys == _NONE
    return classes.masked_fill_(is_none, -1), scores.masked_fill_(is_none, -torch.inf)


def _monotone(bits: Tensor) -> Tensor:
    """Turn the bits of float32 numbers, as int32, into integers of the same order, and back."""
    return bits ^ ((bits >> 31) & torch.iinfo(torch.int32).max)
