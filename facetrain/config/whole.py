"""The whole of a run's settings, and what concerns two sections."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from facetrain.config.data import DataConfig
from facetrain.config.eval import EvalConfig
from facetrain.config.loss import LossConfig
from facetrain.config.mining import MiningConfig
from facetrain.config.model import ModelConfig
from facetrain.config.run import RunConfig, TrackingConfig
from facetrain.config.train import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    mining: MiningConfig = field(default_factory=MiningConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        """Check what concerns two sections."""
        for key, value in self.flat().items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{key}: expected a finite number, got {value}")
        if self.train.overlap:
            self._check_overlap()
        scores_per_pair = self.loss.scores_per_pair
        row_bytes = 4 * self.train.global_pairs * scores_per_pair
        if self.loss.tile_bytes < row_bytes:
            raise ValueError(
                f"loss.tile_bytes: expected at least the {row_bytes} bytes of a row of scores, {scores_per_pair}"
                f" for each of train.global_pairs = {self.train.global_pairs}, got {self.loss.tile_bytes}"
            )
        if self.mining.mode in ("gathered", "quota") and self.mining.candidates < self.train.global_pairs:
            raise ValueError(
                f"mining.candidates: expected at least train.global_pairs = {self.train.global_pairs} classes to"
                f" choose from, got {self.mining.candidates}"
            )
        if self.mining.mode == "quota" and self.train.global_pairs % self.mining.virtual_nodes:
            raise ValueError(
                f"mining.virtual_nodes: expected a divisor of train.global_pairs = {self.train.global_pairs}, got"
                f" {self.mining.virtual_nodes}"
            )
        if self.data.window_shards is not None:
            self._check_window()
        self._check_sampler()
        if self.data.partitioned or self.data.window_shards is not None:
            self._check_parts_are_mined()
        if self.data.decode == "gpu" and self.run.device == "cpu":
            raise ValueError("data.decode: 'gpu' needs a CUDA device, got run.device cpu; expected 'cpu' here")
        ahead = self.data.workers * self.data.prefetch
        if self.mining.mode != "off" and self.mining.lag_steps < ahead:
            raise ValueError(
                f"mining.lag_steps: expected at least data.workers * data.prefetch = {ahead}, so that no batch is"
                f" read before it is mined, got {self.mining.lag_steps}"
            )

    def _check_window(self) -> None:
        if self.train.global_pairs % self.data.virtual_nodes:
            raise ValueError(
                f"data.virtual_nodes: expected a divisor of train.global_pairs = {self.train.global_pairs}, got"
                f" {self.data.virtual_nodes}"
            )

    def _check_parts_are_mined(self) -> None:
        key = "partitioned" if self.data.partitioned else "window_shards"
        if self.mining.mode not in ("off", "quota"):
            raise ValueError(
                f"mining.mode: expected 'off' or 'quota' with data.{key}, since a rank can't read all shards,"
                f" got '{self.mining.mode}'"
            )
        if self.mining.mode == "quota" and self.mining.virtual_nodes % self.data.virtual_nodes:
            raise ValueError(
                f"mining.virtual_nodes: expected a multiple of data.virtual_nodes = {self.data.virtual_nodes}, got"
                f" {self.mining.virtual_nodes}"
            )

    def _check_sampler(self) -> None:
        """Check that the loss, mining and the shards' window can do with so many images of an identity."""
        images = self.train.images_per_identity
        if self.loss.name == "group" and self.loss.group.anchors >= images:
            raise ValueError(
                f"loss.group.anchors: expected fewer than train.images_per_identity = {images}, so that there are"
                f" classes to find, got {self.loss.group.anchors}"
            )
        if images > 2 and self.mining.mode != "off":
            raise ValueError(
                f"train.images_per_identity: expected 2 with mining.mode '{self.mining.mode}', which mines pairs, got"
                f" {images}"
            )
        if images > 2 and (self.data.partitioned or self.data.window_shards is not None):
            key = "partitioned" if self.data.partitioned else "window_shards"
            raise ValueError(f"train.images_per_identity: expected 2 with data.{key}, got {images}")

    def _check_overlap(self) -> None:
        if self.model.norm == "batch" or self.model.name.startswith("torchvision:"):
            raise ValueError(
                f"train.overlap: anchors and positives would have batch statistics of their own; expected model.norm"
                f" group or none, got '{self.model.norm}' with '{self.model.name}'"
            )
        if self.train.micro_pairs is not None:
            raise ValueError(f"train.overlap: goes with train.micro_pairs null, got {self.train.micro_pairs}")
        if self.loss.name not in ("npair-mc", "npair-ovo"):
            raise ValueError(f"train.overlap: goes with loss.name npair-mc or npair-ovo, got '{self.loss.name}'")

    def flat(self) -> dict[str, Any]:
        """Return every setting under its dotted key."""
        return {
            key: value for section in fields(self) for key, value in _flat(section.name, getattr(self, section.name))
        }


def _flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the settings under a key: sections may hold sections."""
    if is_dataclass(value):
        for inner in fields(value):
            yield from _flat(f"{key}.{inner.name}", getattr(value, inner.name))
    else:
        yield key, value
