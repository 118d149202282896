"""The optimizer with its parameter groups, and the learning rate at each step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from .config import TrainConfig

# torchvision has such a list in a private function, which does not tell the other biases apart.
NORMALISATION = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm)


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW, over `parameter_groups`."""
    groups = parameter_groups(model, config)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.lr, momentum=config.momentum, fused=True)
    return torch.optim.AdamW(groups, config.lr, fused=True)


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


def build_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig) -> torch.optim.lr_scheduler.LambdaLR:
    """Every group's learning rate times `learning_rate_factor`."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, config))


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
