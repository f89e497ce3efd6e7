"""A whole run: checks, warm start, training, the best policy, controls, summary and report."""

import os
import platform
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from transformers.utils import logging as transformers_logging

from rl_llm.config import VERSIONS, RunConfig, build_config
from rl_llm.errors import RunFailed, UserError
from rl_llm.launch.preflight import Plan, describe, load_tokenizer, make_plan
from rl_llm.launch.warm_start import BaseBuilder, base_path, build_base, needs_base
from rl_llm.runs import checkpoint
from rl_llm.runs.callbacks import Callback
from rl_llm.runs.console import Console, make_console
from rl_llm.runs.jsonl import to_json
from rl_llm.runs.run import Run
from rl_llm.runs.trackers import sinks
from rl_llm.runtime.pool import Factory, Pool, connected
from rl_llm.tasks import Task, describe_bad_rows
from rl_llm.trainer.evaluation import Progress
from rl_llm.trainer.trainer import Interrupted, Trainer

# What may differ between a run and its resumption: none of it changes what a step is made of, save weights, which are
# meant to be changed, and the number of steps where the learning rate follows it.
MAY_CHANGE = (
    *(f"evaluation.{key}" for key in ("every", "patience", "samples", "controls")),
    *("checkpoint", "logging", "resources", "rewards.weights", "trainer.steps"),
)
# Floats follow the number of threads.
MAY_NOT_CHANGE = ("resources.threads",)
LIBRARIES = ("rl-llm", "torch", "transformers", "ray", "sacrebleu", "pyarrow", "numpy")


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
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    console = console or make_console()
    all_callbacks = [*sinks(config.logging), *callbacks]
    plan = make_plan(config, functions or {}, task)
    state = _open_directory(config, path, resume, console)
    if resume and _complete(path, config, state):
        console.message(f"{path} is complete already")
        return Run(path)
    try:
        with connected(config.resources), _terminable():
            return _run(plan, path, state, all_callbacks, console)
    finally:
        console.close()


