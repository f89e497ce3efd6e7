"""The loop: prompts -> rollouts -> rewards -> mixture -> learner -> weights."""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rl_llm.algorithms import build_algorithm
from rl_llm.config import TOKENS, RunConfig, value_at
from rl_llm.errors import RunFailed, UserError
from rl_llm.learner.optimizer import Schedule
from rl_llm.learner.parallel import DataParallel, MakeParallel
from rl_llm.mixture import Mixed, Mixture
from rl_llm.policies import SamplingParams
from rl_llm.rewards import SCORES, Resolved, apply_failure_policies, cache_folders
from rl_llm.runs import checkpoint
from rl_llm.runs.callbacks import Callback, Callbacks
from rl_llm.runs.writer import rollout_table
from rl_llm.table import NOT_APPLICABLE, OK, REWARD, STATUS
from rl_llm.tasks import Task
from rl_llm.tasks.source import PromptSource, held_out
from rl_llm.trainer.beginning import Beginning
from rl_llm.trainer.collector import Rollouts
from rl_llm.trainer.evaluation import Evaluation, Evaluator, Progress
from rl_llm.trainer.sampler import MakeSampler, Synchronous
from rl_llm.trainer.state import Origin, TrainerState, configured, utility_weights
from rl_llm.trainer.workers import Functions, Workers

NO_STEP = -1
"""What made weights that acted, where no step of the run has."""


