"""The rollout worker: a policy replica that answers sampling requests."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from rl_llm.config import RunConfig
from rl_llm.policies import CausalLM
from rl_llm.rollout.engine import generate
from rl_llm.rollout.sampling import SamplingParams
from rl_llm.table import summarize


@dataclass(frozen=True)
class RolloutRequest:
    """What to sample: prompts [P], ids and groups of their samples [P * n], how, and with which weights' version."""

    prompts: pa.Table
    sample_ids: np.ndarray
    groups: np.ndarray
    params: SamplingParams
    version: int


class RolloutWorker:
    """Samples with its own replica of the policy, or with the learner's where both live in one process."""

    def __init__(self, config: RunConfig, base: str, shared: CausalLM | None = None) -> None:
        torch.set_num_threads(config.resources.threads)
        self.policy = shared or CausalLM(base, config.policy)
        # The base folder's own weights are version 0 only in a fresh run: a replica starts without a version.
        self.version: int | None = None

    def sample(self, request: RolloutRequest, weights: np.ndarray | None) -> tuple[pa.Table, pa.Table]:
        """The summary and the shard of a request.

        `weights` are those of `request.version`, taken in if this replica has others; None where the policy is shared.
        """
        if weights is not None and self.version != request.version:
            self.policy.load_weights(weights)
            self.version = request.version
        shard = generate(
            self.policy, request.prompts, request.sample_ids, request.groups, request.params, request.version
        )
        return summarize(shard), shard
