"""The reference policy that a KL holds the policy to."""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rl_llm.policies.base import PackedBatch, Policy


class Reference:
    """The first policy, or the policy at the last refresh; never changed by training.

    With an adapter the first policy is the same weights with the adapter off. Else, and after a refresh, it is a frozen
    copy of what trains, over what does not.
    """

    def __init__(self, policy: Policy) -> None:
        """`policy` has the weights of the first policy, unless it has an adapter, which then may be anywhere."""
        self._policy = policy
        self._copy = None if policy.config.trainable == "lora" else _frozen(policy)
        self._refreshed = False

    def logprobs(self, batch: PackedBatch, temperature: Tensor) -> Tensor:
        """float32 [R, T], without gradient."""
        with torch.no_grad():
            if self._copy is not None:
                return self._copy.forward(batch, temperature).logprobs
            with self._adapter_off():
                return self._policy.forward(batch, temperature).logprobs

    def refresh(self, weights: Mapping[str, Tensor]) -> None:
        """Become the policy that has these weights, by name."""
        self._copy = self._copy or _frozen(self._policy)
        self._copy.load_named(weights.items())
        self._refreshed = True

    def restart(self, first: Policy) -> None:
        """Become the first policy again, which is given once more: a refresh has overwritten its copy."""
        self._refreshed = False
        if self._policy.config.trainable == "lora":
            self._copy = None
        elif self._copy is not None:
            self._copy.load_named(first.named_weights().items())

    def named_weights(self) -> dict[str, Tensor]:
        """The weights of the last refresh; none where it is still the first policy."""
        return self._copy.named_weights() if self._copy is not None and self._refreshed else {}

    def _adapter_off(self) -> contextlib.AbstractContextManager:
        model: Any = self._policy.model
        return model.disable_adapter()


def _frozen(policy: Policy) -> Policy:
    twin = policy.clone()
    twin.model.requires_grad_(False)
    return twin
