"""Optimisers and the learning rate as a function of the step."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

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


@dataclass
class Schedule:
    """The learning rate as a function of the step: linear warm-up, then constant, linear or cosine to 0.

    Attributes:
        peak: the rate after warm-up; may be changed between two steps.
        total: steps in all, which linear and cosine end with.
    """

    peak: float
    kind: Literal["constant", "linear", "cosine"]
    warmup_steps: int
    total: int

    @classmethod
    def of(cls, config: LearnerConfig, total: int) -> "Schedule":
        return cls(config.lr, config.schedule, config.warmup_steps, total)

    def at(self, step: int) -> float:
        """The rate of update `step`, from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        progress = min((step - self.warmup_steps) / max(self.total - self.warmup_steps, 1), 1.0)
        if self.kind == "linear":
            return self.peak * (1 - progress)
        if self.kind == "cosine":
            return self.peak * 0.5 * (1 + math.cos(math.pi * progress))
        return self.peak


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]
