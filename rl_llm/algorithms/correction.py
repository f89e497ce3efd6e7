"""Weights for tokens whose log-probs the engine and the learner compute differently.

What was sampled came from the engine's distribution; the loss is over the learner's. The weight exp(old - engine), the
learner's over the engine's probability before the first update, makes up for it. It has no gradient and multiplies the
token loss after clipping.
"""

import torch
from torch import Tensor

BOUNDS = {"tis": (0.0, 2.0), "icepop": (0.5, 5.0), "sequence_mask": (0.99, 1.01)}
"""Each kind's own bounds, (low, high)."""


def correction(
    old_logprobs: Tensor, engine_logprobs: Tensor, mask: Tensor, kind: str, low: float, high: float
) -> Tensor:
    """Weights [R, T].

    ================= ==================================================================================
    `tis`             the weight, clamped to [low, high] (fengyao.notion.site/off-policy-rl)
    `icepop`          the weight inside [low, high], 0 outside (arXiv 2510.18855)
    `sequence_mask`   1, or 0 for all of a sequence whose geometric mean weight is outside [low, high]
    ================= ==================================================================================
    """
    log_weight = torch.where(mask, old_logprobs - engine_logprobs, 0.0)
    if kind == "sequence_mask":
        mean = log_weight.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        return _inside(mean.exp(), low, high).to(log_weight.dtype).expand_as(log_weight)
    weight = log_weight.exp()
    if kind == "tis":
        return weight.clamp(low, high)
    return torch.where(_inside(weight, low, high), weight, 0.0)


def _inside(weight: Tensor, low: float, high: float) -> Tensor:
    return (weight >= low) & (weight <= high)
