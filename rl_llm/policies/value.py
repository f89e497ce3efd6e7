"""The value function: what reward a policy is still to get from where it stands."""

import torch
from torch import Tensor, nn

from rl_llm.policies.base import PackedBatch, Policy


class ValueFunction:
    """One number for each state that an action is chosen in: a linear head on a trunk.

    Attributes:
        trunk: a model of its own, which learns too; None where the head reads the policy's states.
        parameters: what learns beside the policy, by name; the head's weights start at 0, so the first values are its
            bias.
    """

    def __init__(self, policy: Policy, own: bool) -> None:
        self.trunk = policy.clone() if own else None
        self.head = nn.Linear(policy.hidden_size, 1, device=policy.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        trunk = {} if self.trunk is None else self.trunk.trainable
        self.parameters: dict[str, nn.Parameter] = {
            **{f"value.trunk.{name}": p for name, p in trunk.items()},
            **{f"value.head.{name}": p for name, p in self.head.named_parameters()},
        }

    def start_at(self, value: float) -> None:
        """Make `value` that of every state; for a head that has learned nothing."""
        nn.init.constant_(self.head.bias, value)

    def values(self, batch: PackedBatch, states: Tensor) -> Tensor:
        """float32 [R, T], 0 where there is no action; `states` [N, H] are the policy's, see `Forward`."""
        if self.trunk is not None:
            states = self.trunk.states(batch)
        # In fp32: autocast would round values that are near to each other to one.
        with torch.autocast(states.device.type, enabled=False):
            return batch.layout(self.head(states.float()).squeeze(1))
