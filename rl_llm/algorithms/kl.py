"""The distance between policy and reference: how it is estimated, and how strongly it counts."""

import math

from torch import Tensor


def kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) from the chosen tokens (joschu.net/blog/kl-approx), [R, T].

    `k1` is unbiased and signed, `k2` has the right gradient in expectation, `k3` is unbiased and never negative. As a
    loss `k1` has an expected gradient of zero, so it is for the reward only, and `k3` is taken as GRPO writes it,
    without an importance weight: its expected gradient is that of KL(reference || policy) (arXiv 2506.09477).
    """
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio**2
    return (-log_ratio).exp() + log_ratio - 1


class KLCoefficient:
    """The weight of the KL: fixed, or moved so that the KL comes near a target (arXiv 1909.08593, 2.2).

    Attributes:
        value: the weight now.
    """

    def __init__(self, value: float, target: float | None, horizon: int) -> None:
        self.value, self.target, self.horizon = value, target, horizon

    def update(self, measured: float, samples: int) -> None:
        """After a step of `samples` sequences with a mean KL a token of `measured`: moves by at most 20 % a horizon.

        What is not finite came of an update that was left out, and moves nothing.
        """
        if self.target is not None and math.isfinite(measured):
            error = min(max(measured / self.target - 1, -0.2), 0.2)
            self.value *= 1 + error * samples / self.horizon
