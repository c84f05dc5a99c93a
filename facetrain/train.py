"""The run: build, loop, log, save, evaluate. `torchrun --nproc-per-node W -m facetrain.train --config FILE`."""

import logging
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from facetrain.announcement import announce
from facetrain.checkpoint.folder import checkpoint_folder
from facetrain.checkpoint.saver import Saver
from facetrain.checkpoint.state import TrainState, load_loss, load_optimizer, load_state, load_table_rows
from facetrain.checkpoint.weights import init_weights_from, load_weights, save_weights
from facetrain.command_line import parse_config, run_command
from facetrain.config import Config
from facetrain.data.loader import PairLoader
from facetrain.data.plan import count_draws, pairs_per_rank
from facetrain.data.reading import report_replaced
from facetrain.engine import Engine, learning_rate_at
from facetrain.evaluation.judge import Judgement
from facetrain.evaluation.model_card import write_model_card
from facetrain.evaluation.report import format_table, write_report, write_results
from facetrain.evaluation.threshold import NETWORK_KEY
from facetrain.inputs import Inputs, check_same_shards, open_inputs, share_out
from facetrain.losses.build import build_loss
from facetrain.mining.miner import Miner
from facetrain.models import Backbone, build_backbone, convert_sync_batchnorm
from facetrain.networks import network_sha256
from facetrain.run_folder import RunFolder, claim_run_folder, start_logging
from facetrain.step import train_step
from facetrain.tracking import Tracker, lacks_results
from facetrain.tracking.environment import git_commit
from facetrain.watch.health import CollapseWatch, FiniteWatch, loss_of_equal_scores, not_finite_error
from facetrain.watch.heartbeat import Heartbeat
from facetrain.watch.profile import StepProfile
from facetrain.watch.stop import StopRequest
from facetrain.watch.stragglers import StepClock, TimedLoss
from facetrain.world import World, launched_world_size, start_world

log = logging.getLogger("facetrain.train")  # not __name__: torchrun runs this file as __main__


def main(argv: Sequence[str]) -> None:
    """Train as the command line says."""
    train(parse_config(argv, prog="facetrain train"))


def train(config: Config) -> None:
    """Train, or continue, or report that the run is finished.

    Raises:
        ValueError: The config, the shards, the evaluation lists or the run folder can't be used; one line says why.
    """
    inputs = open_inputs(config, world_size=launched_world_size())
    with start_world(config.run.device, config.run.timeout_s, config.run.rendezvous_timeout_s) as world:
        check_same_shards(inputs.shards, world)
        if config.data.partitioned:
            inputs = share_out(inputs, config, world)
        with claim_run_folder(config, world) as folder:
            start_logging(folder.path if world.is_main else None)
            if folder.is_finished:
                log.info(f"{folder.path} is finished: results are in {folder.path / 'results.json'}")
                name = config.tracking.register_as
                if config.tracking.backend == "mlflow" and world.is_main and lacks_results(folder.path):
                    log.info(f"`facetrain sync {folder.path}` sends MLflow what it lacks of it")
                if name is not None and config.tracking.backend == "mlflow":
                    log.info(f"`facetrain sync {folder.path} --register {name}` registers it, where that isn't done")
            else:
                Run(config, inputs, folder, world).go()


