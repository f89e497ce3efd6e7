"""The reference policy that a KL holds the policy to."""

import contextlib

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from rl_llm.policies.causal_lm import CausalLM
from rl_llm.policies.packing import GroupBatch, make_groups, microbatches, pack
from rl_llm.table import ragged


class Reference:
    """The first policy, or the policy at the last refresh; never changed by training.

    With an adapter the first policy is the same weights with the adapter off. Else, and after a refresh, it is a frozen
    copy of what trains, over what does not.
    """

    def __init__(self, policy: CausalLM, learns: bool = True) -> None:
        """`policy` has the weights of the first policy, unless it has an adapter, which then may be anywhere.

        `learns`: its weights will be others, so that they have to be copied.
        """
        self._policy = policy
        self._copy: CausalLM | None = None
        if policy.config.trainable != "lora":
            self._copy = self._clone() if learns else policy

    def logprobs(self, batch: GroupBatch, temperature: float) -> Tensor:
        """float32 [R, T], without gradient."""
        with torch.no_grad():
            if self._copy is not None:
                return self._copy.logprobs(batch, temperature)
            with self._adapter_off():
                return self._policy.logprobs(batch, temperature)

    def score(self, shard: pa.Table, budget: int) -> list[np.ndarray]:
        """Log-probs of the completions of a rollout table, float32 [length] each; `budget` tokens a forward."""
        completions = ragged(shard["completion_ids"])
        groups = make_groups(shard["group"].to_pylist(), ragged(shard["prompt_ids"]), completions, budget)
        temperature = float(shard["temperature"][0].as_py()) or 1.0
        out = [np.zeros(len(completion), dtype=np.float32) for completion in completions]
        for part in microbatches(groups, budget):
            batch = pack(part)
            scored = self.logprobs(batch, temperature).cpu().numpy()
            for row, values in zip(batch.rows.tolist(), scored, strict=True):
                out[row] = values[: len(out[row])]
        return out

    def refresh(self, weights: np.ndarray) -> None:
        """Become the policy that has these weights, see `CausalLM.export_weights`."""
        self._copy = self._copy or self._clone()
        self._copy.load_weights(weights)

    def _clone(self) -> CausalLM:
        twin = self._policy.clone()
        twin.model.requires_grad_(False)
        return twin

    def _adapter_off(self) -> contextlib.AbstractContextManager:
        return self._policy.model.disable_adapter()  # type: ignore[operator]
