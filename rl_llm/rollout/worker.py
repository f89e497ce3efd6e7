"""The rollout worker: answers sampling requests with an engine, a shard of the rollout table each."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from rl_llm.config import RunConfig
from rl_llm.policies import Policy, SamplingParams
from rl_llm.rollout.engines import Engine, engine_maker
from rl_llm.runtime.weights import WeightChannel, Weights
from rl_llm.table import make_shard, ragged, summarize


@dataclass(frozen=True)
class RolloutRequest:
    """What to sample: prompts [P], ids and groups of their samples [P * n], how, and with which weights."""

    prompts: pa.Table
    sample_ids: np.ndarray
    groups: np.ndarray
    params: SamplingParams
    weights: Weights


class RolloutWorker:
    """An engine of its own, or one on the learner's policy where both live in one process."""

    def __init__(self, config: RunConfig, base: str, channel: WeightChannel, shared: Policy | None = None) -> None:
        torch.set_num_threads(config.resources.threads)
        self.engine = engine_maker(config.rollout.engine)(config, base, channel, shared)

    def close(self) -> None:
        self.engine.close()

    def sample(self, request: RolloutRequest) -> tuple[pa.Table, pa.Table]:
        """The summary and the shard of a request."""
        shard = sample_shard(self.engine, request)
        return summarize(shard), shard


def sample_shard(engine: Engine, request: RolloutRequest) -> pa.Table:
    """What an engine does on a request, with the weights it names, as a shard of the rollout table."""
    params, weights = request.params, request.weights
    engine.load(weights)
    actions = engine.generate(ragged(request.prompts["prompt_ids"]), request.sample_ids, params)
    columns = {
        "sample_id": request.sample_ids,
        "group": request.groups,
        "policy_version": np.full(len(actions.ids), weights.step),
        "completion": actions.texts,
        "completion_ids": actions.ids,
        "action_mask": [np.ones(len(ids), dtype=bool) for ids in actions.ids],
        "logprobs": actions.logprobs,
        "log_kept_mass": actions.log_kept_mass,
        "temperature": np.full(len(actions.ids), params.temperature, dtype=np.float32),
        "finish": actions.finish,
    }
    return make_shard(request.prompts, params.samples_per_prompt, columns)
