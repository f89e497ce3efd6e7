"""Sampling and scoring together: rollout requests go out, and each shard is scored as soon as it is there."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from rl_llm.config import ResourcesConfig
from rl_llm.policies import SamplingParams
from rl_llm.rewards import FAILED, GIVE_UP_AFTER, Scores
from rl_llm.rollout import RolloutRequest
from rl_llm.runtime.pool import Outcome, Pool, Request
from rl_llm.runtime.replica import put
from rl_llm.runtime.weights import Weights
from rl_llm.table import ERROR, TIMEOUT

SLACK = 10
"""Components share a request only where each one's deadline is this many times what all of them have taken."""


class FirstIds(NamedTuple):
    """Where a batch's numbers begin; those of its further samples and prompts follow."""

    sample: int
    group: int


@dataclass(frozen=True)
class Rollouts:
    """Scored samples, in the order of their prompts.

    Attributes:
        summary: ids, groups, lengths, how samples ended; [N] rows.
        shards: the rollout tables, or references to them where they live in the object store.
        scores: per component, [N] rows each.
        signal: bool [N], rows of groups with something to learn from; None where nobody looked.
    """

    summary: pa.Table
    shards: list[Any]
    scores: dict[str, Scores]
    signal: np.ndarray | None = None

    @property
    def groups(self) -> np.ndarray:
        """int64 [N]."""
        return self.summary["group"].to_numpy()

    @property
    def prompt_ids(self) -> np.ndarray:
        """int64 [N]."""
        return self.summary["prompt_id"].to_numpy()

    @classmethod
    def merge(cls, rounds: "Sequence[Rollouts]") -> "Rollouts":
        """Several batches as one, in their order; all with the same components."""
        if len(rounds) == 1:
            return rounds[0]
        return cls(
            pa.concat_tables([part.summary for part in rounds]),
            [shard for part in rounds for shard in part.shards],
            {name: Scores.merge([part.scores[name] for part in rounds]) for name in rounds[0].scores},
        )


@dataclass
class _Lost:
    """A component's batch that was lost with its worker, being tried again row by row; `status`, `message`: why."""

    status: str
    message: str
    rows: list[Scores | None]
    waiting: int = 0


