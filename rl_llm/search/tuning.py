"""A course on Ray Tune: Tune has slots, their placement groups and their processes; the course decides who is in them.

A Tune trial is one stretch of a trial of ours, from where that was to where it waits, is cut or ends; the next stretch
is another Tune trial. So nothing is paused, restored or retried by Tune: checkpoints are the trials' own, and decisions
stand in the ledger. A slot whose stretch is over stays as it is, until another takes it or nothing is left to do: Tune
would end all but one of several processes that wait, and would not notice the death of that one.
"""

import json
import logging
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray.cloudpickle
import ray.exceptions
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from rl_llm.files import write_text
from rl_llm.runtime.actor import reason_of
from rl_llm.search.course import Course, Entry, Report
from rl_llm.search.reader import TRIALS
from rl_llm.search.slot import INTERRUPTED, REPORT, STACK, STOP

STORAGE = ".tune"
CRASH = "crash.txt"
ANSI = re.compile(r"\x1b\[\d*m")

# Our own signal handlers and console are in force; trials stay in the folder that users started in.
SETTINGS = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000000",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


class Slots:
    """Who is in which slot. Tune's two plug-ins below ask it.

    Args:
        path: of the search.
        concurrent: trials at once.
        max_failures: times that a trial is tried again.
        wait_s: seconds to wait for the room of a slot while another one is idle.
        follow: is called with a trial's name after each of its reports and failures.
    """

    def __init__(
        self,
        course: Course,
        path: Path,
        concurrent: int,
        max_failures: int,
        wait_s: float,
        follow: Callable[[str], None],
    ) -> None:
        self.course, self.path, self.follow = course, path, follow
        self.concurrent, self.max_failures, self.wait_s = concurrent, max_failures, wait_s
        self.controller: Any = None
        self._under_way: dict[str, tuple[str, float]] = {}  # by Tune's id: our trial, and since when
        self._idle: list[TuneTrial] = []
        self._handed_on = False
        self._stopping = False

    @property
    def stopping(self) -> bool:
        """Set it to have all trials save and stop after the step under way."""
        return self._stopping

    @stopping.setter
    def stopping(self, asked: bool) -> None:
        self._stopping = asked
        (self.path / STOP).touch()

    @property
    def _waiting(self) -> list[Entry]:
        """Trials that nobody works on, the most urgent first."""
        busy = {name for name, _ in self._under_way.values()}
        return [entry for entry in self.course.going if entry.name not in busy]

    def next(self, id: str) -> dict[str, Any] | None:
        """What a new Tune trial is to do; None for nothing now, {} for never again."""
        if self._stopping or self.course.over:
            if self._under_way:
                return None
            self._free(len(self._idle))
            return {}
        waiting = self._waiting
        # Tune keeps one process at a time for whoever comes next.
        if not waiting or self._handed_on:
            return None
        if self._idle:
            self._free(1)
            self._handed_on = True
        elif len(self._under_way) >= self.concurrent:
            return None
        entry = waiting[0]
        self._under_way[id] = entry.name, time.monotonic()
        return {"assignment": json.dumps(_assignment(entry))}

    def told(self, trial: TuneTrial, result: dict[str, Any]) -> bool:
        """Take what a trial tells at its evaluation; whether it goes on in its slot at once."""
        id = trial.trial_id
        name, since = self._under_way.pop(id)
        if result.get(INTERRUPTED):
            self._stopping = True
        else:
            self.course.report(name, Report(**json.loads(result[REPORT])))
            self.follow(name)
        if not self._stopping and self._goes_on(self.course.entries[name]):
            self._under_way[id] = name, since
            return True
        self._idle.append(trial)
        return False

    def _goes_on(self, entry: Entry) -> bool:
        """Whether a trial that has just told of itself keeps its slot; not where it has to begin elsewhere, nor where
        more urgent ones need the slot."""
        if entry.state != "going" or entry.donor is not None:
            return False
        ahead = [other.name for other in self._waiting].index(entry.name)
        return ahead <= self.concurrent - len(self._under_way) - 1

    def failed(self, trial: TuneTrial) -> None:
        """A trial's process has died, or raised."""
        self._idle = [other for other in self._idle if other.trial_id != trial.trial_id]
        if trial.trial_id in self._under_way:
            name, _ = self._under_way.pop(trial.trial_id)
            self.fail(name, self._reason(trial, self.path / TRIALS / name))

    def fail(self, name: str, reason: str) -> None:
        self.course.fail(name, reason, again=self.course.entries[name].failures < self.max_failures)
        self.follow(name)

    def _reason(self, trial: TuneTrial, path: Path) -> str:
        stack = path / STACK
        if stack.is_file() and stack.stat().st_size:
            kept = stack.rename(path / f"hang-{STACK}")
            return f"nothing was heard of it for too long (silent_s); where it stood is in {kept}"
        try:
            # As Tune has just put it down, in this process.
            error = ray.cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
        except (OSError, TypeError):
            return "its process has ended"
        raised = isinstance(error, ray.exceptions.RayTaskError)
        path.mkdir(parents=True, exist_ok=True)
        write_text(path / CRASH, ANSI.sub("", str(error)) + "\n")
        return f"{reason_of(error.cause if raised else error)}; more in {path / CRASH}"

    def each_round(self, controller: Any) -> None:
        """Before Tune starts what it has to start."""
        self.controller, self._handed_on = controller, False
        waiting = {trial.trial_id for trial in controller.get_trials() if trial.status == TuneTrial.PENDING}
        since = [since for id, (_, since) in self._under_way.items() if id in waiting]
        # Others have the room that was counted on: who has come to a halt gives it to who waits for it.
        if self._idle and since and time.monotonic() - min(since) > self.wait_s:
            self._free(1)

    def _free(self, count: int) -> None:
        """End Tune trials whose slots are idle; their processes are there for the next ones."""
        for _ in range(count):
            self.controller.stop_trial(self._idle.pop(0))

    def abandon(self) -> list[str]:
        """End all processes at once, and give back their room; returns the trials that were under way."""
        controller = getattr(self.controller, "_tune_controller", self.controller)
        if controller is not None and ray.is_initialized():
            # Its own way of ending waits for each of them first.
            controller._actor_manager.cleanup()
        names = [name for name, _ in self._under_way.values()]
        self._under_way, self._idle, self.controller = {}, [], None
        return names


