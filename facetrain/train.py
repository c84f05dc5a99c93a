"""The run: build, loop, log, save, evaluate. `torchrun --nproc-per-node W -m facetrain.train --config FILE`."""

import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from facetrain.checkpoint import (
    TrainState,
    init_weights_from,
    load_optimizer,
    load_state,
    load_weights,
    save_checkpoint,
    save_weights,
    weights_file,
)
from facetrain.config import Config, config_yaml, parse_config, run_command
from facetrain.data.decode import decode_face
from facetrain.data.loader import PairLoader
from facetrain.data.plan import Plan, count_draws, pairs_per_rank
from facetrain.data.shards import ShardSet
from facetrain.data.split import IdentitySplit, split_identities
from facetrain.embed import embed_images
from facetrain.engine import Engine, learning_rate_at
from facetrain.evaluation.judge import Judge
from facetrain.losses.npair import NPairLoss
from facetrain.mining.gathered import MiningSchedule, choose_mode, mine_round
from facetrain.models import build_backbone, convert_sync_batchnorm
from facetrain.run_folder import RunFolder, create_run_folder, open_run_folder, start_logging
from facetrain.step import StepStats, train_step
from facetrain.tracking import Tracker
from facetrain.world import World, start_world

log = logging.getLogger("facetrain.train")  # not __name__: torchrun runs this file as __main__

_ARTIFACTS = ("config.yaml", "results.json", "figures")


@dataclass(frozen=True)
class Inputs:
    """Everything a run reads, opened and checked before the process group starts."""

    shards: ShardSet
    split: IdentitySplit
    plan: Plan
    judge: Judge


def main(argv: Sequence[str]) -> None:
    """Train as the command line says."""
    train(parse_config(argv, prog="facetrain train"))


