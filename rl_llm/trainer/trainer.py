"""The loop: prompts -> rollouts -> rewards -> mixture -> learner -> weights."""

import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rl_llm.algorithms import build_algorithm
from rl_llm.config import RunConfig, value_at
from rl_llm.errors import RunFailed
from rl_llm.launch.warm_start import supervised_texts
from rl_llm.rewards import Mixed, Mixture, Settled, filled, settle
from rl_llm.rollout import SamplingParams
from rl_llm.runs import checkpoint
from rl_llm.runs.callbacks import Callback
from rl_llm.runs.console import Console
from rl_llm.runs.writer import Journal
from rl_llm.table import NOT_APPLICABLE, OK, REWARD, STATUS
from rl_llm.tasks import Task
from rl_llm.trainer.collector import Collected
from rl_llm.trainer.evaluation import Evaluation, Evaluator, Progress, Utility, held_out
from rl_llm.trainer.workers import Crew

SUPERVISED_VERSION = -1


class Interrupted(KeyboardInterrupt):
    """Somebody asked the run to stop (SIGINT, SIGTERM); its state is saved."""


class Trainer:
    """One run: its workers, its state, and the loop over them.

    Attributes:
        config, path: the resolved config and the run directory.
        steps_done: steps behind this run, which is also the version of the weights.
        mixture: the reward weights; `mixture.set_weight` changes one between two steps.
    """

    def __init__(
        self,
        config: RunConfig,
        path: Path,
        task: Task,
        base: str,
        functions: Mapping[str, Callable[..., Any]],
        callbacks: Sequence[Callback],
        console: Console,
        state: Path | None,
    ) -> None:
        """Start the workers and take up the state.

        Args:
            task: tokenized for the policy.
            base: folder of the policy before training.
            functions: reward functions given as they are, by component.
            state: the checkpoint to go on from; None begins anew.
        """
        # Learners in other processes write here too, from wherever they run.
        self.config, self.path, self.task = config, path.absolute(), task
        self.algorithm = build_algorithm(config.algorithm)
        self.mixture = Mixture(config.rewards)
        self.utility = Utility(utility_weights(config), {})
        self.progress = Progress()
        self.before: dict[str, Any] = {}
        self.steps_done = self.prompts_drawn = 0
        self.tokens_trained = 0
        self.started: list[Callback] = []
        self._clock_start, self._seconds_before = time.monotonic(), 0.0
        self.crew = Crew(config, base, config.measured, functions)
        if state is not None:
            with self.crew.closing_on_error():
                self._restore(state)
        kept = -1 if state is None else self.steps_done
        self.journal = Journal(self.path, kept, config.logging.rollouts, console, callbacks)
        self.evaluator = Evaluator(
            config.evaluation,
            SamplingParams.of(config.rollout, 1, config.evaluation.temperature, config.trainer.seed),
            config.rollout.request_rows,
            config.measured,
            self.crew,
            self.utility,
            self.journal.failure,
        )

    def fit(self) -> str:
        """Run to the last step, or until the utility has stopped rising. Returns the status for the summary.

        Raises:
            Interrupted: on SIGINT or SIGTERM, after the step under way; the state is saved.
            RunFailed: the run cannot go on; the last checkpoint stands.
        """
        with _stop_requested() as asked:
            self.crew.publish(self.steps_done)
            for callback in self.journal.callbacks:
                callback.on_start(self)
                self.started.append(callback)
            if not self.before:
                self._begin()
            while self.steps_done < self.config.trainer.steps and not self._exhausted and not asked():
                self.journal.step(self, self.step())
                if self._due(self.config.evaluation.every):
                    self._validate()
                if self._due(self.config.checkpoint.every) or self._exhausted or asked():
                    self.save()
            if asked():
                raise Interrupted
        return "finished" if self.steps_done >= self.config.trainer.steps else "stopped_early"

    def _due(self, every: int) -> bool:
        return self.steps_done % every == 0 or self.steps_done == self.config.trainer.steps

    @property
    def _exhausted(self) -> bool:
        return self.progress.exhausted(self.config.evaluation.patience)

    def step(self) -> dict[str, Any]:
        """One step: sample, score, weigh, update, publish. Returns its metrics."""
        step, clock = self.steps_done, _Clock()
        rollouts, settled = self._sample(step)
        clock.lap("rollout")
        groups, values = rollouts.summary["group"].to_numpy(), {name: part.values for name, part in settled.items()}
        mixed = self.mixture.mix(values, self.algorithm.baseline_groups(groups), step, self.algorithm.estimator)
        clock.lap("mixture")
        columns = _columns(settled, mixed, self._trained(mixed, values, groups, step), self.algorithm.per_token)
        update = self.crew.learner.call("update", columns, step, self.journal.rollout_path(step + 1), *rollouts.shards)
        clock.lap("learn")
        self.steps_done += 1
        self.tokens_trained += int(update["tokens/trained"])
        self.crew.publish(self.steps_done)
        clock.lap("publish")
        return {
            "step": self.steps_done,
            "temperature": value_at(self.config.rollout.temperature, step),
            **_describe(rollouts, settled, mixed),
            **update,
            **self._timed(rollouts, clock),
        }

    def _sample(self, step: int) -> tuple[Collected, dict[str, Settled]]:
        """Rollouts of a step with the scores of every reward component.

        With `resample`, further prompts take the place of those whose groups have no signal, for so many rounds
        (dynamic sampling, arXiv 2503.14476).
        """
        components, count = self.config.rewards.components, self.config.rollout.prompts_per_step
        found = self._round(step, 0, count)
        for number in range(1, self.algorithm.resample + 1):
            values = {name: filled(component, found.scores[name]) for name, component in components.items()}
            groups = found.summary["group"].to_numpy()
            missing = count - len(np.unique(groups[self.mixture.signal(values, groups, step)]))
            if missing == 0:
                break
            found = Collected.merge([found, self._round(step, number, missing)])
        prompt_ids = found.summary["prompt_id"].to_numpy()
        return found, settle(components, found.scores, prompt_ids, step + 1, self.journal.failure)

    def _trained(self, mixed: Mixed, values: dict[str, np.ndarray], groups: np.ndarray, step: int) -> np.ndarray:
        """Rows for the learner, bool [N]: with `resample` those of groups with signal, if there are any."""
        if not self.algorithm.resample:
            return mixed.valid
        both = mixed.valid & self.mixture.signal(values, groups, step)
        return both if both.any() else mixed.valid

    def _round(self, step: int, number: int, count: int) -> Collected:
        """Samples of the next `count` prompts with their scores."""
        rollout, crew = self.config.rollout, self.crew
        prompts = draw_prompts(self.task.splits["train"], self.prompts_drawn, count, self.config.trainer.seed)
        temperature = value_at(rollout.temperature, step)
        params = SamplingParams.of(rollout, rollout.samples_per_prompt, temperature, self.config.trainer.seed)
        group = self.prompts_drawn
        self.prompts_drawn += count
        return crew.collector.collect(
            f"step-{step + 1}" + (f"-again-{number}" if number else ""),
            prompts,
            params,
            rollout.request_rows,
            (group * rollout.samples_per_prompt, group),
            crew.version,
            crew.weights,
            list(self.config.rewards.components),
            crew.reference,
        )

    def _timed(self, rollouts: Collected, clock: "_Clock") -> dict[str, float]:
        total = clock.total()
        tokens = int(np.sum(rollouts.summary["length"].to_numpy()))
        return {
            "tokens_per_second": tokens / total,
            "time/step": total,
            **{f"time/{name}": seconds for name, seconds in clock.laps.items()},
            **{f"time/reward/{name}": scores.seconds for name, scores in rollouts.scores.items()},
        }

    # Evaluation, checkpoints and the end of a run.

    def _begin(self) -> None:
        """Measure the policy before training: the base statistics, the first utility, and the test split."""
        self._validate()
        self.before = self.test("before").line["metrics"]
        self.save()

    def _validate(self) -> None:
        tune = held_out(self.task.splits["tune"], self.config.evaluation.prompts)
        evaluation = self.evaluator.evaluate(tune, "tune", "validation", self.steps_done)
        better = self.progress.note(evaluation.line["metrics"]["utility"]["mean"], self.steps_done)
        # The first policy is kept even without a utility: it is the best until there is another.
        if better or self.steps_done == 0:
            with checkpoint.writing(self._best(self.steps_done)) as aside:
                self.crew.learner.first("save_weights", str(aside / "weights.safetensors"))
        self.journal.evaluation(self, evaluation.line)

    def test(self, label: str) -> Evaluation:
        """Evaluate on the test split and note it."""
        test = held_out(self.task.splits["test"], self.config.evaluation.test_prompts)
        evaluation = self.evaluator.evaluate(test, "test", label, self.steps_done)
        self.journal.evaluation(self, evaluation.line)
        return evaluation

    def _best(self, step: int) -> Path:
        return self.path / "checkpoints" / "best" / checkpoint.step_name(step)

    def save(self) -> None:
        """Write a checkpoint and clear away what no checkpoint needs any more."""
        folder = self.path / "checkpoints" / checkpoint.step_name(self.steps_done)
        with checkpoint.writing(folder) as aside:
            self.crew.learner.first("save_state", str(aside))
            checkpoint.save_state(aside, self._state())
        checkpoint.prune(self.path / "checkpoints", self.config.checkpoint.keep)
        self._clear_best()
        for callback in self.journal.callbacks:
            callback.on_checkpoint(self, folder)

    def _clear_best(self) -> None:
        """Drop best policies that no kept checkpoint speaks of; the first policy stays, controls start from it."""
        kept = (self.path / "checkpoints").glob("step-*")
        needed = {0, *(checkpoint.load_state(folder)["progress"]["best_step"] for folder in kept)}
        for folder in (self.path / "checkpoints" / "best").glob("step-*"):
            if int(folder.name.removeprefix("step-")) not in needed:
                shutil.rmtree(folder)

    def _state(self) -> dict[str, Any]:
        return {
            "steps_done": self.steps_done,
            "prompts_drawn": self.prompts_drawn,
            "seconds": self.seconds,
            "tokens_trained": self.tokens_trained,
            "before": self.before,
            "mixture": self.mixture.state_dict(),
            "configured_weights": self.config.model_dump(mode="json")["rewards"]["weights"],
            "utility": asdict(self.utility),
            "progress": asdict(self.progress),
        }

    def _restore(self, folder: Path) -> None:
        state = checkpoint.load_state(folder)
        self.crew.learner.call("load_state", str(folder))
        self.steps_done, self.prompts_drawn = state["steps_done"], state["prompts_drawn"]
        self.tokens_trained = state["tokens_trained"]
        self._seconds_before = state["seconds"]
        self.before = state["before"]
        # Weights given anew on resuming go before those that were live when the checkpoint was made.
        configured = self.config.model_dump(mode="json")["rewards"]["weights"]
        live = dict(self.mixture.weights)
        self.mixture.load_state_dict(state["mixture"])
        for name, weight in live.items():
            if configured[name] != state["configured_weights"][name]:
                self.mixture.set_weight(name, weight)
        self.utility = Utility(**state["utility"])
        self.progress = Progress(**state["progress"])

    def export_best(self) -> None:
        """Put the best policy's weights in place and leave it as `model/`, a folder that `transformers` loads."""
        best = self.progress.best_step
        problem = checkpoint.damage(self._best(best))
        if problem is not None:
            raise RunFailed(f"the best policy, {self._best(best)}, cannot be used: {problem}")
        self.crew.learner.call("load_weights", str(self._best(best) / "weights.safetensors"))
        self.crew.publish(best)
        with checkpoint.writing(self.path / "model") as aside:
            self.crew.learner.first("save_model", str(aside))

    def continue_warm_start(self) -> dict[str, Any]:
        """The control: supervised training from the first policy on as many tokens as the run has trained on.

        Returns test metrics, which are noted as "supervised".
        """
        self.crew.learner.call("load_weights", str(self._best(0) / "weights.safetensors"))
        prompts, targets = supervised_texts(self.task, self.config)
        self.crew.learner.call("supervise", prompts, targets, self.tokens_trained)
        self.crew.publish(SUPERVISED_VERSION)
        return self.test("supervised").line["metrics"]

    @property
    def seconds(self) -> float:
        """Time spent on the run, its earlier starts included where it was resumed."""
        return self._seconds_before + time.monotonic() - self._clock_start

    def close(self) -> None:
        self.crew.close()
        self.journal.close()