class _Plugin:
    """Tune pickles whom it works with, beside its checkpoints. Nobody reads that."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Proposer(_Plugin, Searcher):
    """Tune's search algorithm."""

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self._slots = slots

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        found = self._slots.next(trial_id)
        return str(Searcher.FINISHED) if found == {} else found

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The course knows."""

    def save(self, checkpoint_path: str) -> None:
        """Everything stands in the ledger."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing was saved."""


class Decider(_Plugin, TrialScheduler):
    """Tune's scheduler."""

    supports_buffered_results = False

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self._slots = slots

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        self._slots.controller = tune_controller

    def choose_trial_to_run(self, tune_controller: Any) -> None:
        self._slots.each_round(tune_controller)

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        goes_on = self._slots.told(trial, result)
        return str(TrialScheduler.CONTINUE if goes_on else TrialScheduler.NOOP)

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        self._slots.failed(trial)

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        """The course knows."""

    def on_trial_remove(self, tune_controller: Any, trial: TuneTrial) -> None:
        """The course knows."""

    def debug_string(self) -> str:
        return "rl-llm"


def _assignment(entry: Entry) -> dict[str, Any]:
    """An `Assignment`."""
    kept = {key: getattr(entry, key) for key in ("name", "role", "point", "seed", "donor")}
    reported = entry.reports[-1].step if entry.reports else 0
    return {**kept, "reported": reported}


def run_on_tune(slots: Slots, trainable: Any, room: list[dict[str, float]]) -> None:
    """Run a course to its end, or until somebody asks to stop.

    Args:
        trainable: a class made from `tune.Trainable`.
        room: what a slot asks for; the first bundle is for the trial's own process.
    """
    with _settings(slots.concurrent):
        while not (slots.course.over or slots.stopping):
            try:
                _tuner(slots, trainable, room).fit()
            except Exception as error:
                # Whatever has brought Tune down was with those that it had started.
                lost = slots.abandon()
                if not lost:
                    raise
                for name in lost:
                    slots.fail(name, reason_of(error))
            except BaseException:
                slots.abandon()
                raise
            finally:
                shutil.rmtree(slots.path / STORAGE, ignore_errors=True)


def _tuner(slots: Slots, trainable: Any, room: list[dict[str, float]]) -> tune.Tuner:
    return tune.Tuner(
        tune.with_resources(trainable, tune.PlacementGroupFactory(room)),
        tune_config=tune.TuneConfig(
            search_alg=Proposer(slots),
            scheduler=Decider(slots),
            num_samples=-1,
            reuse_actors=True,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name=STORAGE,
            storage_path=str(slots.path),
            failure_config=tune.FailureConfig(max_failures=0),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )


def _name(trial: TuneTrial) -> str:
    return str(trial.trial_id)


@contextmanager
def _settings(concurrent: int) -> Iterator[None]:
    """Tune's settings that only the environment has, and silence."""
    wanted = {**SETTINGS, "TUNE_MAX_PENDING_TRIALS_PG": str(concurrent)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    handler = signal.getsignal(signal.SIGUSR1)
    try:
        yield
    finally:
        with suppress(ValueError, TypeError):  # in a thread nobody can set one, and Tune has not
            signal.signal(signal.SIGUSR1, handler)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
