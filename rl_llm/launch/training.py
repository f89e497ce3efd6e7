"""A whole run: checks, warm start, training, the best policy, controls, summary and report."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rl_llm.config import RunConfig
from rl_llm.errors import Interrupted, RunFailed
from rl_llm.files import room_for
from rl_llm.launch.alone import one_at_a_time
from rl_llm.launch.controls import constant_reward
from rl_llm.launch.preflight import Plan, describe, make_plan
from rl_llm.launch.record import begin_record, end_record, ended_by_itself, measure_best, prepare_base, reporting
from rl_llm.launch.resume import complete, open_directory, refuse_foreign
from rl_llm.launch.signals import stop_between_steps, terminable
from rl_llm.process import absolute, own_modes
from rl_llm.runs.callbacks import Callback, Callbacks
from rl_llm.runs.console import Console, make_console
from rl_llm.runs.directory import locked
from rl_llm.runs.output import shielded
from rl_llm.runs.run import Run
from rl_llm.runs.trackers import sinks
from rl_llm.runs.writer import RunWriter, write_summary
from rl_llm.runtime import connected
from rl_llm.tasks import Task
from rl_llm.trainer.trainer import Trainer


@one_at_a_time
@own_modes()
@shielded()
def run_training(
    config: RunConfig,
    path: Path,
    *,
    resume: bool = False,
    functions: Mapping[str, Callable[..., Any]] | None = None,
    task: Task | None = None,
    callbacks: Sequence[Callback] = (),
    console: Console | None = None,
) -> Run:
    """Train as configured into the run directory `path` and return the finished run.

    Args:
        resume: go on from the directory's newest whole checkpoint; begin where there is none.
        functions: reward functions given as they are, by component.
        task: prompts made already, in place of `config.task`.
        callbacks: beside those that `logging` asks for.

    Raises:
        UserError: something has to be changed first; nothing was started.
        RunFailed: the run could not go on. `summary.json` has the reason.
        Interrupted: SIGINT or SIGTERM; resume to go on.
    """
    path = absolute(path)
    console = console or make_console()
    # The record is written before anybody is told.
    followers = Callbacks([RunWriter(), console, *sinks(config.logging), *callbacks])
    plan = make_plan(config, functions or {}, task)
    refuse_foreign(path)
    try:
        with room_for(path), locked(path):
            checkpoint = open_directory(plan, path, resume, followers.message)
            if resume and complete(path, config, checkpoint):
                followers.message(f"{path} is complete already")
                return Run(path)
            with connected(config.resources), terminable():
                return _run(plan, path, checkpoint, followers)
    finally:
        console.close()


def _run(plan: Plan, path: Path, checkpoint: Path | None, followers: Callbacks) -> Run:
    config = plan.config
    for line in describe(plan):
        followers.message(line)
    base = prepare_base(plan, path, checkpoint, followers.message)
    summary: dict[str, Any] = {"status": "failed", "reason": "", "controls": {}}
    opened = Trainer.open(
        config,
        path,
        plan.task,
        base,
        functions=plan.functions,
        callbacks=followers.members,
        checkpoint=checkpoint,
        origin=plan.origin,
    )
    with opened as trainer:
        begin_record(plan, path, followers.message)
        try:
            _train(trainer, summary)
        finally:
            problem = end_record(trainer, summary, followers.message)
            if problem is not None and sys.exception() is None:
                raise problem
    if "constant_reward" in config.evaluation.controls:
        followers.message("control: reinforcement learning with a constant reward")
        control = run_training(
            constant_reward(config, trainer.state.utility.weights),
            path / "controls" / "constant_reward",
            resume=True,
            functions=plan.functions,
            task=plan.task,
            console=Console(),
        )
        measured = control.summary["after"]
        summary["controls"]["constant_reward"] = {name: measured[name] for name in summary["after"]}
        write_summary(path, summary)
        with reporting(path, followers.message):
            Run(path).report()
    return Run(path)


def _train(trainer: Trainer, summary: dict[str, Any]) -> None:
    """From where the trainer is to the end, its last evaluations included; fills the summary as far as it comes."""
    try:
        with room_for(trainer.path):
            with stop_between_steps(trainer):
                while trainer.advance():
                    pass
            if trainer.stopping:
                raise Interrupted("stopped and saved")
            summary["after"] = measure_best(trainer)
            if "supervised" in trainer.config.evaluation.controls:
                trainer.callbacks.message("control: continued supervised warm start on the same number of tokens")
                summary["controls"]["supervised"] = trainer.continue_warm_start()
        summary |= ended_by_itself(trainer)
    except Interrupted:
        summary["status"], summary["reason"] = "interrupted", "asked to stop"
        trainer.export_best()
        raise
    except KeyboardInterrupt:
        summary["status"], summary["reason"] = "interrupted", "stopped at once; the last checkpoint stands"
        raise Interrupted("stopped at once, with the last checkpoint kept") from None
    except RunFailed as error:
        summary["reason"] = str(error)
        raise
    except BaseException as error:
        summary["reason"] = f"{type(error).__name__}: {error}"
        raise
