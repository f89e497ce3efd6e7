"""The frozen reference policy that a KL penalty holds the policy to."""

import copy

import torch
from torch import Tensor

from rl_llm.policies import CausalLM
from rl_llm.policies.groups import GroupBatch


class Reference:
    """The policy as it was when reinforcement learning began: its adapter off, or a frozen copy of it."""

    def __init__(self, policy: CausalLM) -> None:
        self.policy = policy
        self.adapter = policy.config.trainable == "lora"
        if not self.adapter:
            self.policy = copy.copy(policy)
            self.policy.lm = copy.deepcopy(policy.lm).requires_grad_(False)

    def logprobs(self, batch: GroupBatch, temperature: float) -> Tensor:
        """float32 [R, T], without gradient."""
        with torch.no_grad():
            if not self.adapter:
                return self.policy.logprobs(batch, temperature)
            with self.policy.model.disable_adapter():  # type: ignore[operator]
                return self.policy.logprobs(batch, temperature)