class Trainer:
    """One run: its workers, its state, and the loop over them. `Trainer.open` makes one.

    Attributes:
        config, path, task: the resolved config, the run directory, and the prompts.
        state: all that a checkpoint holds of it; what lives beside it, such as reward weights, is noted on saving.
        mixture: the reward weights; `mixture.set_weight` changes one between two steps.
        learning_rate: its schedule; `learning_rate.peak` may be changed between two steps.
        weights: that rollouts act with.
        evaluation: the latest one; None before the first.
        stopping: set it to have `advance` save and return after the step under way.
    """

    config: RunConfig
    path: Path
    task: Task
    state: TrainerState
    mixture: Mixture
    learning_rate: Schedule
    evaluation: Evaluation | None

    def __init__(
        self,
        config: RunConfig,
        path: Path,
        task: Task,
        workers: Workers,
        callbacks: Sequence[Callback],
        sampler: MakeSampler,
        origin: Origin,
        beginning: Beginning | None,
    ) -> None:
        self.workers, self.learner = workers, workers.learner
        self.callbacks = Callbacks(callbacks)
        self._make_sampler = sampler
        self._begin_with(config, path, task, origin, beginning)

    @classmethod
    @contextmanager
    def open(
        cls,
        config: RunConfig,
        path: Path,
        task: Task,
        base: str,
        *,
        functions: Functions | None = None,
        callbacks: Sequence[Callback] = (),
        checkpoint: Path | None = None,
        sampler: MakeSampler = Synchronous,
        parallel: MakeParallel = DataParallel,
        origin: Origin | None = None,
        beginning: Beginning | None = None,
        scores: Path | None = None,
        group: Any = None,
    ) -> Iterator["Trainer"]:
        """A trainer with its workers started and the first weights published; both end with the context.

        Args:
            path: the run directory.
            task: tokenized for the policy.
            base: folder of the policy before training.
            functions: reward functions given as they are, by component.
            checkpoint: to go on from; None begins anew.
            sampler: makes what gives each step its rollouts.
            parallel: makes how several learners go together.
            origin: what the run is made from, to be kept in its checkpoints.
            beginning: of a run from the same base, to be recorded in place of measuring it again where it serves.
            scores: where values are kept of components with `cache`; None keeps them in the run directory.
            group: room for the workers that is there already, see `Placement`.
        """
        functions, origin = functions or {}, origin or Origin()
        caches = cache_folders(scores or path / SCORES, config.measured, origin.code)
        workers = Workers(config, base, config.measured, functions, caches, parallel=parallel, group=group)
        try:
            trainer = cls(config, path, task, workers, callbacks, sampler, origin, beginning)
            trainer.learner.see(trainer.path)
            if checkpoint is None:
                trainer._publish()
            else:
                trainer.restore(checkpoint)
            yield trainer
        finally:
            workers.close()

    def _begin_with(
        self, config: RunConfig, path: Path, task: Task, origin: Origin, beginning: Beginning | None
    ) -> None:
        """Everything that is of one run, as at its beginning."""
        # Learners in other processes write here too, from wherever they run.
        self.config, self.path, self.task = config, path.absolute(), task
        self.algorithm = build_algorithm(config.algorithm)
        self.state = TrainerState.of(config, origin)
        self.mixture = Mixture(config.rewards)
        self.learning_rate = Schedule.of(config.learner, config.trainer.steps)
        self.prompts = PromptSource(task.splits["train"], config.trainer.seed)
        self.sampler = self._make_sampler(config, self.workers.collector, self.prompts, self.mixture)
        self.evaluator = Evaluator(
            config.evaluation,
            SamplingParams.of(config.rollout, 1, config.evaluation.temperature, config.trainer.seed),
            config.measured,
            self.workers.collector,
            self._note_failure,
        )
        self.evaluation = None
        self._beginning = beginning if beginning is not None and beginning.serves(config) else None
        self.stopping = self._started = False
        self._saved: int | None = None
        self._clock_start, self._seconds_before = time.monotonic(), 0.0

    def reset(
        self,
        config: RunConfig,
        path: Path,
        task: Task,
        base: str,
        functions: Functions | None = None,
        origin: Origin | None = None,
        beginning: Beginning | None = None,
        scores: Path | None = None,
    ) -> None:
        """Begin another run, on these workers; it is the run that a fresh process would make.

        Args:
            functions, origin, beginning, scores: as for `open`.

        Raises:
            UserError: the config asks for other resources.
        """
        origin = origin or Origin()
        caches = cache_folders(scores or path / SCORES, config.measured, origin.code)
        self.workers.reset(config, base, config.measured, functions or {}, caches)
        self.learner = self.workers.learner
        self._begin_with(config, path, task, origin, beginning)
        self.learner.see(self.path)
        self._publish()

    # The loop.

    def advance(self) -> bool:
        """Train up to the next evaluation, or to the end; whether there is more to do.

        Raises:
            RunFailed: the run cannot go on; the last checkpoint stands.
        """
        self.begin()
        evaluated = False
        while not (evaluated or self.over):
            self.callbacks.emit("on_step", self, self.step())
            evaluated = self._due(self.config.evaluation.every)
            if evaluated:
                self._validate()
            if self._due(self.config.checkpoint.every):
                self.save()
            self.callbacks.emit("on_recorded", self)
        over = self.over
        if over and self._saved != self.state.steps:
            self.save()
        # Not asked again: whoever asks to stop from here on is heard by the next call, and that one saves.
        return not over

    def _start(self) -> None:
        """Tell everybody, once."""
        if not self._started:
            self._started = True
            self.callbacks.emit("on_start", self)

    def step(self) -> dict[str, Any]:
        """One step: sample, score, weigh, update, publish. Returns its metrics."""
        self._start()
        step, clock = self.state.steps, _Clock()
        rollouts = self.sampler.next(step, self.weights)
        components = self.config.rewards.components
        resolved = apply_failure_policies(
            components, rollouts.scores, rollouts.prompt_ids, step + 1, self._note_failure
        )
        clock.lap("rollout")
        groups = None if self.algorithm.per_token else rollouts.groups
        mixed = self.mixture.mix(_values(resolved), groups, step, self.algorithm.scale)
        clock.lap("mixture")
        columns = _columns(resolved, mixed, _trained(mixed, rollouts), self.algorithm.per_token)
        table = rollout_table(self.path, step + 1, self.config.logging.rollouts)
        update = self.learner.update(rollouts.shards, columns, step, self.learning_rate.at(step), table)
        clock.lap("learn")
        self.state.steps += 1
        self.state.tokens_trained += int(update["tokens/trained"])
        self.state.tokens_generated += int(rollouts.summary["length"].to_numpy().sum())
        self._publish()
        clock.lap("publish")
        return {
            "step": self.state.steps,
            "temperature": value_at(self.config.rollout.temperature, step),
            **_describe(rollouts, resolved, mixed),
            **update,
            **{f"code_changes/{name}": count for name, count in self.state.origin.changed.items()},
            **_timed(rollouts, clock),
        }

    @property
    def steps_done(self) -> int:
        return self.state.steps

    @property
    def over(self) -> bool:
        """Whether no step is to follow: they are all done, the utility has stopped rising, or somebody asked."""
        return self.stopping or self.state.steps >= self.config.trainer.steps or self.exhausted

    @property
    def exhausted(self) -> bool:
        """Whether the utility has stopped rising."""
        return self.state.progress.exhausted(self.config.evaluation.patience)

    def _due(self, every: int) -> bool:
        return self.state.steps % every == 0 or self.state.steps == self.config.trainer.steps

    def _publish(self, step: int | None = None) -> None:
        """Make the learner's weights those that rollouts act with."""
        self.weights = self.workers.channel.publish(self.learner, self.state.steps if step is None else step)

    def _note_failure(self, record: dict[str, Any]) -> None:
        self.callbacks.emit("on_failure", self, record)

    # Evaluation.

    def begin(self) -> None:
        """Measure the policy before training, once: the base statistics, the first utility, and the test split."""
        self._start()
        if self.state.before:
            return
        # Of a beginning that was cut short nothing counts.
        self.state.progress, self.state.tokens_generated = Progress(), 0
        self._validate()
        self.state.before = self.test("before").line["metrics"]
        self.save()
        self.callbacks.emit("on_recorded", self)

    def _validate(self) -> None:
        evaluation = self._evaluate("tune", "validation", self.config.evaluation.prompts)
        steps = self.state.steps
        better = self.state.progress.note(evaluation.line["metrics"]["utility"]["mean"], steps)
        # The first policy is kept even without a utility: it is the best until there is another.
        if better or steps == 0:
            with checkpoint.writing(self._best(steps)) as aside:
                self.learner.save_weights(aside / "weights.safetensors")
        self.callbacks.emit("on_evaluation", self, evaluation.line)

    def test(self, label: str) -> Evaluation:
        """Evaluate on the test split and note it."""
        self._start()
        evaluation = self._evaluate("test", label, self.config.evaluation.test_prompts)
        self.callbacks.emit("on_evaluation", self, evaluation.line)
        return evaluation

    def _evaluate(self, split: str, label: str, count: int) -> Evaluation:
        state = self.state
        if self._beginning is not None and not state.before:
            # Not counted among the tokens: they were generated elsewhere.
            self.evaluation = self._beginning.evaluation(label, state.utility)
            return self.evaluation
        prompts = held_out(self.task.splits[split], count)
        self.evaluation = self.evaluator.evaluate(prompts, split, label, state.steps, self.weights, state.utility)
        state.tokens_generated += int(self.evaluation.values[TOKENS].sum())
        return self.evaluation

    # Checkpoints.

    def _best(self, step: int) -> Path:
        return self.path / "checkpoints" / "best" / checkpoint.step_name(step)

    def save(self) -> Path:
        """Write a checkpoint and clear away what no checkpoint needs any more; returns its folder."""
        self.state.seconds = self.seconds
        self.state.prompts_drawn = self.prompts.position
        self.state.mixture = self.mixture.state_dict()
        self.state.learning_rate = self.learning_rate.peak
        folder = self.path / "checkpoints" / checkpoint.step_name(self.state.steps)
        with checkpoint.writing(folder) as aside:
            self.learner.save(aside)
            self.sampler.save(aside)
            self.state.save(aside)
        checkpoint.prune(self.path / "checkpoints", self.config.checkpoint.keep)
        self._clear_best()
        self._saved = self.state.steps
        self.callbacks.emit("on_checkpoint", self, folder)
        return folder

    def _clear_best(self) -> None:
        """Drop best policies that no kept checkpoint speaks of; the first policy stays, controls start from it."""
        saved = checkpoint.by_step(self.path / "checkpoints").values()
        kept = [folder for folder in saved if checkpoint.damage(folder) is None]
        needed = {0, *(TrainerState.load(folder).progress.best_step for folder in kept)}
        for step, folder in checkpoint.by_step(self.path / "checkpoints" / "best").items():
            if step not in needed:
                shutil.rmtree(folder)

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint, this run's or another's, on the workers there are; this run's later ones go.

        What is configured otherwise here than it was there (reward weights, learning rate, KL, utility) has been given
        anew and goes before what was live there; the rest goes on as it was.

        Raises:
            UserError: it is of another version, or of another kind of policy, learner or mixture; nothing has changed.
        """
        state, config = TrainerState.load(folder), self.config
        now, then = configured(config), configured(state.run_config())
        if now["made_of"] != then["made_of"]:
            raise UserError(f"{folder} is of a run made of {then['made_of']}, and this one is made of {now['made_of']}")
        mixture = Mixture(config.rewards)
        mixture.load_state_dict(state.mixture)
        if now["utility"] != then["utility"]:
            state.change_utility(utility_weights(config))
        self._bring_best(folder, state.progress.best_step)
        for name, weight in config.rewards.weights.items():
            if now["weights"][name] != then["weights"][name]:
                mixture.set_weight(name, weight)
        self.mixture.load_state_dict(mixture.state_dict())
        given = now["learning_rate"] != then["learning_rate"]
        self.learning_rate.peak = config.learner.lr if given else state.learning_rate
        state.config, state.origin = self.state.config, self.state.origin.going_on(state.origin)
        self.workers.collector.forget()
        self.learner.load(folder)
        self.state = state
        self._seconds_before, self._clock_start = state.seconds, time.monotonic()
        self.prompts.position = state.prompts_drawn
        self.sampler.load(folder)
        for step, own in checkpoint.by_step(self.path / "checkpoints").items():
            if step > state.steps:
                shutil.rmtree(own)
        self.stopping = self._started = False
        self._saved = state.steps
        self._publish()

    def _bring_best(self, folder: Path, best: int) -> None:
        """Have the best policies that a checkpoint speaks of; they lie beside it."""
        for step in {0, best}:
            theirs, ours = folder.absolute().parent / "best" / checkpoint.step_name(step), self._best(step)
            problem = checkpoint.damage(theirs)
            if problem is not None:
                raise UserError(f"{folder} speaks of the policy {theirs}, which cannot be used: {problem}")
            if theirs != ours:
                with checkpoint.writing(ours) as aside:
                    shutil.copytree(theirs, aside, dirs_exist_ok=True)
                    (aside / checkpoint.MANIFEST).unlink()

    # The end of a run.

    def export_best(self) -> None:
        """Put the best policy's weights in place and leave it as `model/`, a folder that `transformers` loads."""
        best = self.state.progress.best_step
        problem = checkpoint.damage(self._best(best))
        if problem is not None:
            raise RunFailed(f"the best policy, {self._best(best)}, cannot be used: {problem}")
        self.learner.load_weights(self._best(best) / "weights.safetensors")
        self._publish(best)
        self._export()

    def _export(self) -> None:
        with checkpoint.writing(self.path / "model") as aside:
            self.learner.export(aside)

    def measure(self, weights: Path, label: str) -> Evaluation:
        """Evaluate other weights of this policy on the tune split, and leave them as `model/` in place of the best."""
        self.begin()
        self.learner.load_weights(weights)
        self._publish(NO_STEP)
        evaluation = self._evaluate("tune", label, self.config.evaluation.prompts)
        self.callbacks.emit("on_evaluation", self, evaluation.line)
        self._export()
        return evaluation

    def continue_warm_start(self) -> dict[str, Any]:
        """The control: supervised training from the first policy on as many tokens as the run has trained on.

        Returns test metrics, which are noted as "supervised".
        """
        self.learner.load_weights(self._best(0) / "weights.safetensors")
        self.learner.supervise(*self.task.targets(self.config.warm_start.target), self.state.tokens_trained)
        self._publish(NO_STEP)
        return self.test("supervised").line["metrics"]

    @property
    def seconds(self) -> float:
        """Time spent on the run, its earlier starts included where it was resumed."""
        return self._seconds_before + time.monotonic() - self._clock_start