def utility_weights(config: RunConfig) -> dict[str, float]:
    """What the utility weighs: as configured, else the initial reward weights and 1 for each extra metric."""
    if config.evaluation.utility is not None:
        return dict(config.evaluation.utility)
    # The utility reads raw values, so a component that is turned round by its scale is turned round here.
    initial = {
        name: math.copysign(1.0, config.rewards.components[name].scale) * value_at(weight, 0)
        for name, weight in config.rewards.weights.items()
    }
    return {**initial, **dict.fromkeys(config.evaluation.metrics, 1.0)}


def draw_prompts(train: pa.Table, start: int, count: int, seed: int) -> pa.Table:
    """`count` prompts of a run after the first `start`: a walk through one shuffle after another."""
    places = np.arange(start, start + count)
    rows = np.empty(count, dtype=np.int64)
    for epoch in np.unique(places // train.num_rows):
        shuffle = np.random.Generator(np.random.Philox(key=[seed, int(epoch)])).permutation(train.num_rows)
        here = places // train.num_rows == epoch
        rows[here] = shuffle[places[here] % train.num_rows]
    return train.take(pa.array(rows))


def _columns(settled: Mapping[str, Settled], mixed: Mixed, trained: np.ndarray, outcome: bool) -> pa.Table:
    """The reward columns of the rollout table; `trained` bool [N], `outcome` where the learner makes advantages."""

    def nullable(values: np.ndarray) -> pa.Array:
        return pa.array(values.astype(np.float32), mask=np.isnan(values))

    columns: dict[str, pa.Array] = {}
    for name, component in settled.items():
        columns[REWARD + name] = nullable(component.values)
        columns[STATUS + name] = pa.array(component.status, type=pa.string())
    columns["reward"] = nullable(mixed.reward)
    columns["advantage"] = pa.array(mixed.advantages.astype(np.float32))
    if outcome:
        columns["outcome"] = pa.array(mixed.outcome.astype(np.float32))
    columns["trained"] = pa.array(trained)
    return pa.table(columns)


def _describe(rollouts: Collected, settled: Mapping[str, Settled], mixed: Mixed) -> dict[str, float]:
    """A step's metrics that are made of its summary and rewards."""
    summary = rollouts.summary
    out = dict(mixed.diagnostics)
    for name, component in settled.items():
        status = np.array(component.status)
        out[f"failures/{name}"] = int((~np.isin(status, (OK, NOT_APPLICABLE))).sum())
        out[f"not_applicable/{name}"] = int((status == NOT_APPLICABLE).sum())
    groups, digests = summary["group"].to_numpy(), summary["digest"].to_numpy()
    out["groups/drawn"] = len(np.unique(groups))
    out["completion/distinct"] = len(np.unique(np.stack([groups, digests]), axis=1).T) / len(groups)
    out["completion/length"] = float(summary["length"].to_numpy().mean())
    out["completion/stopped"] = float(np.mean(summary["finish"].to_numpy(zero_copy_only=False) == "stop"))
    return out


class _Clock:
    """Seconds of the parts of a step."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now

    def total(self) -> float:
        return time.perf_counter() - self._start


@contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """Turns a first SIGINT or SIGTERM into a question the loop asks between steps; a second one interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        # A handler may interrupt a print, and a print within a print fails.
        os.write(2, b"stopping after this step; once more to stop at once\n")

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
