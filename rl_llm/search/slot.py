"""What the process of a slot does: bring one trial after the other to its next evaluation, on one trainer."""

import faulthandler
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file, save_file

from rl_llm.config import RunConfig, build_config
from rl_llm.errors import RunFailed, UserError
from rl_llm.files import free_name, room_for, write_text
from rl_llm.launch.preflight import Plan, quiet_libraries
from rl_llm.launch.record import begin_record, end_record, ended_by_itself, measure_best
from rl_llm.rewards import SCORES
from rl_llm.runs import checkpoint
from rl_llm.runs.callbacks import Callback
from rl_llm.runs.jsonl import read_jsonl
from rl_llm.runs.reader import RunFiles
from rl_llm.runs.trackers import sinks
from rl_llm.runs.writer import RunWriter, evaluation_tables
from rl_llm.search.compare import mean_of
from rl_llm.search.course import Report, Role
from rl_llm.search.reader import BASE, TRIALS
from rl_llm.search.space import Point, put
from rl_llm.trainer.beginning import Beginning
from rl_llm.trainer.trainer import Trainer
from rl_llm.values import to_json

STOP = ".stop"
"""A file in a search's directory: trials stop after the step under way."""
STACK = "stack.txt"
EXPLOITED = "exploited.json"
REPORT, INTERRUPTED = "report", "interrupted"


@dataclass(frozen=True)
class Shared:
    """What all trials of a search have in common.

    Attributes:
        path: of the search, on storage that all nodes see.
        settings: of a run, plain; a trial's point goes over them.
        plan: of these settings, its task tokenized.
        base: folder of the policy before training.
        ranked: whether there is a utility.
        tokens: generated, that end a trial before its steps do; None: only these do.
        silent_s: seconds without a finished step after which a trial hangs.
    """

    path: Path
    settings: dict[str, Any]
    plan: Plan
    base: str
    ranked: bool
    tokens: int | None
    silent_s: float


@dataclass(frozen=True)
class Assignment:
    """What a slot is told of its next trial. Plain JSON.

    Attributes:
        name, role, point, seed, donor: see `Entry`.
        reported: the last step that the search knows of.
    """

    name: str
    role: Role
    point: Point
    seed: int | None = None
    donor: tuple[str, int] | None = None
    reported: int = 0


def config_of(settings: dict[str, Any], point: Point, seed: int | None) -> RunConfig:
    """The config of a trial."""
    config = build_config(put(settings, point), where="trial")
    if seed is not None:
        config.trainer.seed = seed
    return config


