"""What lives on a GPU, part by part."""

from collections.abc import Mapping
from dataclasses import dataclass

from facetrain.config import Config
from facetrain.estimate.collectives import padded_numel
from facetrain.estimate.network import LossWork, Network, Passes
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

    At ZeRO 1 and 2 the optimizer works on a share of its own of the weights, a copy also where weights are float32.
    """
    P, train = network.parameters, config.train
    padded = sum(padded_numel(numel, world_size) for numel in network.group_parameters)
    share = padded // world_size
    has_state = train.optimizer == "adamw" or train.momentum > 0
    state = _STATE_BYTES[train.optimizer] * (P if train.zero_stage == 0 else share) if has_state else 0
    if train.optimizer == "adamw":  # a count of steps per tensor
        state += 4 * (sum(network.group_tensors) if train.zero_stage == 0 else len(network.group_parameters))
    kept = {"weights": 4 * (P if train.zero_stage == 0 else padded) + network.buffer_bytes, "optimizer state": state}
    return kept | ({"optimizer's share of weights": 4 * share} if train.zero_stage > 0 else {})


def step_memory(config: Config, network: Network, passes: Passes, loss: LossWork, schedule: Schedule) -> dict[str, int]:
    """Return the bytes that a step takes at its fullest.

    The loss and the backward of the network don't live at the same time; the larger is counted.
    """
    pixels = config.data.image_px**2 * config.data.channels
    saved = schedule.alive * passes.saved_bytes
    in_backward = saved + passes.working_bytes
    in_loss = loss.peak_bytes + (0 if schedule.is_chunked else saved)
    # With GradCache all embeddings and their gradients stay through the second pass.
    embeddings = 2 * 2 * schedule.pairs * network.embedding_dim * 4 if schedule.is_chunked else 0
    return {
        "gradients": 4 * network.parameters,
        "activations": in_backward,
        "loss beside them": max(0, in_loss - in_backward) + embeddings,
        "images": 2 * 2 * schedule.pairs * pixels,  # this batch and the next, as uint8
    }


def mining_memory(
    network: Network, embedding_peak_bytes: int, *, num_candidates: int, gathered_rows: int
) -> dict[str, int]:
    """Return the bytes that a round of gathered mining takes: all candidates on every GPU, twice while they arrive."""
    row_bytes = 4 * network.embedding_dim
    return {
        "candidates": row_bytes * (2 * num_candidates + gathered_rows),
        "embedding": embedding_peak_bytes,
    }
