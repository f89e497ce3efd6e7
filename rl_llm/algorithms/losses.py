"""Policy losses and their aggregation, as pure tensor functions.

Tensors are float [R, T] with `mask` bool [R, T] marking the tokens the policy chose. Every loss is to be minimised. The
divisor of a mean is handed in as a count over the *global* batch (`Divisor`), so a loss summed over micro-batches does
not depend on how rows were split, padded, ordered or shared among learners.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rl_llm.config import Aggregation


@dataclass(frozen=True)
class Divisor:
    """Counts over the whole batch of an update: what a mean divides by."""

    tokens: int
    sequences: int
    max_length: int


@dataclass(frozen=True)
class LossInputs:
    """What a policy loss is made of.

    Attributes:
        logprobs: [R, T] under the policy that learns; has gradients.
        old_logprobs: [R, T] under the policy before the step's first update.
        ratio: [R, T], exp(logprobs - old_logprobs), or its sequence form; has gradients, see `token_ratio`.
        advantages: [R, T].
        mask: bool [R, T].
        clip_low, clip_high: how far the ratio may leave 1, downwards and upwards.
        dual_clip: bound of the loss where the advantage is negative, in advantages; None: no bound.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    ratio: Tensor
    advantages: Tensor
    mask: Tensor
    clip_low: float
    clip_high: float
    dual_clip: float | None = None

    @property
    def clipped_ratio(self) -> Tensor:
        return self.ratio.clamp(1 - self.clip_low, 1 + self.clip_high)


PolicyLoss = Callable[[LossInputs], Tensor]


def clipped(x: LossInputs) -> Tensor:
    """PPO's clipped surrogate, -min(r A, clip(r, 1 - low, 1 + high) A), per token (arXiv 1707.06347).

    Unequal bounds are DAPO's (arXiv 2503.14476), the sequence ratio is GSPO's (arXiv 2507.18071). With `dual_clip` c,
    the loss of a negative advantage is at most -c A (arXiv 1912.09729).
    """
    loss = -torch.minimum(x.ratio * x.advantages, x.clipped_ratio * x.advantages)
    if x.dual_clip is None:
        return loss
    return torch.where(x.advantages < 0, torch.minimum(loss, -x.dual_clip * x.advantages), loss)


def cispo(x: LossInputs) -> Tensor:
    """-clip(r, 1 - low, 1 + high) A log p, the clipped ratio without gradient (arXiv 2506.13585).

    `clip_high` counts from 1: the preset's 4 caps the ratio at 5. Its `clip_low` of 1 leaves the lower side free.
    """
    return -x.clipped_ratio.detach() * x.advantages * x.logprobs


def policy_gradient(x: LossInputs) -> Tensor:
    """-A log p: REINFORCE (Williams 1992). It corrects nothing after the first update of a batch."""
    return -x.advantages * x.logprobs


LOSSES: dict[str, PolicyLoss] = {"clipped": clipped, "cispo": cispo, "policy_gradient": policy_gradient}


def token_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """exp(new - old) of each token, [R, T]."""
    return (logprobs - old_logprobs).exp()


def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """The sequence's geometric mean ratio s at each of its tokens, [R, T] (arXiv 2507.18071).

    In the token form, sg[s] exp(lp - sg[lp]): its value is s everywhere, each token's gradient goes to its own
    log-prob, and the mean over tokens has the gradient of s.
    """
    with torch.no_grad():
        log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0).sum(dim=1, keepdim=True)
        sequence = (log_ratio / mask.sum(dim=1, keepdim=True).clamp(min=1)).exp()
    return sequence * (logprobs - logprobs.detach()).exp()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """0.5 max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2) per token (arXiv 1707.06347); None: not clipped."""
    loss = (values - returns) ** 2
    if clip is not None:
        moved = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.maximum(loss, (moved - returns) ** 2)
    return 0.5 * loss


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
