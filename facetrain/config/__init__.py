"""Every setting of a run: frozen dataclasses, one per section. A section is passed to what needs no more than it."""

from facetrain.config.data import DataConfig
from facetrain.config.eval import EvalConfig
from facetrain.config.loss import LossConfig
from facetrain.config.loss_parameters import ClassesConfig
from facetrain.config.mining import MiningConfig
from facetrain.config.model import ModelConfig
from facetrain.config.run import RunConfig, TrackingConfig
from facetrain.config.train import TrainConfig
from facetrain.config.whole import Config

__all__ = [
    "ClassesConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "LossConfig",
    "MiningConfig",
    "ModelConfig",
    "RunConfig",
    "TrackingConfig",
    "TrainConfig",
]
