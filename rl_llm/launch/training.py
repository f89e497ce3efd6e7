"""A whole run: checks, warm start, training, the best policy, controls, summary and report."""

import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from rl_llm.config import IMPORTS, PROBE, VERSIONS, RunConfig
from rl_llm.errors import Interrupted, RunFailed
from rl_llm.files import room_for, write_text
from rl_llm.imports import places
from rl_llm.launch.alone import one_at_a_time
from rl_llm.launch.controls import constant_reward
from rl_llm.launch.origin import model_digests
from rl_llm.launch.preflight import Plan, describe, load_tokenizer, make_plan
from rl_llm.launch.resume import complete, open_directory, refuse_foreign, refuse_other_base
from rl_llm.launch.signals import stop_between_steps, terminable
from rl_llm.launch.warm_start import ensure_base, needs_base
from rl_llm.policies import policy_class
from rl_llm.process import absolute, own_modes
from rl_llm.runs.callbacks import Callback, Callbacks
from rl_llm.runs.console import Console, make_console
from rl_llm.runs.directory import locked
from rl_llm.runs.output import shielded
from rl_llm.runs.run import Run
from rl_llm.runs.trackers import sinks
from rl_llm.runs.writer import RunWriter, write_summary
from rl_llm.runtime import connected
from rl_llm.tasks import Task, describe_bad_rows
from rl_llm.trainer.trainer import Trainer
from rl_llm.values import to_json

LIBRARIES = ("rl-llm", "torch", "transformers", "ray", "sacrebleu", "pyarrow", "numpy")


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
    base = ensure_base(config, plan.task, followers.message)
    if needs_base(config) and (config.policy.trainable != "all" or config.algorithm.kl.coef):
        plan.origin.base = model_digests(base)
        if checkpoint is not None:
            refuse_other_base(path, base, checkpoint, plan.origin)
    if config.policy.model is None:
        plan.task.tokenize(load_tokenizer(base), policy_class(config.policy).continues)
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
        _write_config(plan, path)
        # One of an earlier start would say of a run under way that it had ended.
        (path / "summary.json").unlink(missing_ok=True)
        _note_bad_rows(plan.task, path, followers)
        try:
            _train(trainer, summary)
        finally:
            summary |= {
                "steps": trainer.steps_done,
                "best_step": trainer.state.progress.best_step,
                "before": trainer.state.before,
                "bad_rows": len(plan.task.bad_rows),
                "restarts": trainer.workers.restarts(),
                "seconds": trainer.seconds,
            }
            # The directory is left complete, however the run ended and whoever else fails.
            write_summary(path, summary)
            problem = trainer.callbacks.end(trainer, summary)
            _report(path, followers)
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
        _report(path, followers)
    return Run(path)


def _report(path: Path, followers: Callbacks) -> None:
    """A run is what it is without its report too."""
    try:
        Run(path).report()
    except Exception as error:
        followers.message(f"no report.html: {type(error).__name__}: {error}; make it with: rl-llm report {path}")


def _train(trainer: Trainer, summary: dict[str, Any]) -> None:
    """From where the trainer is to the end, its last evaluations included; fills the summary as far as it comes."""
    try:
        with room_for(trainer.path):
            with stop_between_steps(trainer):
                while trainer.advance():
                    pass
            if trainer.stopping:
                raise Interrupted("stopped and saved")
            trainer.export_best()
            summary["after"] = trainer.test("after").line["metrics"]
            if "supervised" in trainer.config.evaluation.controls:
                trainer.callbacks.message("control: continued supervised warm start on the same number of tokens")
                summary["controls"]["supervised"] = trainer.continue_warm_start()
        summary["status"] = "finished"
        if trainer.steps_done < trainer.config.trainer.steps:
            summary["status"] = "stopped_early"
            summary["reason"] = f"no better utility in {trainer.config.evaluation.patience} validations"
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


def _note_bad_rows(task: Task, path: Path, followers: Callbacks) -> None:
    rows = [asdict(bad) for bad in task.bad_rows]
    write_text(path / "bad_rows.jsonl", "".join(to_json(row) + "\n" for row in rows))
    if rows:
        followers.message(f"bad rows   {describe_bad_rows(task.bad_rows)}; all in {path / 'bad_rows.jsonl'}")


def _write_config(plan: Plan, path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
    notes = {VERSIONS: versions, IMPORTS: places(), PROBE: asdict(plan.probe) if plan.probe else None}
    write_text(path / "config.yaml", plan.config.to_yaml() + yaml.safe_dump(notes, sort_keys=False))
