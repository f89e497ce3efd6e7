"""Advantages, as pure tensor functions.

Those of groups, made of rewards alone before the learner sees them, share one signature:
`(rewards, groups, valid, std_floor=0.0) -> advantages` with

- `rewards`: float [N], one number a sample;
- `groups`: int64 [N], samples of one prompt share a number;
- `valid`: bool [N], rows with a reward; the others leave every statistic and get advantage 0;
- `std_floor`: a number or float [N], the least standard deviation a row is divided by.

Computed in float64 and returned in it, [N]. Within a group each is the centred reward times one factor.

Those of tokens, made in the learner, take rewards a token [N, T] with `mask` bool [N, T], true where the policy chose
the token. Other tokens (text an environment put in) are stepped over: what follows them carries on where it was before.
"""

from collections.abc import Callable

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


GROUP = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo}


def token_rewards(outcomes: Tensor, mask: Tensor) -> Tensor:
    """A reward a sequence, [N], put on its last chosen token, [N, T]."""
    position = torch.arange(mask.shape[1]).expand_as(mask)
    last = torch.where(mask, position, -1).amax(dim=1, keepdim=True)
    return torch.where(position == last, outcomes[:, None], 0.0)


def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Monte-Carlo returns G_t = r_t + gamma G_{t+1}, [N, T]; 0 where not chosen."""
    out, after = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        after = torch.where(mask[:, t], rewards[:, t] + gamma * after, after)
        out[:, t] = torch.where(mask[:, t], after, 0.0)
    return out


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation (arXiv 1506.02438), [N, T]; 0 where not chosen.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lambda A_{t+1}, with V = A = 0 behind the end. lambda
    0 is the TD error, 1 the Monte-Carlo return less the value. What values are to become is A + V.
    """
    out = torch.zeros_like(rewards)
    advantage = value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)
        value = torch.where(mask[:, t], values[:, t], value)
        out[:, t] = torch.where(mask[:, t], advantage, 0.0)
    return out


def whiten(x: Tensor, mask: Tensor, total: Callable[[Tensor], Tensor] = lambda sums: sums) -> Tensor:
    """Mean 0 and unbiased variance 1 over all chosen tokens, (x - mean) / sqrt(var + 1e-8); 0 where not chosen.

    A single token is left at 0. `total` adds up sums over all learners where rows are shared among several.
    """
    x = torch.where(mask, x, 0.0)
    count, amount = total(torch.stack([mask.sum().double(), x.sum(dtype=torch.float64)]))
    mean = amount / count.clamp(min=1)
    squares = total(torch.where(mask, (x.double() - mean) ** 2, 0.0).sum())
    variance = squares / (count - 1).clamp(min=1)
    return torch.where(mask, (x - mean) * (variance + 1e-8).rsqrt(), 0.0).to(x.dtype)
