"""Sampling and scoring together: rollout requests go out, and each shard is scored as soon as it is there."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from rl_llm.config import ResourcesConfig
from rl_llm.rewards import FAILED, GIVE_UP_AFTER, Scores
from rl_llm.rollout import RolloutRequest, SamplingParams
from rl_llm.runtime.pool import Outcome, Pool, Request, as_completed, share
from rl_llm.table import ERROR, TIMEOUT

SLACK = 10
"""Components share a request only where each one's deadline is this many times what all of them have taken."""


@dataclass(frozen=True)
class Collected:
    """What a batch of requests gave, in the order of its prompts.

    Attributes:
        summary: ids, groups, lengths, how samples ended; [N] rows.
        shards: the rollout tables, or references to them where they live in the object store.
        scores: per component, [N] rows each.
    """

    summary: pa.Table
    shards: list[Any]
    scores: dict[str, Scores]

    @classmethod
    def merge(cls, rounds: "Sequence[Collected]") -> "Collected":
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
    """Turns prompts into scored rollouts with a pool of rollout workers and a pool of reward workers.

    Args:
        deadlines: seconds a request may take, by component; see `rl_llm.rewards.deadline_s`.
    """

    def __init__(
        self, rollouts: Pool, rewards: Pool, deadlines: Mapping[str, float], resources: ResourcesConfig
    ) -> None:
        self.rollouts, self.rewards = rollouts, rewards
        self.deadlines = deadlines
        self.resources = resources
        self.slowest: dict[str, float] = {}

    def quick(self, components: Sequence[str]) -> list[str]:
        """Those that may share a request: all of them together have kept far within each one's deadline so far.

        Only with one worker, which has to score them one after the other anyway: a message costs more than many a
        component. Whoever shared a request that was lost is asked by itself from then on.
        """
        if self.rewards.size != 1:
            return []
        limit = min(self.deadlines[component] for component in components) / (SLACK * len(components))
        return [component for component in components if self.slowest.get(component, math.inf) <= limit]

    def note_seconds(self, component: str, seconds: float) -> None:
        self.slowest[component] = max(seconds, self.slowest.get(component, 0.0))

    def collect(
        self,
        name: str,
        prompts: pa.Table,
        params: SamplingParams,
        request_rows: int,
        first: tuple[int, int],
        version: int,
        weights: Any,
        components: Sequence[str],
        reference: tuple[int, Any] | None = None,
    ) -> Collected:
        """Sample and score.

        Args:
            name: of the batch, such as "step-12"; requests are "step-12/0" and so on.
            prompts: [P] rows of a task's split.
            request_rows: samples decoded together.
            first: the first sample id and the first group number.
            version, weights: of the policy that acts; see `RolloutWorker.sample`.
            components: the ones that score.
            reference: version and weights of the reference policy, where rollout workers are to score with it.

        Raises:
            RunFailed: a rollout request is given up, or a component cannot be set up.
        """
        n = params.samples_per_prompt
        size = max(request_rows // n, 1)
        batch = _Batch(self, name, components)
        for index, start in enumerate(range(0, prompts.num_rows, size)):
            part = prompts.slice(start, size)
            sample_ids = first[0] + n * start + np.arange(n * part.num_rows)
            groups = first[1] + start + np.repeat(np.arange(part.num_rows), n)
            request = RolloutRequest(part, sample_ids, groups, params, version, reference and reference[0])
            note = "prompts " + ", ".join(map(str, part["prompt_id"].to_pylist()[:8]))
            self.rollouts.submit(
                Request(
                    f"{name}/{index}",
                    "sample",
                    (request, weights, reference and reference[1]),
                    self.resources.request_timeout_s,
                    returns=2,
                    note=note,
                )
            )
        try:
            for pool, sent, outcome in as_completed(self.rollouts, self.rewards):
                batch.take_rollout(sent, outcome) if pool is self.rollouts else batch.take_scores(sent, outcome)
        except BaseException:
            self.rollouts.cancel()
            self.rewards.cancel()
            raise
        return batch.result()


class _Batch:
    """The bookkeeping of one `collect`: what has come back for each request."""

    def __init__(self, collector: Collector, name: str, components: Sequence[str]) -> None:
        self.collector, self.name, self.components = collector, name, components
        self.summaries: dict[int, pa.Table] = {}
        self.shards: dict[int, Any] = {}
        self.scores: dict[tuple[int, str], Scores] = {}
        self.lost: dict[tuple[int, str], _Lost] = {}
        self.rows_sent: dict[str, tuple[int, str, int]] = {}
        self.together_sent: dict[str, tuple[int, list[str]]] = {}

    def take_rollout(self, sent: Request, outcome: Outcome) -> None:
        index = int(sent.id.rsplit("/", 1)[1])
        self.summaries[index] = outcome.result()
        self.shards[index] = share(outcome.shard) if self.collector.rewards.size else outcome.shard
        together = self.collector.quick(self.components)
        if len(together) > 1:
            self._ask_together(index, together)
        for component in self.components:
            if len(together) < 2 or component not in together:
                self._ask(index, component)

    def _ask_together(self, index: int, components: list[str]) -> None:
        id = f"{self.name}/{index} {', '.join(components)}"
        # What all of them keep, each of them keeps.
        limit = min(self.collector.deadlines[component] for component in components)
        self.together_sent[id] = (index, components)
        self.collector.rewards.submit(Request(id, "score_all", (components, self.shards[index]), limit))

    def _ask(self, index: int, component: str, row: int | None = None) -> None:
        id = f"{self.name}/{index} {component}" + ("" if row is None else f" row {row}")
        limit = self.collector.deadlines[component]
        args = (component, self.shards[index], row)
        self.rows_sent[id] = (index, component, -1 if row is None else row)
        self.collector.rewards.submit(Request(id, "score", args, limit))

    def take_scores(self, sent: Request, outcome: Outcome) -> None:
        if outcome.error is not None and outcome.error.kind == "error":
            outcome.result()
        if sent.id in self.together_sent:
            self._take_together(*self.together_sent.pop(sent.id), outcome)
            return
        index, component, row = self.rows_sent.pop(sent.id)
        lost = self.lost.get((index, component))
        if row < 0 and outcome.error is None:
            self._keep(index, component, outcome.value)
        elif row < 0:
            self.collector.note_seconds(component, math.inf)
            cause = _failed(outcome)
            rows = self.summaries[index].num_rows
            lost = self.lost[index, component] = _Lost(cause.status[0], cause.errors[0], [None] * rows)
            self._retry(index, component, lost, range(min(GIVE_UP_AFTER, len(lost.rows))))
        elif lost is not None:
            lost.rows[row] = outcome.value if outcome.error is None else _failed(outcome)
            lost.waiting -= 1
            if lost.waiting == 0:
                self._after_retry(index, component, lost)

    def _take_together(self, index: int, components: list[str], outcome: Outcome) -> None:
        for component in components:
            if outcome.error is None:
                self._keep(index, component, outcome.value[component])
            else:
                # Which of them is to blame only requests of their own can tell.
                self.collector.note_seconds(component, math.inf)
                self._ask(index, component)

    def _keep(self, index: int, component: str, scores: Scores) -> None:
        self.scores[index, component] = scores
        self.collector.note_seconds(component, scores.seconds)

    def _retry(self, index: int, component: str, lost: _Lost, rows: range) -> None:
        lost.waiting = len(rows)
        for row in rows:
            self._ask(index, component, row)

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

    def result(self) -> Collected:
        order = sorted(self.summaries)
        return Collected(
            pa.concat_tables([self.summaries[index] for index in order]),
            [self.shards[index] for index in order],
            {
                component: Scores.merge([self.scores[index, component] for index in order])
                for component in self.components
            },
        )


def _failed(outcome: Outcome) -> Scores:
    assert outcome.error is not None
    if outcome.error.kind == "timeout":
        return Scores.failed(1, TIMEOUT, f"TimeoutError: {outcome.error}")
    return Scores.failed(1, ERROR, str(outcome.error))
