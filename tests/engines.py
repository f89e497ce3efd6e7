"""Engines of one's own, named in configs as "engines:canned"."""

import time
from collections.abc import Sequence

import numpy as np
import torch

from rl_llm.algorithms.losses import LossInputs, clipped
from rl_llm.config import RunConfig
from rl_llm.policies import Actions, Policy, SamplingParams
from rl_llm.rollout import LocalEngine
from rl_llm.rollout.engines import local
from rl_llm.runtime.weights import WeightChannel, Weights

TEXT, TOKENS = "gold red", np.array([7, 8, 9], dtype=np.int32)
LOADED: list[Weights] = []


class Canned:
    """Says the same to everything, and notes the weights it is given."""

    loaded = -1

    def generate(self, prompts: Sequence[np.ndarray], sample_ids: np.ndarray, params: SamplingParams) -> Actions:
        count = len(sample_ids)
        zeros = [np.zeros(len(TOKENS), dtype=np.float32)] * count
        return Actions([TOKENS] * count, zeros, zeros, [TEXT] * count, ["stop"] * count)

    def load(self, weights: Weights) -> None:
        if weights.number != self.loaded:
            LOADED.append(weights)
            self.loaded = weights.number

    def close(self) -> None:
        """It holds nothing."""


def canned(config: RunConfig, base: str, channel: WeightChannel, shared: Policy | None) -> Canned:
    return Canned()


class Slow(LocalEngine):
    def generate(self, *args: object) -> Actions:
        time.sleep(1)
        return super().generate(*args)  # type: ignore[arg-type]


def slow(config: RunConfig, base: str, channel: WeightChannel, shared: Policy | None) -> LocalEngine:
    """The usual engine, a second slower a request."""
    return Slow(local(config, base, channel, shared).policy, channel)  # type: ignore[attr-defined]


def slow_loss(inputs: LossInputs) -> torch.Tensor:
    """The usual loss, a second slower a micro-batch."""
    time.sleep(1)
    return clipped(inputs)
