"""Advantages made from rewards and groups alone, as pure tensor functions.

All share one signature: `(rewards, groups, valid, std_floor=0.0) -> advantages` with

- `rewards`: float [N], one number a sample;
- `groups`: int64 [N], samples of one prompt share a number;
- `valid`: bool [N], rows with a reward; the others leave every statistic and get advantage 0;
- `std_floor`: a number or float [N], the least standard deviation a row is divided by.

Computed in float64 and returned in it, [N]. Within a group each is the centred reward times one factor.
"""

import torch
from torch import Tensor

EPS = 1e-6


def _group_moments(rewards: Tensor, groups: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and unbiased standard deviation of each row's group over valid rows, [N] each."""
    _, index = torch.unique(groups, return_inverse=True)
    size = int(index.max()) + 1 if len(index) else 0
    weight = valid.double()
    values = torch.where(valid, rewards.double(), 0.0)

    def total(x: Tensor) -> Tensor:
        return torch.zeros(size, dtype=torch.float64).index_add_(0, index, x)[index]

    count = total(weight)
    mean = total(values) / count.clamp(min=1)
    squares = total(weight * (values - mean) ** 2)
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    return count, mean, std


def grpo(rewards: Tensor, groups: Tensor, valid: Tensor, std_floor: float | Tensor = 0.0) -> Tensor:
    """Reward minus the group's mean, over the group's unbiased standard deviation (arXiv 2402.03300)."""
    _, mean, std = _group_moments(rewards, groups, valid)
    floor = torch.as_tensor(std_floor, dtype=torch.float64)
    return torch.where(valid, (rewards.double() - mean) / (torch.maximum(std, floor) + EPS), 0.0)


def dr_grpo(rewards: Tensor, groups: Tensor, valid: Tensor, std_floor: float | Tensor = 0.0) -> Tensor:
    """Reward minus the group's mean; nothing is divided, so `std_floor` has no part in it (arXiv 2503.20783)."""
    _, mean, _ = _group_moments(rewards, groups, valid)
    return torch.where(valid, rewards.double() - mean, 0.0)


def rloo(rewards: Tensor, groups: Tensor, valid: Tensor, std_floor: float | Tensor = 0.0) -> Tensor:
    """Reward minus the mean of the *other* samples, n/(n-1) times the centred reward (arXiv 2402.14740).

    A group with a single valid row has no baseline and gets 0; `std_floor` has no part in it.
    """
    count, mean, _ = _group_moments(rewards, groups, valid)
    return torch.where(valid & (count > 1), (rewards.double() - mean) * count / (count - 1).clamp(min=1), 0.0)
