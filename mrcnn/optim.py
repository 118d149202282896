"""The optimizer with its parameter groups, the learning rate at each step, and the update of the weights they make."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from .config import TrainConfig

# torchvision has such a list in a private function, which does not tell the other biases apart.
NORMALISATION = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm)


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW, over `parameter_groups`; fused, so that a step is a few launches."""
    groups = parameter_groups(model, config)
    if config.optimizer == "adamw":
        on_gpu = any(p.is_cuda for group in groups for p in group["params"])
        return torch.optim.AdamW(groups, config.lr, fused=True, capturable=on_gpu)
    optimizer = torch.optim.SGD(groups, config.lr, momentum=config.momentum, fused=True)
    if config.momentum:
        # Made by the first step otherwise, uninitialised: were that step skipped, the next would take what is there.
        for parameter in (p for group in groups for p in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """The trainable parameters, each once, in groups of one learning rate and one weight decay.

    Groups are named "weights", "norms" (weights and biases of normalisation layers) and "biases" (the others'), those
    of `model.backbone` "backbone weights" and so on. A group without parameters is left out.
    """
    norms = {id(p) for module in model.modules() if isinstance(module, NORMALISATION) for p in module.parameters(False)}
    decays = {"weights": config.weight_decay, "norms": config.norm_weight_decay, "biases": config.bias_weight_decay}
    groups: dict[str, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = "norms" if id(parameter) in norms else "biases" if name.endswith("bias") else "weights"
        in_backbone = name.startswith("backbone.")
        lr = config.lr * (config.backbone_lr_factor if in_backbone else 1.0)
        group = {"name": f"backbone {kind}" if in_backbone else kind, "lr": lr, "weight_decay": decays[kind]}
        groups.setdefault(group["name"], group | {"params": []})["params"].append(parameter)
    return list(groups.values())


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """What the learning rate is multiplied by at `step`: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    return SCHEDULES[config.schedule](step / config.steps, config)


SCHEDULES: dict[str, Callable[[float, TrainConfig], float]] = {
    "multistep": lambda done, config: config.lr_gamma ** sum(done >= milestone for milestone in config.milestones),
    "cosine": lambda done, config: 0.5 * (1 + math.cos(math.pi * min(done, 1.0))),
    "constant": lambda done, config: 1.0,
}
"""Factor of the learning rate by the part of the run that is done."""


HOW = ("fused", "foreach", "capturable")  # settings of an optimizer that decide how it runs, not what it computes


class Skipped(NamedTuple):
    """Numbers of steps that were left out."""

    of_all: int
    in_a_row: int  # up to the last step
    longest: int  # in a row, since this was asked last


class Update:
    """Schedule, clipping and optimizer, all on the device: nothing waits for it, nothing is decided by the host.

    The learning rate is looked up by a step counter that the update itself moves on. A step whose gradients' norm is
    not finite changes nothing, neither weights nor momentum nor batch norm's running statistics, which are put back;
    it is counted. The same calls can so be captured in a CUDA graph once and replayed for every step.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, start: int = 0) -> None:
        """For the steps after the first `start` of a run of `config.steps`; the model is on its device already."""
        self.optimizer = build_optimizer(model, config)
        self.clip_norm = config.clip_norm
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        device = self._parameters[0].device
        factors = [learning_rate_factor(step, config) for step in range(config.steps)]
        self._factors = torch.tensor(factors, dtype=torch.float32, device=device)
        base = [group["lr"] for group in self.optimizer.param_groups]
        self._base = torch.tensor(base, dtype=torch.float32, device=device)
        self._rates = self._base * self._factors[min(start, config.steps - 1)]
        self._step = torch.tensor([start], device=device)
        self._skipped, self._in_a_row, self._longest = torch.zeros(3, 1, dtype=torch.int64, device=device)
        self._statistics = [
            buffer
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            for buffer in (module.running_mean, module.running_var)
            if buffer is not None
        ]
        self._kept = [buffer.clone() for buffer in self._statistics]  # as they were after the last step
        self._how = [{key: group[key] for key in HOW if key in group} for group in self.optimizer.param_groups]
        self._use_own_settings()

    def __call__(self) -> None:
        """Change the weights by their gradients."""
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        skip = ~norm.isfinite()
        step = self._step.clamp(max=len(self._factors) - 1)
        torch.mul(self._base, self._factors.index_select(0, step), out=self._rates)
        # What a GradScaler sets: the fused kernels divide gradients by the one, and do nothing where the other is 1.
        self.optimizer.grad_scale = (norm / self.clip_norm).clamp(min=1).float() if self.clip_norm > 0 else None
        self.optimizer.found_inf = skip.float()
        self.optimizer.step()
        self._step += 1
        self._skipped += skip
        self._in_a_row.add_(1).mul_(skip)
        torch.maximum(self._longest, self._in_a_row, out=self._longest)
        if self._statistics:
            both = zip(self._kept, self._statistics, strict=True)
            torch._foreach_copy_(self._statistics, [torch.where(skip, before, now) for before, now in both])
            torch._foreach_copy_(self._kept, self._statistics)

    def skipped(self) -> Skipped:
        """Steps that were left out; waits for the device."""
        counts = torch.cat([self._skipped, self._in_a_row, self._longest]).tolist()
        self._longest.zero_()
        return Skipped(*counts)

    def state_dict(self) -> dict:
        """What it takes to go on, beside the step; learning rates as plain numbers."""
        state = self.optimizer.state_dict()
        groups = [group | {"lr": float(group["lr"])} for group in state["param_groups"]]
        return {"optimizer": state | {"param_groups": groups}, "skipped": int(self._skipped)}

    def load_state_dict(self, state: dict) -> None:
        """Take a state of the same configuration, whose tensors may be on another device or in another layout."""
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter in self._parameters:
            _match_layout(self.optimizer.state.get(parameter, {}), parameter)
        self._skipped.fill_(state.get("skipped", 0))
        self._use_own_settings()

    def _use_own_settings(self) -> None:
        """Rates that the schedule writes to, and how the optimizer runs here: a state may come from another device."""
        for group, rate, how in zip(self.optimizer.param_groups, self._rates, self._how, strict=True):
            group |= how | {"lr": rate}  # a view


def _match_layout(state: dict, parameter: torch.Tensor) -> None:
    """Lay momenta and the like out as their parameter is: a fused step walks the memory of both, strides unseen."""
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
            state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
