"""What a run says of itself before its first step."""

import logging
import os

from facetrain.config import Config
from facetrain.engine import Engine
from facetrain.inputs import Inputs
from facetrain.masking import mask_secrets
from facetrain.mining.miner import Miner
from facetrain.run_folder import RunFolder
from facetrain.watch.health import slow_precision_warning
from facetrain.world import World

log = logging.getLogger("facetrain.train")


def announce(
    config: Config, inputs: Inputs, folder: RunFolder, engine: Engine, miner: Miner | None, world: World, *, step: int
) -> None:
    """Log the settings, the data, the network and the plan, and what of them is worth a warning.

    Args:
        config: Of the run.
        inputs: What it reads.
        folder: Where it writes, and what it continues from.
        engine: Holds its network.
        miner: Its mining; None mines nothing.
        world: Its ranks.
        step: Where it begins.
    """
    defaults = Config().flat()
    settings = "".join(f"\n  {key}: {value}" for key, value in config.flat().items() if value != defaults[key])
    log.info(mask_secrets(f"settings that aren't the defaults; {folder.path / 'config.yaml'} has all{settings}"))
    _announce_data(config, inputs)
    log.info(f"{config.model.name}: {engine.num_parameters / 1e6:.2f} million parameters, on {world.device}")
    warning = slow_precision_warning(config.train.precision, world.device)
    if warning:
        log.warning(warning)
    pairs, steps = config.train.global_pairs, config.train.steps
    log.info(
        f"{pairs} pairs a step = {world.world_size} ranks x {pairs // world.world_size};"
        f" {inputs.plan.steps_per_epoch} steps an epoch; {steps} steps = {2 * pairs * steps} images"
    )
    log.info(inputs.plan.describe())
    if miner:
        log.info(miner.mode.describe())
    for checkpoint, damage in folder.damaged.items():
        log.warning(f"{checkpoint}: damaged ({damage}); kept as {checkpoint.name}.damaged, the one before is used")
    if folder.resume_from is not None:
        log.info(f"continues at step {step} from {folder.resume_from}")


def _announce_data(config: Config, inputs: Inputs) -> None:
    log.info(inputs.split.describe())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else config.data.workers
    if config.data.workers > cores:
        log.warning(
            f"data.workers: {config.data.workers} decode for each process, which has {cores} of the CPU's cores"
        )
    if inputs.split.unknown_names:
        log.warning(f"data.exclude: not in the shards: {', '.join(inputs.split.unknown_names)}")
    if config.eval.chooses_on_test:
        log.warning(
            f"eval.best_metric: {config.eval.best_metric} is what LFW is published on; choosing by it makes the"
            " figure of the best checkpoint optimistic. heldout/accuracy and lfw/view1/accuracy are there for that"
        )
