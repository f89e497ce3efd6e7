"""What samples: an engine takes tokens and gives tokens, and knows no table, no group and no reward."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from rl_llm.config import RunConfig
from rl_llm.errors import UserError, did_you_mean
from rl_llm.imports import import_function
from rl_llm.policies import Actions, Policy, SamplingParams, load_policy
from rl_llm.runtime.weights import WeightChannel, Weights


class Engine(Protocol):
    """A replica of the policy that samples.

    Attributes:
        loaded: number of the `Weights` it acts with, -1 for those of the folder it was made from.
    """

    loaded: int

    def generate(self, prompts: Sequence[np.ndarray], sample_ids: np.ndarray, params: SamplingParams) -> Actions:
        """Act `params.samples_per_prompt` times on each prompt; see `Policy.sample`."""

    def load(self, weights: Weights) -> None:
        """Act with these from now on; nothing where they are loaded already."""

    def close(self) -> None: ...


class LocalEngine:
    """The policy itself, in this process: its own decode loop on the library's model.

    Args:
        shared: whether the policy is the learner's own, which has the weights already.
    """

    def __init__(self, policy: Policy, channel: WeightChannel, shared: bool = False) -> None:
        self.policy, self.channel, self.shared = policy, channel, shared
        # The folder's own weights are the first publish only in a fresh run: a replica starts without a number.
        self.loaded = -1

    def generate(self, prompts: Sequence[np.ndarray], sample_ids: np.ndarray, params: SamplingParams) -> Actions:
        return self.policy.sample(prompts, sample_ids, params)

    def load(self, weights: Weights) -> None:
        if self.loaded != weights.number:
            if not self.shared:
                self.policy.load_named(self.channel.tensors(weights))
            self.loaded = weights.number

    def close(self) -> None:
        """There is nothing but memory to give back."""


def local(config: RunConfig, base: str, channel: WeightChannel, shared: Policy | None) -> Engine:
    """The engine `transformers`: on the learner's own policy where they share a process, else on a replica."""
    return LocalEngine(shared or load_policy(base, config.policy), channel, shared is not None)


MakeEngine = Callable[[RunConfig, str, WeightChannel, Policy | None], Engine]
"""`(config, folder of the first policy, channel, the learner's policy where it is in this process) -> engine`."""

ENGINES: dict[str, MakeEngine] = {"transformers": local}


def engine_maker(name: str) -> MakeEngine:
    """What makes the engine that `rollout.engine` names. Raises `UserError` where there is none of the name."""
    if ":" in name:
        return import_function(name, "rollout.engine")
    if name not in ENGINES:
        raise UserError(f"rollout.engine {name!r}: {did_you_mean(name, ENGINES)}, or package.module:function")
    return ENGINES[name]
