"""The scored groups of a step: which prompts, sampled when, and how often again."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from rl_llm.algorithms import build_algorithm
from rl_llm.config import RunConfig, value_at
from rl_llm.mixture import Mixture
from rl_llm.policies import SamplingParams
from rl_llm.rewards import imputed
from rl_llm.runtime.weights import Weights
from rl_llm.tasks.source import PromptSource
from rl_llm.trainer.collector import Collector, FirstIds, Pending, Rollouts


class Sampler(Protocol):
    """Gives each step its rollouts."""

    def next(self, step: int, weights: Weights) -> Rollouts:
        """The scored groups of a step (from 0), in the order of their prompts.

        `weights` are those that are there now; what is sampled from here on acts with them.
        """

    def save(self, folder: Path) -> None:
        """Leave in a checkpoint what is under way."""

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint; what was under way here is forgotten."""


class Synchronous:
    """A step's prompts are sampled when it is asked for, with the weights there are; nothing is under way between."""

    def __init__(self, config: RunConfig, collector: Collector, prompts: PromptSource, mixture: Mixture) -> None:
        self.config, self.collector, self.prompts, self.mixture = config, collector, prompts, mixture
        self.resample = build_algorithm(config.algorithm).resample

    def next(self, step: int, weights: Weights) -> Rollouts:
        """With `resample`, further prompts take the place of those whose groups have no signal, for so many rounds
        (dynamic sampling, arXiv 2503.14476); `Rollouts.signal` then says which have.
        """
        count = self.config.rollout.prompts_per_step
        found = self.collector.wait(self.start(step, weights, count))
        if not self.resample:
            return found
        for number in range(1, self.resample + 1):
            signal = self._signal(found, step)
            missing = count - len(np.unique(found.groups[signal]))
            if missing == 0:
                break
            again = self.collector.wait(self.start(step, weights, missing, number))
            found = Rollouts.merge([found, again])
        return Rollouts(found.summary, found.shards, found.scores, self._signal(found, step))

    def start(self, step: int, weights: Weights, count: int, number: int = 0) -> Pending:
        """Send out samples of the next `count` prompts, in the `number`th round of a step."""
        rollout, seed = self.config.rollout, self.config.trainer.seed
        group = self.prompts.position
        return self.collector.start(
            f"step-{step + 1}" + (f"-again-{number}" if number else ""),
            self.prompts.take(count),
            SamplingParams.of(rollout, rollout.samples_per_prompt, value_at(rollout.temperature, step), seed),
            FirstIds(group * rollout.samples_per_prompt, group),
            weights,
            list(self.config.rewards.components),
        )

    def _signal(self, found: Rollouts, step: int) -> np.ndarray:
        components = self.config.rewards.components
        values = {name: imputed(component, found.scores[name]) for name, component in components.items()}
        return self.mixture.signal(values, found.groups, step)

    def save(self, folder: Path) -> None:
        """Nothing is under way between two steps."""

    def load(self, folder: Path) -> None:
        """Nothing was under way."""


MakeSampler = Callable[[RunConfig, Collector, PromptSource, Mixture], Sampler]
