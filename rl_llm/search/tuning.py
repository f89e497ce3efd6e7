"""A course on Ray Tune: Tune starts, pauses and retries trials in their slots, the course decides which.

Two adapters stand between them: Tune asks its search algorithm for the next trial, and its scheduler what becomes of
one that has reported. Both answer with what the course says. Tune keeps nothing that we need: checkpoints are the
trials' own, and decisions stand in the ledger, so neither its checkpoints nor its `Tuner.restore` have a part in this.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray.cloudpickle
import ray.exceptions
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from rl_llm.runtime.actor import reason_of
from rl_llm.search.course import OVER, Course, Entry, Report

STORAGE = ".tune"
REPORT, INTERRUPTED = "report", "interrupted"

# Our own signal handlers and console are in force; trials stay in the folder that users started in.
SETTINGS = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000000",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


class Slots:
    """What both adapters share: the course, and Tune's trials by the name of ours.

    Args:
        concurrent: trials at once.
        max_failures: times that a trial is tried again.
        assign: what a trial's process is told of it, plain values.
        follow: is called after each report and failure, with the trial's name.
    """

    def __init__(
        self,
        course: Course,
        concurrent: int,
        max_failures: int,
        assign: Callable[[Entry], dict[str, Any]],
        follow: Callable[[str], None],
    ) -> None:
        self.course, self.concurrent, self.max_failures = course, concurrent, max_failures
        self.assign, self.follow = assign, follow
        self.trials: dict[str, TuneTrial] = {}
        self.stopping = False

    @property
    def free(self) -> int:
        busy = sum(trial.status in (TuneTrial.PENDING, TuneTrial.RUNNING) for trial in self.trials.values())
        return self.concurrent - busy

    def first_idle(self) -> Entry | None:
        """The most urgent trial that nobody works on, None where there is none or no slot is free."""
        if self.stopping or self.free <= 0:
            return None
        for entry in self.course.going:
            trial = self.trials.get(entry.name)
            if trial is None or trial.status == TuneTrial.PAUSED:
                return entry
        return None

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles whom it works with, beside its checkpoints. Nobody reads that.
        return {}


class Proposer(Searcher):
    """The search algorithm: Tune's next trial is the course's most urgent one that has not been started."""

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self.slots = slots

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.slots.stopping or self.slots.course.over:
            return str(Searcher.FINISHED)
        entry = self.slots.first_idle()
        # A paused trial is not suggested again, and no other one takes its slot.
        return None if entry is None or entry.name in self.slots.trials else self.slots.assign(entry)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The scheduler has told the course already."""

    def save(self, checkpoint_path: str) -> None:
        """Everything stands in the ledger."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing was saved."""


class Decider(TrialScheduler):
    """The scheduler: hands reports to the course, and has Tune do what it decides."""

    supports_buffered_results = False

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self.slots = slots

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        self.slots.trials[trial.config["name"]] = trial

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrial | None:
        entry = self.slots.first_idle()
        trial = None if entry is None else self.slots.trials.get(entry.name)
        if entry is not None and trial is not None:
            trial.set_config(self.slots.assign(entry))
        return trial

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        name = trial.config["name"]
        if result.get(INTERRUPTED):
            self.slots.stopping = True
            return str(TrialScheduler.STOP)
        state = self.slots.course.report(name, Report(**json.loads(result[REPORT])))
        self.slots.follow(name)
        self._end_paused(tune_controller)
        if state in OVER:
            return str(TrialScheduler.STOP)
        if state == "going" and self.slots.course.entries[name].donor is None:
            return str(TrialScheduler.CONTINUE)
        # Without a checkpoint of Tune's: the trial's own is on disk.
        tune_controller.pause_trial(trial, should_checkpoint=False)
        return str(TrialScheduler.NOOP)

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        name, again = trial.config["name"], trial.should_recover()
        self.slots.course.fail(name, _reason(trial), again)
        self.slots.follow(name)
        self._end_paused(tune_controller)

    def _end_paused(self, tune_controller: Any) -> None:
        """Have Tune know of trials that were cut while they waited."""
        for name, trial in self.slots.trials.items():
            if trial.status == TuneTrial.PAUSED and self.slots.course.entries[name].state in OVER:
                tune_controller.stop_trial(trial)

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        """Its report has said so."""

    def on_trial_remove(self, tune_controller: Any, trial: TuneTrial) -> None:
        """The course has decided so."""

    def debug_string(self) -> str:
        return "rl-llm"


def _reason(trial: TuneTrial) -> str:
    """Why a trial has crashed, in a line."""
    try:
        # As Tune has just put it down, in this process; the synced copy may not be there yet.
        error = ray.cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    except (OSError, TypeError):
        return "its process has ended"
    return reason_of(error.cause if isinstance(error, ray.exceptions.RayTaskError) else error)


def run_on_tune(slots: Slots, trainable: Any, room: tune.PlacementGroupFactory, folder: Path) -> None:
    """Run a course to its end, or until somebody asks to stop.

    Args:
        trainable: a class made from `tune.Trainable`.
        room: what a trial asks for; the first bundle is for its own process.
        folder: of the search; on storage that all nodes share.
    """
    tuner = tune.Tuner(
        tune.with_resources(trainable, room),
        tune_config=tune.TuneConfig(
            search_alg=Proposer(slots), scheduler=Decider(slots), num_samples=-1, reuse_actors=True
        ),
        run_config=tune.RunConfig(
            name=STORAGE,
            storage_path=str(folder),
            failure_config=tune.FailureConfig(max_failures=slots.max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )
    with _settings():
        try:
            tuner.fit()
        finally:
            shutil.rmtree(folder / STORAGE, ignore_errors=True)


@contextmanager
def _settings() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in SETTINGS}
    os.environ.update(SETTINGS)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
