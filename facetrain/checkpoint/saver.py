"""Saving while training goes on: a full disk costs a checkpoint and a warning, not the run."""

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from facetrain.checkpoint.state import TrainState, save_checkpoint
from facetrain.config import Config
from facetrain.engine import Engine
from facetrain.world import World

log = logging.getLogger(__name__)


class Saver:
    """Writes a run's checkpoints, and counts those that couldn't be written."""

    def __init__(self, run_dir: Path, config: Config, world: World, state: TrainState) -> None:
        """Start from the state that the run starts or continues with."""
        self.run_dir, self.config, self.world = run_dir, config, world
        self._num_failed = 0
        self._saved_best = (state.best_value, state.best_step)

    def save(
        self,
        engine: Engine,
        state: TrainState,
        *,
        table_rows: Mapping[str, Tensor],
        class_vectors: Mapping[str, Tensor],
        must: bool,
    ) -> None:
        """Write the checkpoint of `state.step`, or warn; every rank must call it, and does the same.

        Args:
            engine: Holds weights and optimizer.
            state: What else is saved. Where it calls this step the best and can't be saved, the best before is again.
            table_rows: This rank's part of the mining table; see `save_checkpoint`.
            class_vectors: What the loss has learned; see `save_checkpoint`.
            must: Training ends here, so that a failure can't wait for a next time.

        Raises:
            OSError: A rank can't write, and `must`, or `train.max_failed_saves` in a row have failed before.
        """
        try:
            save_checkpoint(
                self.run_dir, engine, state, self.config, self.world, table_rows=table_rows, class_vectors=class_vectors
            )
        except OSError as error:  # on all ranks alike
            self._num_failed += 1
            limit = self.config.train.max_failed_saves
            if must or self._num_failed > limit:
                raise OSError(f"step {state.step}: no checkpoint could be written ({error})") from None
            log.warning(
                f"step {state.step}: no checkpoint could be written ({error}); training goes on"
                f" (failure {self._num_failed} of {limit} in a row that train.max_failed_saves allows)"
            )
            state.best_value, state.best_step = self._saved_best
        else:
            self._num_failed = 0
            self._saved_best = (state.best_value, state.best_step)
