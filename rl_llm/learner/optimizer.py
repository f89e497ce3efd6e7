"""Optimisers and the learning rate as a function of the step."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from rl_llm.config import LearnerConfig


def build_optimizer(parameters: Iterable[nn.Parameter], config: LearnerConfig) -> torch.optim.Optimizer:
    """AdamW or SGD; weight decay acts on matrices only, not on norms and biases."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
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
        group["lr"] = rate
