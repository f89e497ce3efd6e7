"""Token losses, KL estimators and their aggregation, as pure tensor functions.

Tensors are float [B, T] with `mask` bool [B, T] marking the tokens the policy chose. Every loss is to be minimised.
The divisor of a mean is handed in as a count over the *global* batch (`Divisor`), so a loss summed over micro-batches
does not depend on how rows were split, padded or ordered.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rl_llm.config import Aggregation


@dataclass(frozen=True)
class Divisor:
    """Counts over the whole batch of a step: what a mean divides by."""

    tokens: int
    sequences: int
    max_length: int


def clipped(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """PPO's clipped surrogate, -min(r A, clip(r, 1 - low, 1 + high) A), per token (arXiv 1707.06347).

    Args:
        logprobs, old_logprobs: [B, T] under the new policy and the one that acted; only the first has gradients.
        advantages: [B, T], or [B, 1] for one advantage a sequence.
        low, high: how far the ratio may leave 1; unequal bounds are DAPO's (arXiv 2503.14476).
    """
    ratio = (logprobs - old_logprobs).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) from the chosen tokens (joschu.net/blog/kl-approx).

    `k1` is unbiased and signed, `k2` has the right gradient in expectation, `k3` is unbiased and never negative.
    As a loss `k1` has an expected gradient of zero, it only adds noise: it is for measuring, or for use in the reward
    (arXiv 2506.09477).
    """
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio**2
    return (-log_ratio).exp() + log_ratio - 1


def aggregate(loss: Tensor, mask: Tensor, how: Aggregation, divisor: Divisor) -> Tensor:
    """The part of the batch's loss that these rows make up: a scalar that sums over micro-batches.

    ========================  ==================================================================
    `token_mean`              sum over tokens / tokens of the batch (DAPO)
    `token_sum`               sum over tokens
    `seq_mean_token_sum`      sum over tokens / sequences of the batch
    `seq_mean_token_sum_norm` sum over tokens / (sequences x the longest allowed length) (Dr. GRPO)
    `seq_mean_token_mean`     mean over tokens of each sequence, then mean over sequences (GRPO)
    ========================  ==================================================================
    """
    loss = torch.where(mask, loss, 0.0)
    if how == "token_mean":
        return loss.sum() / divisor.tokens
    if how == "token_sum":
        return loss.sum()
    if how == "seq_mean_token_sum":
        return loss.sum() / divisor.sequences
    if how == "seq_mean_token_sum_norm":
        return loss.sum() / (divisor.sequences * divisor.max_length)
    lengths = mask.sum(dim=1).clamp(min=1)
    return (loss.sum(dim=1) / lengths).sum() / divisor.sequences