def _run(plan: Plan, path: Path, state: Path | None, callbacks: Sequence[Callback], console: Console) -> Run:
    config = plan.config
    console.start(describe(plan), config.trainer.steps, checkpoint.load_state(state)["steps_done"] if state else 0)
    base = ensure_base(config, plan.task, console)
    if config.policy.model is None:
        plan.task.tokenize(load_tokenizer(base))
    trainer = Trainer(config, path, plan.task, base, plan.functions, callbacks, console, state)
    _write_config(config, path)
    # One of an earlier start would say of a run under way that it had ended.
    (path / "summary.json").unlink(missing_ok=True)
    _note_bad_rows(plan.task, path, console)
    summary: dict[str, Any] = {"status": "failed", "reason": "", "controls": {}}
    try:
        status = trainer.fit()
        trainer.export_best()
        summary["after"] = trainer.test("after").line["metrics"]
        if "supervised" in config.evaluation.controls:
            console.message("control: continued supervised warm start on the same number of tokens")
            summary["controls"]["supervised"] = trainer.continue_warm_start()
        summary["status"] = status
        if status == "stopped_early":
            summary["reason"] = f"no better utility in {config.evaluation.patience} validations"
    except Interrupted:
        summary["status"], summary["reason"] = "interrupted", "asked to stop"
        trainer.export_best()
        raise
    except KeyboardInterrupt:
        summary["status"], summary["reason"] = "interrupted", "stopped at once; the last checkpoint stands"
        raise Interrupted from None
    except RunFailed as error:
        summary["reason"] = str(error)
        raise
    except BaseException as error:
        summary["reason"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        summary |= {
            "steps": trainer.steps_done,
            "best_step": trainer.progress.best_step,
            "before": trainer.before,
            "bad_rows": len(plan.task.bad_rows),
            "restarts": trainer.crew.restarts(),
            "seconds": trainer.seconds,
        }
        _finish(trainer, summary)
    if "constant_reward" in config.evaluation.controls:
        console.message("control: reinforcement learning with a constant reward")
        folder = path / "controls" / "constant_reward"
        settings = constant_reward(config, trainer.utility.weights)
        control = run_training(
            settings, folder, resume=True, functions=plan.functions, task=plan.task, console=Console()
        )
        measured = control.summary["after"]
        summary["controls"]["constant_reward"] = {name: measured[name] for name in summary["after"]}
        trainer.journal.summary(summary)
        Run(path).report()
    return Run(path)


def _finish(trainer: Trainer, summary: dict[str, Any]) -> None:
    """Leave the directory complete, however the run ended."""
    try:
        trainer.journal.summary(summary)
        for callback in trainer.started:
            callback.on_end(trainer, summary)
    finally:
        trainer.close()
    Run(trainer.path).report()


def ensure_base(config: RunConfig, task: Task, console: Console) -> str:
    """The folder (or Hub name) of the policy before reinforcement learning, warm-started if that is not cached."""
    if not needs_base(config):
        assert config.policy.model is not None
        return config.policy.model
    folder = base_path(config, task)
    if folder.is_dir():
        console.message(f"warm start: found in the cache, {folder}")
    elif config.resources.num_learners == 0:
        build_base(config, task, folder, console.message)
    else:
        console.message("warm start: under way with the learner's resources")
        resources = config.resources
        room = {"num_cpus": resources.num_cpus_per_learner, "num_gpus": resources.num_gpus_per_learner}
        builder = Pool("warm start", Factory(BaseBuilder, (), resources.threads, lambda index: room), 1, max_attempts=1)
        try:
            builder.call("build", config, task, folder)
        finally:
            builder.close()
    return str(folder)


def constant_reward(config: RunConfig, utility: dict[str, float]) -> RunConfig:
    """The same run with nothing to learn from: a constant reward, measured by the same metrics and utility."""
    measured = {name: component.model_copy(update={"gate": None}) for name, component in config.measured.items()}
    raw = config.model_dump(mode="json", by_alias=True)
    raw["rewards"] |= {"components": {"constant_control": {"use": "constant"}}, "weights": {}}
    raw["evaluation"] |= {
        "metrics": {name: component.model_dump(mode="json") for name, component in measured.items()},
        "utility": utility,
        "controls": [],
        "patience": None,
        "every": config.trainer.steps,
    }
    raw["checkpoint"]["every"] = config.trainer.steps
    # No group will ever have signal: drawing others would only take longer.
    raw["algorithm"]["resample"] = 0
    raw["logging"] |= {"rollouts": 0, "tensorboard": False, "wandb_project": None, "mlflow_experiment": None}
    return build_config(raw)


def _open_directory(config: RunConfig, path: Path, resume: bool, console: Console) -> Path | None:
    """The checkpoint to go on from, or None to begin. Raises `UserError` where the directory holds another run."""
    if not (path / "config.yaml").is_file():
        # A run killed while it made its directory has left nothing worth keeping.
        unborn = {"rollouts", "metrics.jsonl", "eval.jsonl", "failures.jsonl", ".config.yaml.partial"}
        if path.exists() and not (path.is_dir() and {entry.name for entry in path.iterdir()} <= unborn):
            raise UserError(f"--output {path} exists and is no run directory; name another one")
        return None
    if not resume:
        raise UserError(f"{path} holds a run already; add --resume to go on with it, or name another --output")
    _refuse_changes(Run(path).config, config, path)
    state, refused = checkpoint.find(path / "checkpoints")
    for folder, problem in refused:
        console.message(f"checkpoint {folder.name} is refused: {problem}")
        folder.rename(folder.with_name(f"refused-{folder.name}"))
    if state is None:
        console.message(f"{path} has no whole checkpoint; beginning anew")
    return state


def _refuse_changes(old: RunConfig, new: RunConfig, path: Path) -> None:
    def flat(node: Any, key: str = "") -> dict[str, Any]:
        if isinstance(node, dict) and node:
            return {
                k: v for name, child in node.items() for k, v in flat(child, f"{key}.{name}" if key else name).items()
            }
        return {key: node}

    before, after = (flat(config.model_dump(mode="json", by_alias=True)) for config in (old, new))
    changed = [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and (key in MAY_NOT_CHANGE or not any(key == free or key.startswith(free + ".") for free in MAY_CHANGE))
    ]
    if changed:
        raise UserError(
            f"{path} was made with another config, so it cannot be resumed with this one: {'; '.join(changed)}. "
            "Take the change back or name another --output"
        )


def _note_bad_rows(task: Task, path: Path, console: Console) -> None:
    rows = [asdict(bad) for bad in task.bad_rows]
    (path / "bad_rows.jsonl").write_text("".join(to_json(row) + "\n" for row in rows), encoding="utf-8")
    if rows:
        console.message(f"bad rows   {describe_bad_rows(task.bad_rows)}; all in {path / 'bad_rows.jsonl'}")


def _complete(path: Path, config: RunConfig, state: Path | None) -> bool:
    """Whether nothing is left to do: the run ended by itself, at these steps, with every control made."""
    if state is None:
        return False
    summary = Run(path).summary
    progress = Progress(**checkpoint.load_state(state)["progress"])
    ended = (summary.get("status") == "stopped_early" and progress.exhausted(config.evaluation.patience)) or (
        summary.get("status") == "finished" and summary["steps"] >= config.trainer.steps
    )
    return ended and set(config.evaluation.controls) <= set(summary["controls"])


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM outside the loop (before it, in the last test, in a control) ends the run in order, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def _write_config(config: RunConfig, path: Path) -> None:
    versions = {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
    text = config.to_yaml() + yaml.safe_dump({VERSIONS: versions}, sort_keys=False)
    aside = path / ".config.yaml.partial"
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path / "config.yaml")
