"""Backward, clipping and the optimizer step through DeepSpeed, with state sharded by ZeRO 0 to 3."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from facetrain.config import TrainConfig
from facetrain.engine.host_memory import keep_freed_memory
from facetrain.engine.start import start_deepspeed
from facetrain.world import World

_STATE_KEYS = {"sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}


class Engine:
    """A backbone that trains: the same call sequence at any number of ranks and any ZeRO stage.

    Every rank must have put the same weights into the backbone before.
    """

    def __init__(self, backbone: nn.Module, config: TrainConfig, world: World, *, pairs_per_rank: int) -> None:
        self.world = world
        self.config = config
        if world.device.type == "cpu":
            keep_freed_memory()
        # Inputs are channels_last, weights are not: DeepSpeed broadcasts and flattens parameters as dense rows.
        self.backbone = backbone.to(world.device)
        self._statistics = [
            buffer for name, buffer in backbone.named_buffers() if name.endswith(("running_mean", "running_var"))
        ]
        self._parameters = list(backbone.parameters())
        self.num_parameters = sum(p.numel() for p in self._parameters)  # before ZeRO 3 takes them apart
        self._mark: Callable[[str], None] | None = None
        self._deepspeed = start_deepspeed(self.backbone, config, world, pairs_per_rank=pairs_per_rank)
        if world.world_size == 1 and config.zero_stage == 0:
            self._deepspeed.enable_backward_allreduce = False  # it would copy all gradients twice, for their own mean

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Return the embeddings [B, D] of network inputs [B, C, H, W], with gradient, in the configured precision."""
        if self._mark is not None:
            self._mark("copy")
        if not self.backbone.training:  # it walks through all modules
            self._deepspeed.train()
        embeddings_BD: Tensor = self._deepspeed(images_BCHW)
        if self._mark is not None:
            self._mark("forward")
        return embeddings_BD

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add this rank's gradients; with the last of a step's chunks, average their sum over the ranks.

        DeepSpeed counts chunks by its own `step`: several backwards without it lose chunks at ZeRO 1 and 2 (seen in
        0.19.8: a cosine of 0.40 to the true gradient).
        """
        self._deepspeed.backward(loss, scale_wrt_gas=False)  # the chunks' sum is the gradient, not their mean
        if not last:
            self._deepspeed.step()
        if self._mark is not None:
            self._mark("backward")

    def step(self, learning_rate: float) -> Tensor:
        """Clip once, update, clear the gradients, and leave the same network on every rank.

        Returns:
            The norm of the averaged gradient before clipping, a scalar on the device.
        """
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = None
        if self.config.zero_stage == 0:
            norm = self._clip()
        self._deepspeed.step()
        if norm is None:
            norm = torch.as_tensor(self._deepspeed.get_global_grad_norm())
        self._average_running_statistics()
        if self._mark is not None:
            self._mark("optimizer")
        return norm

    def mark_phases(self, mark: Callable[[str], None]) -> None:
        """Call `mark` at the end of each phase with its name: copy, forward, backward, reduce, optimizer.

        What ZeRO 1 to 3 reduces while backward still runs is in backward.
        """
        self._mark = mark
        reduce_gradients = self._deepspeed.allreduce_gradients

        def marked(*args: Any, **kwargs: Any) -> None:
            mark("backward")
            reduce_gradients(*args, **kwargs)
            mark("reduce")

        self._deepspeed.allreduce_gradients = marked

    def _clip(self) -> Tensor:
        """Return the norm of all gradients, and clip them by it if `train.clip_norm` says so."""
        if self.config.clip_norm:
            return nn.utils.clip_grad_norm_(self._parameters, self.config.clip_norm)
        return nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])

    def weights(self) -> dict[str, Tensor]:
        """Return the network's parameters and buffers as whole CPU tensors; every rank must call it.

        ZeRO 3: an all-gather per parameter; every rank ends with all.
        """
        with self._whole_parameters():
            return {
                name: tensor.detach().to("cpu", copy=True).contiguous()
                for name, tensor in self.backbone.state_dict().items()
            }

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return the optimizer's state as whole CPU tensors, named `parameter/key`; every rank must call it.

        ZeRO 1 to 3: an exchange per tensor; every rank ends with the whole state.
        """
        state: dict[str, Tensor] = {}
        self._link_sharded_state()
        for name, parameter in self.backbone.named_parameters():
            for key in self._state_keys():
                value = self._get_state(parameter, key)
                if value is not None:
                    state[f"{name}/{key}"] = value.detach().to("cpu", copy=True).contiguous()
        steps = [s["step"] for s in self._torch_optimizer.state.values() if "step" in s]
        if steps:
            state["step"] = torch.as_tensor(steps[0]).detach().to("cpu", copy=True)
        return state

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `optimizer_state` returned, at any number of ranks and any ZeRO stage.

        Raises:
            ValueError: A parameter has no state of the configured optimizer.
        """
        if not state:  # saved before the first step
            return
        self._create_state(state.get("step"))
        for name, parameter in self.backbone.named_parameters():
            for key in self._state_keys():
                if f"{name}/{key}" not in state:
                    raise ValueError(f"optimizer state: expected '{name}/{key}' for {self.config.optimizer}")
                self._set_state(parameter, key, state[f"{name}/{key}"])

    def _whole_parameters(self) -> AbstractContextManager[Any]:
        if self.config.zero_stage < 3:
            return nullcontext()
        from deepspeed.runtime.zero import GatheredParameters

        return GatheredParameters(list(self.backbone.parameters()))  # type: ignore[no-any-return]

    def _state_keys(self) -> tuple[str, ...]:
        if self.config.optimizer == "sgd" and self.config.momentum == 0:
            return ()
        return _STATE_KEYS[self.config.optimizer]

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that holds the state: at ZeRO 1 to 3 on flat partitions of many parameters."""
        optimizer = self._deepspeed.optimizer
        return optimizer if self.config.zero_stage == 0 else optimizer.optimizer  # type: ignore[no-any-return]

    def _get_state(self, parameter: nn.Parameter, key: str) -> Tensor | None:
        if self.config.zero_stage == 0:
            value: Tensor | None = self._torch_optimizer.state.get(parameter, {}).get(key)
            return value
        if not self._torch_optimizer.state:
            return None
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, key)  # type: ignore[no-any-return]

    def _set_state(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        value = value.to(parameter.device)
        if self.config.zero_stage == 0:
            self._torch_optimizer.state[parameter][key].copy_(value)
        elif self.config.zero_stage < 3:
            from deepspeed.utils import safe_set_full_optimizer_state

            safe_set_full_optimizer_state(parameter, value, key)
        else:
            from deepspeed.utils import safe_get_local_optimizer_state, safe_set_local_optimizer_state

            # DeepSpeed's setter of whole state forgets that the last rank's part is padded (0.19.8).
            numel = safe_get_local_optimizer_state(parameter, key).numel()
            padded = nn.functional.pad(value.flatten(), (0, numel * self.world.world_size - value.numel()))
            safe_set_local_optimizer_state(parameter, padded.split(numel)[self.world.rank], key)

    def _create_state(self, step: Tensor | None) -> None:
        """Create the state that torch's optimizers make at their first step, as zeros."""
        optimizer = self._torch_optimizer
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self.config.zero_stage == 3:  # in the optimizer's groups during a step alone
            parameters = self._deepspeed.optimizer.fp32_partitioned_groups_flat
        for parameter in parameters:
            values: dict[str, Any] = {key: torch.zeros_like(parameter) for key in self._state_keys()}
            if step is not None:
                values["step"] = step.to(parameter.device, copy=True)  # where fused AdamW wants it
            optimizer.state[parameter] = values
        self._link_sharded_state()

    def _link_sharded_state(self) -> None:
        """Let each parameter find its piece of the flat state (ZeRO 1 and 2).

        DeepSpeed does so once, after the step of the first parameter group, when the other groups' state is still
        empty (0.19.8, `_optimizer_step`); with more than one group it has to be done again.
        """
        if self.config.zero_stage in (1, 2) and self._torch_optimizer.state:
            self._deepspeed.optimizer._hp_optimizer_states_linked = False
            self._deepspeed.optimizer._lazy_init_hp_params_optimizer_state()

    def _average_running_statistics(self) -> None:
        """Give all ranks the mean of their BatchNorm running statistics: one small all-reduce.

        DeepSpeed neither broadcasts nor averages buffers. With this, evaluation, mining and checkpoints see one
        network, and stopping at a step changes nothing. The mean of the ranks' variances leaves out how far their
        means lie apart, a share of about 1 / (images per rank); `model.sync_batchnorm` leaves out nothing.
        """
        if self._statistics and self.world.world_size > 1:
            mean = self.world.all_reduce_mean_(torch.cat(self._statistics))
            for buffer, value in zip(self._statistics, mean.split([b.numel() for b in self._statistics]), strict=True):
                buffer.copy_(value)