class Slot:
    """One trial at a time. The trainer stays from one to the next, and so do its workers.

    Args:
        group: room for the workers, see `Placement`.
    """

    def __init__(self, shared: Shared, group: Any = None) -> None:
        quiet_libraries()
        self.shared, self._group = shared, group
        self.silent = _Silent(shared.silent_s)
        self._opened = ExitStack()
        self._trainer: Trainer | None = None
        self._beginning = Beginning.of(shared.path / BASE)

    def advance(self, assignment: dict[str, Any] | None) -> dict[str, Any]:
        """Begin what is assigned, or go on with what was; returns what Tune is told.

        Returns:
            {"report": JSON of a `Report`} at an evaluation, or {"interrupted": True} where it was asked to stop; it is
            saved then.
        """
        if assignment is not None:
            self._at = Assignment(**assignment)
            self._reported = self._at.reported
        if (self.shared.path / STOP).exists():
            return {INTERRUPTED: True}
        path = self.shared.path / TRIALS / self._at.name
        path.mkdir(parents=True, exist_ok=True)
        try:
            with self.silent.watched(path / STACK), room_for(path):
                if assignment is not None:
                    self._begin(path)
                told = self._mix() if self._at.role == "soup" else self._go_on()
        except (RunFailed, UserError) as error:
            # A trainer that did not come so far is still that of another trial.
            reached = self._trainer is not None and self._trainer.path == path
            told = self._measured() if reached else Report(self._reported, 0, 0.0, [], {})
            told = replace(told, failed=str(error))
            self.close()  # the next one begins on a trainer of its own
        except BaseException:
            self.close()
            raise
        return {INTERRUPTED: True} if told is None else {REPORT: to_json(asdict(told))}

    def close(self) -> None:
        self._trainer = None
        self._opened.close()

    @property
    def trainer(self) -> Trainer:
        assert self._trainer is not None
        return self._trainer

    def _begin(self, path: Path) -> None:
        """Have the trainer stand where the trial has come to."""
        at, shared = self._at, self.shared
        point = {} if at.role == "soup" else at.point
        plan = replace(shared.plan, config=config_of(shared.settings, point, at.seed))
        own, donor = _newest(path), self._donor(path)
        found = own if donor is None else None
        made_of: dict[str, Any] = {
            "functions": plan.functions,
            "origin": plan.origin,
            "beginning": self._beginning,
            "scores": shared.path / SCORES,
        }
        if self._trainer is None:
            callbacks = [RunWriter(), _Watch(self), *sinks(plan.config.logging)]
            where: dict[str, Any] = {"callbacks": callbacks, "checkpoint": found, "group": self._group}
            opened = Trainer.open(plan.config, path, plan.task, shared.base, **where, **made_of)
            self._trainer = self._opened.enter_context(opened)
        else:
            self._trainer.reset(plan.config, path, plan.task, shared.base, **made_of)
            if found is not None:
                self._trainer.restore(found)
        begin_record(plan, path, self.trainer.callbacks.message)
        if donor is not None:
            # Saved before it is noted: a kill in between does it again.
            self.trainer.restore(donor)
            self.trainer.save()
            write_text(path / EXPLOITED, to_json(at.donor))

    def _donor(self, path: Path) -> Path | None:
        """The checkpoint of another trial to go on from; None where there is none, or the trial has done so already."""
        at = self._at
        if at.donor is None:
            return None
        name, step = at.donor
        noted = path / EXPLOITED
        if noted.is_file() and json.loads(noted.read_text()) == [name, step]:
            return None
        theirs = checkpoint.by_step(self.shared.path / TRIALS / name / "checkpoints")
        # It may have gone on, and kept a later one.
        for folder in (folder for at, folder in theirs.items() if at >= step and checkpoint.damage(folder) is None):
            return folder
        raise RunFailed(f"{name}, which this trial goes on from, has no whole checkpoint of step {step} or later")

    def _go_on(self) -> Report | None:
        """What the trial tells at its next evaluation; None where it was asked to stop before that."""
        trainer = self.trainer
        # A trial that was killed may have evaluated what it has not told yet.
        if not self._evaluated:
            trainer.advance()
            if not self._evaluated:
                return None
        report = replace(self._measured(), ended=self._ended())
        if report.ended:
            self._finish(ended_by_itself(trainer) if report.ended == "stopped_early" else {"status": "finished"})
        self._reported = report.step
        return report

    @property
    def _evaluated(self) -> bool:
        """Whether the trial stands at an evaluation that the search does not know of."""
        step = self.trainer.steps_done
        return step > self._reported and ("validation", step) in evaluation_tables(self.trainer.path)

    def _ended(self) -> str:
        trainer, tokens = self.trainer, self.shared.tokens
        spent = tokens is not None and trainer.state.tokens_generated >= tokens
        if spent or trainer.steps_done >= trainer.config.trainer.steps:
            return "finished"
        return "stopped_early" if trainer.exhausted else ""

    def _measured(self, label: str = "validation") -> Report:
        """What there is to be told now, as it lies on disk."""
        trainer = self.trainer
        step, tokens, path = trainer.steps_done, trainer.state.tokens_generated, trainer.path
        if (label, step) not in evaluation_tables(path):
            return Report(step, tokens, trainer.seconds, [], {})
        table = RunFiles(path).evaluated(label, step)
        values = {name: table[name].to_pylist() for name in table.column_names if name != "prompt_id"}
        lines = [line for line in read_jsonl(path / "metrics.jsonl") if self._reported < line["step"] <= step]
        return Report(
            step,
            tokens,
            trainer.seconds,
            values["utility"] if self.shared.ranked else [],
            {name: mean_of(column) for name, column in values.items()},
            [line["reward/mean"] for line in lines if line.get("reward/mean") is not None],
        )

    def _finish(self, end: dict[str, str]) -> None:
        """Leave what a single run leaves; a trial of the search does not look at the test split."""
        summary: dict[str, Any] = {"status": "failed", "reason": "", "controls": {}}
        if self._at.role == "trial":
            self.trainer.export_best()
        else:
            summary["after"] = measure_best(self.trainer)
        self._record(summary | end)

    def _record(self, summary: dict[str, Any]) -> None:
        problem = end_record(self.trainer, summary, self.trainer.callbacks.message)
        if problem is not None:
            raise problem

    def _mix(self) -> Report:
        """A rewarded soup (arXiv 2306.04488): weights that lie between those of finished trials."""
        trainer = self.trainer
        mixed: dict[str, torch.Tensor] = {}
        for name, share in self._at.point.items():
            run = RunFiles(self.shared.path / TRIALS / name)
            best = run.path / "checkpoints" / "best" / checkpoint.step_name(run.summary["best_step"])
            for key, tensor in load_file(best / "weights.safetensors").items():
                mixed[key] = mixed.get(key, 0) + share * tensor.float()
        file = trainer.path / "mixed.safetensors"
        save_file(mixed, file)
        trainer.measure(file, "soup")
        file.unlink()
        self._record({"status": "finished", "reason": "", "controls": {}})
        return replace(self._measured("soup"), ended="finished")


class _Silent:
    """Ends the process where nothing is heard of it for some seconds, and leaves in a file where it stood.

    It also works where a library holds Python's lock.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._file: IO[str] | None = None

    @contextmanager
    def watched(self, path: Path) -> Iterator[None]:
        try:
            with path.open("w") as self._file:
                self.heard()
                yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            self._file = None
            path.unlink(missing_ok=True)

    def heard(self) -> None:
        if self._file is not None:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._file)


class _Watch(Callback):
    """Hears of every step, and has the trainer stop after it where somebody asks."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot

    def on_step(self, trainer: Any, metrics: dict[str, Any]) -> None:
        self._slot.silent.heard()
        if (self._slot.shared.path / STOP).exists():
            trainer.stopping = True

    def on_evaluation(self, trainer: Any, evaluation: dict[str, Any]) -> None:
        self._slot.silent.heard()


def _newest(path: Path) -> Path | None:
    """The checkpoint to go on from; those that cannot be used are put aside."""
    found, refused = checkpoint.find(path / "checkpoints")
    for folder, _ in refused:
        folder.rename(free_name(folder.with_name(f"refused-{folder.name}")))
    return found
