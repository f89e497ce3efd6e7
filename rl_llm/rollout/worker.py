"""The rollout worker: a policy replica that answers sampling requests."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from rl_llm.config import RunConfig
from rl_llm.policies import CausalLM, Reference
from rl_llm.policies.decoding import generate
from rl_llm.policies.sampling import SamplingParams
from rl_llm.table import REF_LOGPROBS, float_lists, summarize


@dataclass(frozen=True)
class RolloutRequest:
    """What to sample: prompts [P], ids and groups of their samples [P * n], how, and with which weights' version.

    `reference` is the version of the reference policy that scores the samples too, None for no score.
    """

    prompts: pa.Table
    sample_ids: np.ndarray
    groups: np.ndarray
    params: SamplingParams
    version: int
    reference: int | None = None


class RolloutWorker:
    """Samples with its own replica of the policy, or with the learner's where both live in one process."""

    def __init__(self, config: RunConfig, base: str, shared: CausalLM | None = None) -> None:
        torch.set_num_threads(config.resources.threads)
        self.config = config
        self.policy = shared or CausalLM(base, config.policy)
        # The base folder's own weights are version 0 only in a fresh run: a replica starts without a version.
        self.version: int | None = None
        self.reference: Reference | None = None
        self.reference_version = 0
        if config.algorithm.kl.coef and config.algorithm.reference.place == "rollout":
            # A shared policy may have been trained already: its first weights are read anew.
            anew = shared is not None and config.policy.trainable != "lora"
            self.reference = Reference(CausalLM(base, config.policy) if anew else self.policy, learns=not anew)

    def sample(
        self, request: RolloutRequest, weights: np.ndarray | None, reference: np.ndarray | None = None
    ) -> tuple[pa.Table, pa.Table]:
        """The summary and the shard of a request.

        `weights` are those of `request.version`, taken in if this replica has others; None where the policy is shared.
        `reference` are those of `request.reference`; None for the first policy's.
        """
        if weights is not None and self.version != request.version:
            self.policy.load_weights(weights)
            self.version = request.version
        shard = generate(
            self.policy, request.prompts, request.sample_ids, request.groups, request.params, request.version
        )
        if request.reference is not None and self.reference is not None:
            if reference is not None and self.reference_version != request.reference:
                self.reference.refresh(reference)
                self.reference_version = request.reference
            scored = self.reference.score(shard, self.config.learner.tokens_per_microbatch)
            shard = shard.append_column(REF_LOGPROBS, float_lists(scored))
        return summarize(shard), shard
