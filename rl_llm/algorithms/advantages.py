"""Advantages of groups and of tokens.

Those of groups, made of rewards alone before the learner sees them, are the centred reward times one factor a group.
The factor is all they differ in (`SCALE`) and all the mixture asks for. As functions of their own they share one
signature: `(rewards, groups, valid, std_floor=0.0) -> advantages` with

- `rewards`: float [N], one number a sample;
- `groups`: int64 [N], samples of one prompt share a number;
- `valid`: bool [N], rows with a reward; the others leave every statistic and get advantage 0;
- `std_floor`: a number or float [N], the least standard deviation a row is divided by; the largest of a group's rows.

Computed in float64 and returned in it, [N].

Those of tokens, made in the learner, take rewards a token [N, T] with `mask` bool [N, T], true where the policy chose
the token. Other tokens (text an environment put in) are stepped over: what follows them carries on where it was before.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from rl_llm.groups import EPS, Grouped, Scale


def _over_spread(count: np.ndarray, std: np.ndarray, floor: np.ndarray) -> np.ndarray:
    """One over the group's unbiased standard deviation (arXiv 2402.03300)."""
    return 1 / (np.maximum(std, floor) + EPS)


def _as_it_is(count: np.ndarray, std: np.ndarray, floor: np.ndarray) -> np.ndarray:
    """1: nothing is divided, so the floor has no part in it (arXiv 2503.20783)."""
    return np.ones_like(std)


def _over_others(count: np.ndarray, std: np.ndarray, floor: np.ndarray) -> np.ndarray:
    """n/(n-1), which makes it the reward minus the mean of the *other* samples (arXiv 2402.14740).

    0 for a single sample, which has no others; the floor has no part in it.
    """
    return np.where(count > 1, count / np.maximum(count - 1, 1), 0.0)


SCALE: dict[str, Scale] = {"grpo": _over_spread, "dr_grpo": _as_it_is, "rloo": _over_others}


def scaled(scale: Scale, rewards: Tensor, groups: Tensor, valid: Tensor, std_floor: float | Tensor = 0.0) -> Tensor:
    """The centred reward times the group's factor; other arguments and the result as above."""
    batch = Grouped(torch.where(valid, rewards.double(), torch.nan).numpy(), groups.numpy())
    floor = batch.largest(torch.as_tensor(std_floor, dtype=torch.float64).expand(len(rewards)).numpy())
    return torch.from_numpy(batch.centred * scale(batch.counts, batch.std, floor)[batch.index])


def grpo(rewards: Tensor, groups: Tensor, valid: Tensor, std_floor: float | Tensor = 0.0) -> Tensor:
    """Reward minus the group's mean, over the group's standard deviation."""
    return scaled(SCALE["grpo"], rewards, groups, valid, std_floor)


def dr_grpo(rewards: Tensor, groups: Tensor, valid: Tensor, std_floor: float | Tensor = 0.0) -> Tensor:
    """Reward minus the group's mean."""
    return scaled(SCALE["dr_grpo"], rewards, groups, valid, std_floor)


def rloo(rewards: Tensor, groups: Tensor, valid: Tensor, std_floor: float | Tensor = 0.0) -> Tensor:
    """Reward minus the mean of the group's other samples."""
    return scaled(SCALE["rloo"], rewards, groups, valid, std_floor)


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