def _values(resolved: Mapping[str, Resolved]) -> dict[str, np.ndarray]:
    return {name: component.values for name, component in resolved.items()}


def _trained(mixed: Mixed, rollouts: Rollouts) -> np.ndarray:
    """Rows for the learner, bool [N]: those with a reward, of groups with signal where somebody looked for it."""
    if rollouts.signal is None:
        return mixed.valid
    both = mixed.valid & rollouts.signal
    return both if both.any() else mixed.valid


def _columns(resolved: Mapping[str, Resolved], mixed: Mixed, trained: np.ndarray, outcome: bool) -> pa.Table:
    """The reward columns of the rollout table; `trained` bool [N], `outcome` where the learner makes advantages."""

    def nullable(values: np.ndarray) -> pa.Array:
        return pa.array(values.astype(np.float32), mask=np.isnan(values))

    columns: dict[str, pa.Array] = {}
    for name, component in resolved.items():
        columns[REWARD + name] = nullable(component.values)
        columns[STATUS + name] = pa.array(component.status, type=pa.string())
    columns["reward"] = nullable(mixed.reward)
    columns["advantage"] = pa.array(mixed.advantages.astype(np.float32))
    if outcome:
        columns["outcome"] = pa.array(mixed.outcome.astype(np.float32))
    columns["trained"] = pa.array(trained)
    return pa.table(columns)


