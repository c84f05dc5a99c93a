"""DeepSpeed, started quietly and with every setting that matters said."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from facetrain.config import TrainConfig
from facetrain.world import World


def start_deepspeed(backbone: nn.Module, config: TrainConfig, world: World, *, pairs_per_rank: int) -> Any:
    """Return DeepSpeed's engine for a backbone; with an optimizer of its own, and settings that are ours."""
    with _launcher_variables():
        return _initialize(backbone, config, world, pairs_per_rank=pairs_per_rank)


def _initialize(backbone: nn.Module, config: TrainConfig, world: World, *, pairs_per_rank: int) -> Any:
    deepspeed = _import_deepspeed(world)
    micro_pairs = config.micro_pairs or pairs_per_rank
    num_parameters = sum(p.numel() for p in backbone.parameters())
    engine, *_ = deepspeed.initialize(
        model=_Compiled(backbone) if config.compile else backbone,
        optimizer=_optimizer(backbone, config),
        config={
            "train_micro_batch_size_per_gpu": 2 * micro_pairs,
            "gradient_accumulation_steps": pairs_per_rank // micro_pairs,
            "zero_optimization": {
                "stage": config.zero_stage,
                # DeepSpeed's default buffers hold 500 million numbers, whatever the network; an odd number is refused.
                "reduce_bucket_size": min(num_parameters + num_parameters % 2, 500_000_000),
                "allgather_bucket_size": min(num_parameters + num_parameters % 2, 500_000_000),
            },
            "zero_allow_untested_optimizer": True,
            # DeepSpeed's own default is 1.0; at ZeRO 0 `Engine.step` clips, which also gives the norm.
            "gradient_clipping": config.clip_norm if config.zero_stage > 0 else 0.0,
            # Weights, statistics and the reduction of gradients stay float32 (no modules are listed as safe in less).
            "torch_autocast": {
                "enabled": config.precision == "bfloat16",
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            },
            "steps_per_print": None,
            "timers": {"throughput": {"enabled": False}},  # they wait for the GPU twice a step
        },
    )
    world.limit_waiting()
    return engine


def _import_deepspeed(world: World) -> Any:
    """Import deepspeed quietly, without compiling its shared-memory collectives, which torchrun can't use."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if world.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read once, at import
    with _not_importable("mlflow"):  # its autotuner, unused here, tries to; that takes four times as long as the rest
        import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # its import set another level
    deepspeed.ops.__compatible_ops__ = {}  # not asked for, or it would run a compiler to find out
    backend = "gloo" if world.device.type == "cpu" else "nccl"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)
    return deepspeed


@contextmanager
def _not_importable(name: str) -> Iterator[None]:
    """Let imports of a module fail that isn't imported yet."""
    is_new = name not in sys.modules
    if is_new:
        sys.modules[name] = None  # type: ignore[assignment]  # how importlib marks what must not be imported
    try:
        yield
    finally:
        if is_new:
            del sys.modules[name]


@contextmanager
def _launcher_variables() -> Iterator[None]:
    """Set what DeepSpeed reads of a launcher, also in a run of one process, where there is none.

    ZeRO 3 reads LOCAL_RANK in the first forward too, so that it stays.
    """
    missing = {key: value for key, value in _NO_LAUNCHER.items() if key not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for key in missing.keys() - {"LOCAL_RANK"}:
            del os.environ[key]


_NO_LAUNCHER = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


class _Compiled(nn.Module):
    """What DeepSpeed calls in place of a network: compiled in training alone, so that other shapes compile nothing.

    The network's own weights keep their names.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self._call = torch.compile(lambda images_BCHW: backbone(images_BCHW))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self._call(images_BCHW)  # type: ignore[no-any-return]


def _optimizer(backbone: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Weight decay acts on kernels and weight matrices alone, as is usual; fused, an update is one pass over memory."""
    parameters = [p for p in backbone.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