class Collector:
    """Turns prompts into scored rollouts with a pool of rollout workers and pools of reward workers.

    Several batches may be under way at once; whoever waits for one lets the others go on.

    Args:
        rewards: the pool that scores with each component; components may share one.
        deadlines: seconds a request may take, by component; see `rl_llm.rewards.deadline_s`.
        request_rows: samples decoded together.
    """

    def __init__(
        self,
        rollouts: Pool,
        rewards: Mapping[str, Pool],
        deadlines: Mapping[str, float],
        resources: ResourcesConfig,
        request_rows: int,
    ) -> None:
        self.rollouts, self.rewards = rollouts, rewards
        self.deadlines = deadlines
        self.resources = resources
        self.request_rows = request_rows
        self.slowest: dict[str, float] = {}

    def quick(self, components: Sequence[str]) -> list[str]:
        """Those that may share a request: all of them together have kept far within each one's deadline so far.

        Only with one worker for all, which has to score them one after the other anyway: a message costs more than many
        a component. Whoever shared a request that was lost is asked by itself from then on.
        """
        if len(components) < 2 or any(self.rewards[name] is not self.rewards[components[0]] for name in components):
            return []
        if self.rewards[components[0]].size != 1:
            return []
        limit = min(self.deadlines[component] for component in components) / (SLACK * len(components))
        return [component for component in components if self.slowest.get(component, math.inf) <= limit]

    def note_seconds(self, component: str, seconds: float) -> None:
        self.slowest[component] = max(seconds, self.slowest.get(component, 0.0))

    def start(
        self,
        name: str,
        prompts: pa.Table,
        params: SamplingParams,
        first: FirstIds,
        weights: Weights,
        components: Sequence[str],
    ) -> "Pending":
        """Send the requests of a batch out.

        Args:
            name: of the batch, such as "step-12"; requests are "step-12/0" and so on.
            prompts: [P] rows of a task's split.
            weights: that the policy acts with.
            components: the ones that score.
        """
        n = params.samples_per_prompt
        size = max(self.request_rows // n, 1)
        starts = range(0, prompts.num_rows, size)
        pending = Pending(self, name, components, len(starts))
        for index, start in enumerate(starts):
            part = prompts.slice(start, size)
            sample_ids = first.sample + n * start + np.arange(n * part.num_rows)
            groups = first.group + start + np.repeat(np.arange(part.num_rows), n)
            request = RolloutRequest(part, sample_ids, groups, params, weights)
            self.rollouts.submit(
                Request(
                    f"{name}/{index}",
                    "sample",
                    (request,),
                    self.resources.request_timeout_s,
                    returns=2,
                    note="prompts " + ", ".join(map(str, part["prompt_id"].to_pylist()[:8])),
                    reply=partial(pending.take_rollout, index),
                )
            )
        return pending

    def forget(self) -> None:
        """Nobody waits for what is under way any more."""
        for pool in {self.rollouts, *self.rewards.values()}:
            pool.cancel()

    def wait(self, pending: "Pending") -> Rollouts:
        """The batch, when all of it is there.

        Raises:
            RunFailed: a rollout request is given up, or a component cannot be set up.
        """
        self.rollouts.dispatcher.serve(lambda: pending.done)
        return pending.result()


class Pending:
    """A batch under way: what has come back for each of its `count` requests."""

    def __init__(self, collector: Collector, name: str, components: Sequence[str], count: int) -> None:
        self.collector, self.name, self.components, self.count = collector, name, components, count
        self.summaries: dict[int, pa.Table] = {}
        self.shards: dict[int, Any] = {}
        self.scores: dict[tuple[int, str], Scores] = {}
        self.lost: dict[tuple[int, str], _Lost] = {}

    @property
    def done(self) -> bool:
        return len(self.summaries) == self.count and len(self.scores) == self.count * len(self.components)

    def take_rollout(self, index: int, outcome: Outcome) -> None:
        """The reply to a rollout request: its shard goes on to the rewards."""
        self.summaries[index] = outcome.result()
        self.shards[index] = put(outcome.kept) if self.collector.resources.uses_ray else outcome.kept
        together = self.collector.quick(self.components)
        if len(together) > 1:
            self._ask_together(index, together)
        for component in self.components:
            if len(together) < 2 or component not in together:
                self.ask(index, component)

    def _ask_together(self, index: int, components: list[str]) -> None:
        id = f"{self.name}/{index} {', '.join(components)}"
        # What all of them keep, each of them keeps.
        limit = min(self.collector.deadlines[component] for component in components)
        reply = partial(self._take_together, index, components)
        self.collector.rewards[components[0]].submit(
            Request(id, "score_all", (components, self.shards[index]), limit, reply=reply)
        )

    def ask(self, index: int, component: str, row: int | None = None) -> None:
        """Have a component score a request's shard, or one row of it."""
        id = f"{self.name}/{index} {component}" + ("" if row is None else f" row {row}")
        take = partial(self._take, index, component) if row is None else partial(self._take_row, index, component, row)
        self.collector.rewards[component].submit(
            Request(id, "score", (component, self.shards[index], row), self.collector.deadlines[component], reply=take)
        )

    def _take(self, index: int, component: str, outcome: Outcome) -> None:
        cause = _failed(outcome)
        if cause is None:
            self._keep(index, component, outcome.value)
            return
        self.collector.note_seconds(component, math.inf)
        rows = self.summaries[index].num_rows
        lost = self.lost[index, component] = _Lost(cause.status[0], cause.errors[0], [None] * rows)
        self._retry(index, component, lost, range(min(GIVE_UP_AFTER, rows)))

    def _take_row(self, index: int, component: str, row: int, outcome: Outcome) -> None:
        lost = self.lost[index, component]
        lost.rows[row] = _failed(outcome) or outcome.value
        lost.waiting -= 1
        if lost.waiting == 0:
            self._after_retry(index, component, lost)

    def _take_together(self, index: int, components: list[str], outcome: Outcome) -> None:
        cause = _failed(outcome)
        for component in components:
            if cause is None:
                self._keep(index, component, outcome.value[component])
            else:
                # Which of them is to blame only requests of their own can tell.
                self.collector.note_seconds(component, math.inf)
                self.ask(index, component)

    def _keep(self, index: int, component: str, scores: Scores) -> None:
        self.scores[index, component] = scores
        self.collector.note_seconds(component, scores.seconds)

    def _retry(self, index: int, component: str, lost: _Lost, rows: range) -> None:
        lost.waiting = len(rows)
        for row in rows:
            self.ask(index, component, row)

    def _after_retry(self, index: int, component: str, lost: _Lost) -> None:
        """All rows asked are back: ask for the others, unless there are none or every one of these failed."""
        tried = [scores for scores in lost.rows if scores is not None]
        rest = range(len(tried), len(lost.rows))
        if rest and any(scores.status[0] not in FAILED for scores in tried):
            self._retry(index, component, lost, rest)
            return
        given_up = Scores.failed(len(rest), tried[0].status[0], tried[0].errors[0]) if rest else None
        scores = Scores.merge([*tried, *([given_up] if given_up else [])])
        if not any(status in FAILED for status in scores.status):
            scores = replace(scores, errors=[lost.message], retried=dict.fromkeys(range(len(lost.rows)), lost.status))
        self.scores[index, component] = scores

    def result(self) -> Rollouts:
        order = range(self.count)
        return Rollouts(
            pa.concat_tables([self.summaries[index] for index in order]),
            [self.shards[index] for index in order],
            {
                component: Scores.merge([self.scores[index, component] for index in order])
                for component in self.components
            },
        )


def _failed(outcome: Outcome) -> Scores | None:
    """A row's score where the worker was lost; None where there is an answer. Raises what the method raised."""
    if outcome.error is None:
        return None
    if outcome.error.kind == "error":
        outcome.result()
    if outcome.error.kind == "timeout":
        return Scores.failed(1, TIMEOUT, f"TimeoutError: {outcome.error}")
    return Scores.failed(1, ERROR, str(outcome.error))
