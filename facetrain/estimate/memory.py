"""What lives on a GPU, part by part."""

from collections.abc import Mapping
from dataclasses import dataclass

from facetrain.config import Config
from facetrain.estimate.loss import LossWork
from facetrain.estimate.network import Network, Passes
from facetrain.estimate.schedule import Schedule

_STATE_BYTES = {"sgd": 4, "adamw": 8}
"""Of a parameter: float32 momentum; or the two float32 moments."""


@dataclass(frozen=True)
class Memory:
    """Bytes on a GPU at its fullest."""

    kept: Mapping[str, int]
    """What stays from step to step."""
    in_step: Mapping[str, int]
    """What a step takes at its fullest, which is the start of the last backward."""
    in_mining: Mapping[str, int]
    """What a mining round takes, while no step runs."""

    @property
    def total_bytes(self) -> int:
        """The fullest moment: what stays, and the larger of a step and a mining round."""
        return sum(self.kept.values()) + max(sum(self.in_step.values()), sum(self.in_mining.values()))


def kept_memory(config: Config, network: Network, world_size: int) -> dict[str, int]:
    """Return the bytes of what stays: weights, and the optimizer's state by ZeRO stage.

    From ZeRO 1 on the optimizer works on a share of its own of the weights, a copy also where weights are float32.
    ZeRO 3 is approximate: DeepSpeed keeps small parameters whole.
    """
    P, train = network.parameters, config.train
    padded = network.padded_parameters(world_size)
    share = padded // world_size
    has_state = train.optimizer == "adamw" or train.momentum > 0
    state = _STATE_BYTES[train.optimizer] * (P if train.zero_stage == 0 else share) if has_state else 0
    if train.optimizer == "adamw":  # a count of steps per tensor
        state += 4 * (sum(network.group_tensors) if train.zero_stage == 0 else len(network.group_parameters))
    weights = {0: P, 1: padded, 2: padded, 3: share}[train.zero_stage]
    kept = {"weights": 4 * weights + network.buffer_bytes, "optimizer state": state}
    return kept | ({"optimizer's share of weights": 4 * share} if train.zero_stage > 0 else {})


def kept_by_loss(config: Config, loss: LossWork) -> dict[str, int]:
    """Return the bytes of what a loss keeps from step to step, where it does: class vectors, batches before."""
    kept, train = {}, config.train
    if loss.class_numel:
        state = {"adamw": 8 * loss.class_numel + 4, "sgd": 4 * loss.class_numel if train.momentum > 0 else 0}
        kept["class vectors"] = 4 * loss.class_numel
        kept["their optimizer state"] = state[train.optimizer]
    return kept | ({"batches before": loss.remembered_bytes} if loss.remembered_bytes else {})


def step_memory(
    config: Config, network: Network, passes: Passes, loss: LossWork, schedule: Schedule, world_size: int
) -> dict[str, int]:
    """Return the bytes that a step takes at its fullest.

    The loss, the backward of the network and the reduction of gradients, which copies them, don't live at the same
    time; the largest is counted. Gradients are counted as if all were there when backward starts.
    """
    whole = 4 * network.parameters
    share = 4 * network.padded_parameters(world_size) // world_size
    gradients = {0: whole, 1: whole, 2: share, 3: share}[config.train.zero_stage]
    # DeepSpeed's bucket, into which ZeRO 1 to 3 move gradients, is as large as the network.
    bucket = {"bucket of gradients": whole} if config.train.zero_stage > 0 else {}
    pixels = config.data.image_px**2 * config.data.channels
    saved = schedule.alive * passes.saved_bytes
    in_backward = saved + passes.working_bytes
    in_loss = loss.peak_bytes + (0 if schedule.is_chunked else saved)
    # With GradCache all embeddings and their gradients stay through the second pass.
    embeddings = 2 * 2 * schedule.pairs * network.embedding_dim * 4 if schedule.is_chunked else 0
    return {
        "gradients": gradients,
        **bucket,
        **({"gradient of class vectors": 4 * loss.class_numel} if loss.class_numel else {}),
        **({"gathered weights": whole} if config.train.zero_stage == 3 else {}),
        "activations": in_backward,
        "loss or reduction beside them": max(0, in_loss - in_backward, whole - in_backward) + embeddings,
        "images": 2 * 2 * schedule.pairs * pixels,  # this batch and the next, as uint8
    }