class Run:
    """One process's part in a run, from where the run folder stands to its end."""

    def __init__(self, config: Config, inputs: Inputs, folder: RunFolder, world: World) -> None:
        """Build the network, put in what a checkpoint holds, and start the engine."""
        self.config, self.inputs, self.folder, self.world = config, inputs, folder, world
        self.plan, self.judge = inputs.plan, inputs.judge
        backbone, self.state = self._initial_state()
        # With these, a rank that is fast waits in its forward for the others.
        exchanges = config.model.sync_batchnorm or config.train.zero_stage == 3
        self.clock = StepClock(world, factor=config.train.straggler_factor, forward_exchanges=exchanges)
        loss = build_loss(
            config.loss,
            config.train,
            world,
            identities=inputs.split.train,
            embedding_dim=backbone.embedding_dim,
            seed=config.run.seed,
        )
        self.loss = TimedLoss(loss, self.clock)
        self.engine = Engine(
            backbone, config.train, world, pairs_per_rank=pairs_per_rank(config.train.global_pairs, world.world_size)
        )
        if folder.resume_from is not None:
            load_optimizer(folder.resume_from, self.engine)
            load_loss(folder.resume_from, self.loss)
        self.tracker = Tracker(
            config.tracking,
            folder.path,
            world,
            parameters=_compared(config) | {"data.manifest_sha256": inputs.shards.manifest.sha256},
        )
        self.saver = Saver(folder.path, config, world, self.state)
        mines = config.mining.mode != "off"
        self.miner = Miner(config, inputs.shards, self.plan, world) if mines else None
        self.replaced: list[str] = []
        """A line for each image of this rank that was replaced since the last logging step."""
        self.finite = FiniteWatch(world)
        self.collapse = CollapseWatch(
            loss_of_equal_scores(config.loss, config.train.global_pairs, config.train.images_per_identity)
        )
        if self.miner and self.miner.table and folder.resume_from is not None and self.state.step > 0:
            self.miner.table.load(load_table_rows(folder.resume_from, self.miner.table.rows))

    def go(self) -> None:
        """Train to the last step and write the results."""
        announce(*(self.config, self.inputs, self.folder, self.engine, self.miner, self.world), step=self.state.step)
        try:
            if self.config.eval.at_start and self.state.step == 0:
                self._report(self.judge.judge(self.engine.backbone, self.world))
            self._loop()
            if self.state.step < self.config.train.steps:
                self.tracker.finish(status="KILLED")
            else:
                self._finish()
        except BaseException:
            self.tracker.finish(status="FAILED")
            raise
        finally:
            self.saver.close()

    def _loop(self) -> None:
        config, state = self.config, self.state
        waited_s, logged_at, logged_step = 0.0, time.perf_counter(), state.step
        loader = PairLoader(
            self.plan,
            self.inputs.shards,
            config.data,
            rank=self.world.rank,
            world_size=self.world.world_size,
            first_step=state.step,
            last_step=config.train.steps,
            device=self.world.device,
        )
        profile = StepProfile.open(config, self.engine, self.loss, self.tracker, self.world, step=state.step)
        loss = self.loss if profile is None else profile.loss
        with loader, StopRequest(self.world) as stop, Heartbeat(self.world) as heartbeat:
            while state.step < config.train.steps:
                if stop.is_due():  # the same answer on all ranks
                    self._save(must=True)
                    stop.end(state.step)
                    return
                self._mine_if_due()
                heartbeat.step = state.step
                if profile is not None:
                    profile.before(state.step)
                self.clock.begin()
                batch = next(loader)
                self.clock.has_data()
                if profile is not None:
                    profile.clock.mark("data wait")
                waited_s += loader.wait_s
                self.replaced += batch.replaced
                self._seed_random_layers()
                rate = learning_rate_at(state.step, config.train)
                stats = train_step(self.engine, loss, batch, learning_rate=rate)
                if self.miner:
                    self.miner.observe(state.step, batch.labels_n, stats.embeddings_VnD)  # over all ranks
                count_draws(state.draws, self.plan.step(state.step))
                state.step += 1
                self.finite.observe(state.step, stats)

                if self._due(config.train.log_every_steps):
                    self._stop_if_not_finite()
                    figures = stats.read(self.world)  # waits for the device, so the time comes after it
                    steps, now = state.step - logged_step, time.perf_counter()
                    self._log(figures, rate, step_s=(now - logged_at) / steps, wait_s=waited_s / steps)
                    if profile is not None:
                        profile.clock.mark("logging")
                    waited_s, logged_at, logged_step = 0.0, time.perf_counter(), state.step
                evaluates = self._due(config.eval.every_steps) and state.step < config.train.steps
                if evaluates or self._due(config.train.save_every_steps):
                    self._stop_if_not_finite()  # waits for the device: what it still trains is no pause
                paused_at = time.perf_counter()
                if evaluates:
                    self._log_judgement(self.judge.judge(self.engine.backbone, self.world))
                if self._due(config.train.save_every_steps) or state.best_step == state.step:
                    self._save()
                logged_at += time.perf_counter() - paused_at  # so that train/images_per_s is of training
            if profile is not None:
                profile.before(state.step)

    def _initial_state(self) -> tuple[Backbone, TrainState]:
        config, resume_from, shards = self.config, self.folder.resume_from, self.inputs.shards
        torch.manual_seed(config.run.seed)
        # What it was begun from needn't be there any more when it goes on.
        model = config.model if resume_from is None else replace(config.model, imagenet_weights=None)
        backbone = build_backbone(model, channels=config.data.channels, image_px=config.data.image_px)
        sha256 = shards.manifest.content_sha256
        state = TrainState(step=0, draws=np.zeros(shards.table.num_identities, dtype=np.int64), shards_sha256=sha256)
        if resume_from is not None:
            load_weights(backbone, resume_from / "model.safetensors")
            state = load_state(resume_from)
            if state.shards_sha256 != sha256:
                raise ValueError(f"data.shards: {shards.place} isn't what {resume_from} was trained on")
            for step, identities in state.mined.items():
                self.plan.add_mined(step, identities[None])
        elif config.model.init_from is not None:
            unfit = init_weights_from(backbone, Path(config.model.init_from))
            log.info(f"weights from {config.model.init_from}; layers that don't fit: {', '.join(unfit) or 'none'}")
        if config.model.sync_batchnorm:
            convert_sync_batchnorm(backbone, self.world)
        return backbone, state

    def _mine_if_due(self) -> None:
        """Before a round's step, on all ranks: mine the lists of coming steps. The plan takes them at a fixed lag."""
        if self.miner is None or not self.miner.is_due(self.state.step):
            return
        self._stop_if_not_finite()
        found = self.miner.mine_before(self.state.step, self.engine.backbone)
        if found is not None:
            first_step, mined = found
            self.plan.add_mined(first_step, mined.identities_BN)
            self.tracker.metrics(self.state.step, mined.stats)

    def _seed_random_layers(self) -> None:
        """Let dropout draw from (seed, step, rank), so that resume needs no generator's state."""
        seeds = np.random.SeedSequence([self.config.run.seed, self.state.step, self.world.rank])
        torch.manual_seed(int(seeds.generate_state(1)[0]))

    def _due(self, every_steps: int) -> bool:
        return every_steps > 0 and self.state.step % every_steps == 0

    def _stop_if_not_finite(self) -> None:
        """End all ranks together if a step since the start had a gradient that isn't finite, as that of a NaN loss."""
        bad = self.finite.first_bad_step()  # over all ranks if there is one; waits for the device
        if bad is not None:
            step = int(bad["step"]) - 1
            names = [self.inputs.shards.table.names[i] for i in self.plan.step(step).labels_N]
            rate = learning_rate_at(step, self.config.train)
            path, is_main = self.folder.path, self.world.is_main
            raise not_finite_error(bad, names, learning_rate=rate, folder=path, is_main=is_main)
        self.plan.forget_before(self.state.step)

    def _log(self, figures: dict[str, float], rate: float, *, step_s: float, wait_s: float) -> None:
        images_per_s = 2 * self.config.train.global_pairs / step_s
        drawn = self.state.draws[self.inputs.split.train]
        rank_figures, straggler = self.clock.read()  # over all ranks
        if straggler:
            log.warning(straggler)
        figures |= rank_figures | {
            "train/learning_rate": rate,
            "train/images_per_s": images_per_s,
            "train/step_s": step_s,
            "train/data_wait_s": wait_s,
            "train/identities_drawn": float((drawn > 0).mean()),
            "train/max_draws_of_an_identity": float(drawn.max()),
        }
        if self.config.data.on_bad_image == "skip":
            figures["train/replaced_images"] = float(report_replaced(self.replaced, self.world))  # over all ranks
            self.replaced = []
        self.tracker.metrics(self.state.step, figures)
        warning = self.collapse.warning(figures) if self.state.step > self.config.train.warmup_steps else None
        if warning:
            log.warning(warning)
        log.info(
            f"step {self.state.step:6d}/{self.config.train.steps}  loss {figures['train/data_loss']:.4f}"
            f"  norm {math.sqrt(figures['train/squared_norm']):5.2f}  grad {figures['train/grad_norm']:7.3f}"
            f"  lr {rate:.2e}  {images_per_s:7.1f} images/s  wait {wait_s / step_s:5.1%}"
        )

    def _save(self, *, must: bool = False) -> None:
        self._stop_if_not_finite()  # a checkpoint is never of a network that is lost
        self.state.mined = self.plan.pending(self.state.step)
        table = self.miner.table.state() if self.miner and self.miner.table else {}
        loss_state = self.loss.state()  # over all ranks
        self.saver.save(self.engine, self.state, table_rows=table, loss_state=loss_state, must=must)

    def _log_judgement(self, judgement: Judgement) -> None:
        """Record how good the network is, and whether it is the best so far by `eval.best_metric`."""
        self.saver.settle(self.state)  # if the best before couldn't be written, it is none to compare with
        best_metric, figures = self.config.eval.best_metric, judgement.metrics()
        if best_metric in figures and figures[best_metric] > self.state.best_value:
            self.state.best_value, self.state.best_step = figures[best_metric], self.state.step
        elif figures and best_metric not in figures:
            log.warning(f"eval.best_metric: {best_metric} was not measured, so no checkpoint is the best")
        self._report(judgement)

    def _report(self, judgement: Judgement) -> None:
        self.tracker.metrics(self.state.step, judgement.metrics())
        if judgement.metrics():
            log.info(f"step {self.state.step:6d}  {judgement.summary()}")

    def _finish(self) -> None:
        """Save, evaluate, and write what others read; results.json comes last, since it says that a run is finished."""
        path, state = self.folder.path, self.state
        self._save(must=True)
        judgement = self.judge.judge(self.engine.backbone, self.world, progress=True)
        self._log_judgement(judgement)
        weights = self.engine.weights()  # over all ranks
        if self.world.is_main:
            save_weights(weights, self.config, path)
            if judgement.evaluation is not None:
                sys.stdout.write(format_table(judgement.evaluation))
                write_report(judgement.evaluation, path, subject=str(path), read_picture=self.judge.read_picture)
            card = write_model_card(path, self.config, self.inputs.shards.manifest, judgement.results(), git_commit())
            self.tracker.describe(card)
            write_results(judgement.results() | {NETWORK_KEY: network_sha256(path)}, path)
            self.tracker.results()
            if state.best_step >= 0:
                best = checkpoint_folder(path, state.best_step)
                log.info(f"best      {best}  {self.config.eval.best_metric} {state.best_value:.2%}")
            log.info(f"run       {path}")
            log.info(f"weights   {path / 'model.safetensors'}")
            log.info(f"results   {path / 'results.json'}")
            log.info(f"tracking  {self.tracker.where()}")
        self.tracker.finish()


def _compared(config: Config) -> dict[str, Any]:
    """Return the settings by which runs are compared: all but their names, which MLflow shows anyway."""
    return {k: value for k, value in config.flat().items() if k != "run.dir" and not k.startswith("tracking.")}


if __name__ == "__main__":
    run_command(main)
