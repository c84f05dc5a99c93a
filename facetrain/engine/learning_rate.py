"""The learning rate of a step."""

import math

from facetrain.config import TrainConfig


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Return the learning rate of a step: linear warm-up, then constant, dropping by steps, or falling as a cosine."""
    rate = config.learning_rate
    if step < config.warmup_steps:
        return rate * (step + 1) / config.warmup_steps
    if config.schedule == "step":
        return rate * config.drop_factor ** sum(step >= drop for drop in config.drop_steps)
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        return rate * 0.5 * (1.0 + math.cos(math.pi * progress))
    return rate