def train(config: Config) -> None:
    """Train, or continue, or report that the run is finished.

    Raises:
        ValueError: The config, the shards, the evaluation lists or the run folder can't be used; one line says why.
    """
    inputs = open_inputs(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    with start_world(config.run.device, config.run.timeout_s) as world:
        with world.main_first():  # rank 0 looks and creates, then the others look: all see the same folder
            folder = open_run_folder(config)
            if world.is_main and not folder.is_finished:
                create_run_folder(config)
        start_logging(folder.path if world.is_main else None)
        if folder.is_finished:
            log.info("%s is finished: results are in %s", folder.path, folder.path / "results.json")
            return
        Run(config, inputs, folder, world).go()


def open_inputs(config: Config, *, world_size: int) -> Inputs:
    """Open and check what a run of `world_size` processes would read; no process group is needed.

    Raises:
        ValueError: Something can't be used; the message names the file or key.
    """
    pairs_here = pairs_per_rank(config.train.global_pairs, world_size)
    if config.train.micro_pairs not in (None, pairs_here):
        raise ValueError(
            f"train.micro_pairs: a step of several forwards needs GradCache, which isn't there yet; expected null or"
            f" {pairs_here} (train.global_pairs / {world_size} processes), got {config.train.micro_pairs}"
        )
    shards = ShardSet.open(Path(config.data.shards))
    if shards.manifest.image_px != config.data.shard_px:
        raise ValueError(
            f"data.shard_px: {config.data.shards} holds images of {shards.manifest.image_px} px,"
            f" got {config.data.shard_px}"
        )
    split = split_identities(
        shards.table, holdout=config.data.holdout_identities, exclude=config.data.exclude, seed=config.run.seed
    )
    plan = Plan(shards.table, split.train, global_pairs=config.train.global_pairs, seed=config.run.seed)
    build_backbone(config.model, channels=config.data.channels, image_px=config.data.image_px)
    if config.model.init_from is not None:
        weights_file(Path(config.model.init_from))
    return Inputs(shards=shards, split=split, plan=plan, judge=Judge.open(config, shards, split))


class Run:
    """One process's part in a run, from where the run folder stands to its end."""

    def __init__(self, config: Config, inputs: Inputs, folder: RunFolder, world: World) -> None:
        """Build the network, put in what a checkpoint holds, and start the engine."""
        self.config, self.inputs, self.folder, self.world = config, inputs, folder, world
        self.plan, self.judge = inputs.plan, inputs.judge
        backbone, self.state = self._initial_state()
        self.loss = NPairLoss(config.loss, world)
        self.engine = Engine(
            backbone, config.train, world, pairs_per_rank=pairs_per_rank(config.train.global_pairs, world.world_size)
        )
        if folder.resume_from is not None:
            load_optimizer(folder.resume_from, self.engine)
        self.tracker = Tracker(config.tracking, folder.path, world, run_id=self.state.tracking_run)
        self.state.tracking_run = self.tracker.run_id
        self.mining = MiningSchedule(config.mining) if config.mining.mode != "off" else None

    def go(self) -> None:
        """Train to the last step and write the results."""
        self._announce()
        try:
            self._loop()
            self._finish()
        except BaseException:
            self.tracker.finish(failed=True)
            raise

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
            pin_memory=self.world.device.type == "cuda",
        )
        with loader:
            while state.step < config.train.steps:
                self._mine_if_due()
                batch = next(loader).to(self.world.device)
                waited_s += loader.wait_s
                self._seed_random_layers()
                rate = learning_rate_at(state.step, config.train)
                stats = train_step(self.engine, self.loss, batch, learning_rate=rate)
                count_draws(state.draws, self.plan.step(state.step))
                self.plan.forget_before(state.step)
                state.step += 1

                if self._due(config.train.log_every_steps):
                    steps = state.step - logged_step
                    self._log(stats, rate, step_s=(time.perf_counter() - logged_at) / steps, wait_s=waited_s / steps)
                if self._due(config.eval.every_steps):
                    self._evaluate(out=None)
                if self._due(config.train.save_every_steps) or state.best_step == state.step:
                    self._save(stats)
                if self._due(config.train.log_every_steps):
                    waited_s, logged_at, logged_step = 0.0, time.perf_counter(), state.step

    def _initial_state(self) -> tuple[nn.Module, TrainState]:
        config, resume_from = self.config, self.folder.resume_from
        torch.manual_seed(config.run.seed)
        backbone: nn.Module = build_backbone(config.model, channels=config.data.channels, image_px=config.data.image_px)
        draws = np.zeros(self.inputs.shards.table.num_identities, dtype=np.int64)
        state = TrainState(step=0, draws=draws)
        if resume_from is not None:
            load_weights(backbone, resume_from / "model.safetensors")
            state = load_state(resume_from)
            for step, identities in state.mined.items():
                self.plan.add_mined(step, identities[None])
        elif config.model.init_from is not None:
            unfit = init_weights_from(backbone, Path(config.model.init_from))
            log.info("weights from %s; layers that don't fit: %s", config.model.init_from, ", ".join(unfit) or "none")
        if config.model.sync_batchnorm:
            backbone = convert_sync_batchnorm(backbone, self.world)
        return backbone, state

    def _mine_if_due(self) -> None:
        """Before a round's step, on all ranks: mine the lists of coming steps. The plan takes them at a fixed lag."""
        round_index = self.mining.round_at(self.state.step) if self.mining else None
        if self.mining is None or round_index is None:
            return
        first_step = self.mining.first_served_step(round_index)
        if first_step >= self.config.train.steps:
            return
        mined = mine_round(
            round_index,
            self.config.mining,
            num_pairs=self.config.train.global_pairs,
            table=self.inputs.shards.table,
            identities=self.inputs.split.train,
            embed=self._embed_training_images,
            seed=self.config.run.seed,
            world=self.world,
        )
        self.plan.add_mined(first_step, mined.identities_BN)
        self.tracker.metrics(self.state.step, mined.stats)
        s = mined.stats
        log.info(
            "mining round %d  %d candidates  violation %.2f  loss %.3f (random %.3f)  ties %.1f%%  overlap %.0f%%"
            "  embed %.1f s  greedy %.1f s",
            *(round_index, int(s["mining/candidates"]), s["mining/violation"], s["mining/loss_mined"]),
            *(s["mining/loss_random"], 100 * s["mining/tie_share"], 100 * s["mining/overlap"]),
            *(s["mining/embed_s"], s["mining/greedy_s"]),
        )

    def _embed_training_images(self, image_idx: npt.NDArray[np.int64]) -> Tensor:
        shards, data = self.inputs.shards, self.config.data
        return embed_images(
            self.engine.backbone,
            lambda i: decode_face(shards.read(int(image_idx[i])), data, f"image {image_idx[i]} of {data.shards}"),
            len(image_idx),
            world=self.world,
            precision=self.config.train.precision,
        )

    def _seed_random_layers(self) -> None:
        """Let dropout draw from (seed, step, rank), so that resume needs no generator's state."""
        seeds = np.random.SeedSequence([self.config.run.seed, self.state.step, self.world.rank])
        torch.manual_seed(int(seeds.generate_state(1)[0]))

    def _due(self, every_steps: int) -> bool:
        return every_steps > 0 and self.state.step % every_steps == 0

    def _log(self, stats: StepStats, rate: float, *, step_s: float, wait_s: float) -> None:
        images_per_s = 2 * self.config.train.global_pairs / step_s
        figures = stats.read(self.world)  # over all ranks; also a sync point with the device
        self._require_finite(figures)
        drawn = self.state.draws[self.inputs.split.train]
        figures |= {
            "train/learning_rate": rate,
            "train/images_per_s": images_per_s,
            "train/step_s": step_s,
            "train/data_wait_s": wait_s,
            "train/identities_drawn": float((drawn > 0).mean()),
            "train/max_draws_of_an_identity": float(drawn.max()),
        }
        self.tracker.metrics(self.state.step, figures)
        log.info(
            "step %6d/%d  loss %.4f  norm %5.2f  grad %7.3f  lr %.2e  %7.1f images/s  wait %4.1f%%",
            *(self.state.step, self.config.train.steps, figures["train/npair_loss"]),
            *(math.sqrt(figures["train/squared_norm"]), figures["train/grad_norm"], rate),
            *(images_per_s, 100 * wait_s / step_s),
        )

    def _require_finite(self, figures: dict[str, float]) -> None:
        """Stop all ranks together, since all hold the same figures, before a checkpoint is written."""
        if not math.isfinite(figures["train/loss"]):
            raise ValueError(
                f"step {self.state.step}: train/loss is {figures['train/loss']} (gradient norm"
                f" {figures['train/grad_norm']:.3g}); try a smaller train.learning_rate or train.clip_norm=10."
                " The checkpoints written before are good"
            )

    def _save(self, stats: StepStats | None) -> None:
        if stats is not None:
            self._require_finite(stats.read(self.world))
        self.state.mined = self.plan.pending(self.state.step)
        save_checkpoint(self.folder.path, self.engine, self.state, self.config, self.world)

    def _evaluate(self, out: Path | None) -> None:
        """Judge the network as it stands, over all ranks; remember the best by held-out accuracy, never by LFW."""
        metrics = self.judge.evaluate(self.engine.backbone, self.config, self.world, out=out)
        accuracy = metrics.get("heldout/accuracy", -1.0)
        if accuracy > self.state.best_accuracy:
            self.state.best_accuracy, self.state.best_step = accuracy, self.state.step
        self.tracker.metrics(self.state.step, metrics)
        if metrics and out is None:
            log.info("step %6d  %s", self.state.step, self.judge.summary(metrics))

    def _announce(self) -> None:
        config, split, world = self.config, self.inputs.split, self.world
        if not world.is_main:
            return
        log.info("config\n%s", config_yaml(config).rstrip())
        log.info(
            "%d identities are trained on, %d held out, %d with a single image left out, %d excluded",
            *(len(split.train), len(split.heldout), len(split.single), len(split.excluded)),
        )
        if split.unknown_names:
            log.warning("data.exclude: not in the shards: %s", ", ".join(split.unknown_names))
        parameters = sum(p.numel() for p in self.engine.backbone.parameters())
        log.info("%s: %.2f million parameters, on %s", config.model.name, parameters / 1e6, world.device)
        pairs = config.train.global_pairs
        log.info(
            "%d pairs a step = %d ranks x %d; %d steps an epoch; %d steps = %d images",
            *(pairs, world.world_size, pairs // world.world_size, self.plan.steps_per_epoch),
            *(config.train.steps, 2 * pairs * config.train.steps),
        )
        if self.mining:
            log.info("mining: %s; %s", *choose_mode(config.mining, len(split.train)))
        if self.folder.resume_from is not None:
            log.info("continues at step %d from %s", self.state.step, self.folder.resume_from)
        self.tracker.parameters(config.flat())

    def _finish(self) -> None:
        path = self.folder.path
        self._save(None)
        if self.world.is_main:
            save_weights(self.engine.backbone, self.config, path)
        self._evaluate(out=path)
        if self.world.is_main:
            self.tracker.artifacts(*(p for name in _ARTIFACTS if (p := path / name).exists()))
            log.info("run       %s", path)
            log.info("weights   %s", path / "model.safetensors")
            log.info("results   %s", path / "results.json")
            log.info("tracking  %s", self.tracker.where() or path / "metrics.jsonl")
        self.tracker.finish()


if __name__ == "__main__":
    run_command(main)
