"""Saving while training goes on: a full disk costs a checkpoint and a warning, not the run."""

import copy
import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from facetrain.checkpoint.state import TrainState, begin_checkpoint, save_checkpoint
from facetrain.config import Config
from facetrain.engine import Engine
from facetrain.world import World

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Writing:
    """A checkpoint that a thread of rank 0 is writing."""

    step: int
    best: tuple[float, int]
    """`best_value` and `best_step` in it."""
    done: "Future[None] | None"
    """None on other ranks."""


class Saver:
    """Writes a run's checkpoints, and counts those that couldn't be written."""

    def __init__(self, run_dir: Path, config: Config, world: World, state: TrainState) -> None:
        """Start from the state that the run starts or continues with."""
        self.run_dir, self.config, self.world = run_dir, config, world
        self._num_failed = 0
        self._saved_best = (state.best_value, state.best_step)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: _Writing | None = None

    def save(
        self,
        engine: Engine,
        state: TrainState,
        *,
        table_rows: Mapping[str, Tensor],
        loss_state: Mapping[str, Tensor],
        must: bool,
    ) -> None:
        """Write the checkpoint of `state.step`, or warn; every rank must call it, and does the same.

        With `train.async_checkpoint` it is copied here and written by a thread; whether that went well is found out at
        the next call. The one before is always whole before another begins, and the last of a run is waited for.

        Args:
            engine: Holds weights and optimizer.
            state: What else is saved. Where it calls this step the best and can't be saved, the best before is again.
            table_rows: This rank's part of the mining table; see `save_checkpoint`. It is written here in any case.
            loss_state: What the loss holds; see `save_checkpoint`.
            must: Training ends here, so that a failure can't wait for a next time.

        Raises:
            OSError: A rank can't write, and `must`, or `train.max_failed_saves` in a row have failed before.
        """
        best = state.best_value, state.best_step
        self.settle(state)
        if best[1] == state.step:  # what couldn't be written is written now
            state.best_value, state.best_step = best
        with self.world.waiting_up_to(self.config.run.checkpoint_timeout_s):
            try:
                if self.config.train.async_checkpoint and not must:
                    self._begin(engine, state, table_rows, loss_state)
                    return
                save_checkpoint(
                    *(self.run_dir, engine, state, self.config, self.world),
                    table_rows=table_rows,
                    loss_state=loss_state,
                )
            except OSError as error:  # on all ranks alike
                self._has_failed(state.step, error, state, must=must)
            else:
                self._has_saved((state.best_value, state.best_step))

    def close(self) -> None:
        """Wait for the thread, whatever ends the run: while it writes, nobody else may."""
        self._thread.shutdown()

    def _begin(
        self, engine: Engine, state: TrainState, table_rows: Mapping[str, Tensor], loss_state: Mapping[str, Tensor]
    ) -> None:
        """Over all ranks: copy what is saved, and let rank 0's thread write it."""
        finish = begin_checkpoint(
            *(self.run_dir, engine.weights(), engine.optimizer_state(), copy.deepcopy(state), self.config, self.world),
            table_rows=table_rows,
            loss_state={name: tensor.detach().to("cpu", copy=True) for name, tensor in loss_state.items()},
        )
        done = self._thread.submit(finish) if self.world.is_main else None
        self._writing = _Writing(state.step, (state.best_value, state.best_step), done)

    def settle(self, state: TrainState) -> None:
        """Over all ranks: wait for what the thread writes, and treat an error of it like one of `save`."""
        writing, self._writing = self._writing, None
        if writing is None:  # on all ranks alike
            return
        try:
            with self.world.waiting_up_to(self.config.run.checkpoint_timeout_s):
                self.world.on_main(lambda: writing.done.result() if writing.done else None)
        except OSError as error:
            self._has_failed(writing.step, error, state, must=False)
        else:
            self._has_saved(writing.best)

    def _has_saved(self, best: tuple[float, int]) -> None:
        self._num_failed = 0
        self._saved_best = best

    def _has_failed(self, step: int, error: OSError, state: TrainState, *, must: bool) -> None:
        self._num_failed += 1
        limit = self.config.train.max_failed_saves
        if must or self._num_failed > limit:
            raise OSError(f"step {step}: no checkpoint could be written ({error})") from None
        log.warning(
            f"step {step}: no checkpoint could be written ({error}); training goes on"
            f" (failure {self._num_failed} of {limit} in a row that train.max_failed_saves allows)"
        )
        if state.best_step == step:
            state.best_value, state.best_step = self._saved_best
