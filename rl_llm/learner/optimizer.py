"""Optimisers and the learning rate as a function of the step."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from rl_llm.config import LearnerConfig


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    config: LearnerConfig,
    others: Iterable[nn.Parameter] = (),
    lr_factor: float = 1.0,
) -> torch.optim.Optimizer:
    """AdamW or SGD; weight decay acts on matrices only, not on norms and biases.

    Args:
        others: parameters whose learning rate is `lr_factor` times that of the first.
    """
    groups: list[dict[str, Any]] = []
    for members, factor in ((list(parameters), 1.0), (list(others), lr_factor)):
        matrices, rest = [p for p in members if p.ndim >= 2], [p for p in members if p.ndim < 2]
        groups.append({"params": matrices, "weight_decay": config.weight_decay, "lr_factor": factor})
        groups.append({"params": rest, "weight_decay": 0.0, "lr_factor": factor})
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)


def learning_rate(config: LearnerConfig, step: int, total: int) -> float:
    """The rate of update `step` (from 0) of `total`: linear warm-up, then constant, linear or cosine to 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = min((step - config.warmup_steps) / max(total - config.warmup_steps, 1), 1.0)
    if config.schedule == "linear":
        return config.lr * (1 - progress)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]
