"""Held-out metrics with intervals, and early stopping."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from rl_llm.config import TOKENS, UTILITY, ComponentConfig, EvaluationConfig
from rl_llm.policies import SamplingParams
from rl_llm.rewards import apply_failure_policies
from rl_llm.rng import Purpose, key, stream
from rl_llm.runtime.replica import fetch
from rl_llm.runtime.weights import Weights
from rl_llm.trainer.collector import Collector, FirstIds, Rollouts
from rl_llm.trainer.utility import Utility

RESAMPLES = 2000
# Evaluation that is not greedy draws from streams that no training sample reaches.
FIRST = FirstIds(key(Purpose.EVALUATION, 0), 0)


def interval(values: np.ndarray, seed: int = 0) -> dict[str, float | None]:
    """Mean of [N] values with 95 % percentile-bootstrap bounds over rows; NaN rows are left out.

    Returns `{"mean", "low", "high"}`, all None where no row has a value.
    """
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return {"mean": None, "low": None, "high": None}
    generator = stream(seed, Purpose.BOOTSTRAP, len(values))
    means = np.array([values[generator.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)])
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


@dataclass
class Progress:
    """The best utility so far, and how long ago that was in validations."""

    best: float = float("-inf")
    best_step: int = 0
    since: int = 0

    def note(self, utility: float | None, step: int) -> bool:
        """Whether this validation is the best so far; the first of equals stays."""
        if utility is not None and utility > self.best:
            self.best, self.best_step, self.since = utility, step, 0
            return True
        self.since += 1
        return False

    def exhausted(self, patience: int | None) -> bool:
        return patience is not None and self.since >= patience


@dataclass(frozen=True)
class Evaluation:
    """An evaluation: the line for eval.jsonl, the prompts, int64 [P], and each metric's value a prompt, float64 [P],
    NaN where there is none.
    """

    line: dict[str, Any]
    prompt_ids: np.ndarray
    values: dict[str, np.ndarray]


def with_utility(evaluation: Evaluation, utility: Utility) -> Evaluation:
    """The same evaluation as a run with another utility makes it; without base statistics the utility takes its own."""
    made = {name: column for name, column in evaluation.values.items() if name not in (UTILITY, TOKENS)}
    if not utility.base:
        utility.measure_base(made)
    worth = made[UTILITY] = utility.per_prompt(made)
    line = dict(evaluation.line, metrics={**evaluation.line["metrics"], UTILITY: interval(worth)})
    line["samples"] = [
        {**row, "rewards": {**row["rewards"], UTILITY: _number(worth[i])}} for i, row in enumerate(line["samples"])
    ]
    return Evaluation(line, evaluation.prompt_ids, {**made, TOKENS: evaluation.values[TOKENS]})


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


class Evaluator:
    """Scores a policy on fixed held-out prompts, greedily unless told otherwise.

    Args:
        params: how to sample.
        components: what to measure.
        on_failure: gets the record of every failed reward.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        params: SamplingParams,
        components: Mapping[str, ComponentConfig],
        collector: Collector,
        on_failure: Callable[[dict[str, Any]], None],
    ) -> None:
        self.config, self.params = config, params
        self.components, self.collector = components, collector
        self.on_failure = on_failure

    def evaluate(
        self, prompts: pa.Table, split: str, label: str, step: int, weights: Weights, utility: Utility | None = None
    ) -> Evaluation:
        """Sample and score `prompts`; the first evaluation of a run sets its utility's base statistics.

        Args:
            prompts: [P] rows of a task's split.
            split, label, step: for the record.
            weights: of the policy.

        Raises:
            RewardFailed: a component failed beyond what its configuration allows.
        """
        name = f"{label}-{split}-{step}"
        pending = self.collector.start(name, prompts, self.params, FIRST, weights, list(self.components))
        found = self.collector.wait(pending)
        resolved = apply_failure_policies(
            self.components,
            found.scores,
            found.prompt_ids,
            step,
            lambda record: self.on_failure({**record, "label": label}),
        )
        values = {metric: component.values for metric, component in resolved.items()}
        if utility is not None:
            if not utility.base:
                utility.measure_base(values)
            values[UTILITY] = utility.per_prompt(values)
        values[TOKENS] = found.summary["length"].to_numpy().astype(np.float64)
        line = {
            "step": step,
            "split": split,
            "label": label,
            "metrics": {metric: interval(column) for metric, column in values.items()},
            "samples": self._samples(found, values),
        }
        return Evaluation(line, found.prompt_ids, values)

    def _samples(self, found: Rollouts, values: dict[str, np.ndarray]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for shard in found.shards:
            if len(rows) < self.config.samples:
                [table] = fetch([shard])
                shown = table.slice(0, self.config.samples - len(rows))
                rows += shown.select(["prompt", "completion"]).to_pylist()
        scored = [name for name in values if name != TOKENS]
        return [{**row, "rewards": {name: _number(values[name][i]) for name in scored}} for i, row in enumerate(rows)]