def _describe(rollouts: Rollouts, resolved: Mapping[str, Resolved], mixed: Mixed) -> dict[str, float]:
    """A step's metrics that are made of its summary and rewards."""
    summary = rollouts.summary
    out = dict(mixed.diagnostics)
    for name, component in resolved.items():
        status = np.array(component.status)
        out[f"failures/{name}"] = int((~np.isin(status, (OK, NOT_APPLICABLE))).sum())
        out[f"not_applicable/{name}"] = int((status == NOT_APPLICABLE).sum())
        logged = rollouts.scores[name].logged.items()
        out |= {f"reward/{name}/extra/{key}": total / count for key, (total, count) in logged}
    groups, digests = rollouts.groups, summary["digest"].to_numpy()
    out["groups/drawn"] = len(np.unique(groups))
    out["completion/distinct"] = len(np.unique(np.stack([groups, digests]), axis=1).T) / len(groups)
    out["completion/length"] = float(summary["length"].to_numpy().mean())
    out["completion/stopped"] = float(np.mean(summary["finish"].to_numpy(zero_copy_only=False) == "stop"))
    return out


def _timed(rollouts: Rollouts, clock: "_Clock") -> dict[str, float]:
    total = clock.total()
    tokens = int(np.sum(rollouts.summary["length"].to_numpy()))
    return {
        "tokens_per_second": tokens / total,
        "time/step": total,
        **{f"time/{name}": seconds for name, seconds in clock.laps.items()},
        **{f"time/reward/{name}": scores.seconds for name, scores in rollouts.scores.items()},
    }


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
