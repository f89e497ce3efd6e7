"""What a run does around its loop, whoever turns that: its base before it, and what is left of it after it."""

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from rl_llm.config import IMPORTS, PROBE, VERSIONS
from rl_llm.files import write_text
from rl_llm.imports import places
from rl_llm.launch.origin import model_digests
from rl_llm.launch.preflight import Plan, load_tokenizer
from rl_llm.launch.resume import refuse_other_base
from rl_llm.launch.warm_start import ensure_base, needs_base
from rl_llm.policies import policy_class
from rl_llm.runs.run import Run
from rl_llm.runs.writer import write_summary
from rl_llm.tasks import describe_bad_rows
from rl_llm.trainer.trainer import Trainer
from rl_llm.values import to_json

LIBRARIES = ("rl-llm", "torch", "transformers", "ray", "sacrebleu", "pyarrow", "numpy")

Note = Callable[[str], None]


def prepare_base(plan: Plan, path: Path, checkpoint: Path | None, note: Note) -> str:
    """The folder (or Hub name) of the policy that a run begins with; the plan's task is tokenized for it.

    Args:
        path: the run directory.
        checkpoint: that the run goes on from.

    Raises:
        UserError: the run had begun with another one, and it would matter.
    """
    config = plan.config
    base = ensure_base(config, plan.task, note)
    if needs_base(config) and (config.policy.trainable != "all" or config.algorithm.kl.coef):
        plan.origin.base = model_digests(base)
        if checkpoint is not None:
            refuse_other_base(path, base, checkpoint, plan.origin)
    if config.policy.model is None:
        plan.task.tokenize(load_tokenizer(base), policy_class(config.policy).continues)
    return base


def begin_record(plan: Plan, path: Path, note: Note) -> None:
    """Write what a run is made from into its directory."""
    path.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
    notes = {VERSIONS: versions, IMPORTS: places(), PROBE: asdict(plan.probe) if plan.probe else None}
    write_text(path / "config.yaml", plan.config.to_yaml() + yaml.safe_dump(notes, sort_keys=False))
    # One of an earlier start would say of a run under way that it had ended.
    (path / "summary.json").unlink(missing_ok=True)
    rows = [asdict(bad) for bad in plan.task.bad_rows]
    write_text(path / "bad_rows.jsonl", "".join(to_json(row) + "\n" for row in rows))
    if rows:
        note(f"bad rows   {describe_bad_rows(plan.task.bad_rows)}; all in {path / 'bad_rows.jsonl'}")


def measure_best(trainer: Trainer) -> dict[str, Any]:
    """Leave the best policy as `model/`; returns its metrics on the test split."""
    trainer.export_best()
    return trainer.test("after").line["metrics"]


def ended_by_itself(trainer: Trainer) -> dict[str, str]:
    """The status of a run that is over, and the reason where that is not its last step."""
    if trainer.steps_done < trainer.config.trainer.steps:
        reason = f"no better utility in {trainer.config.evaluation.patience} validations"
        return {"status": "stopped_early", "reason": reason}
    return {"status": "finished"}


def end_record(trainer: Trainer, summary: dict[str, Any], note: Note) -> Exception | None:
    """Complete the summary, write it and the report, and tell the callbacks; returns what one of them raised.

    The directory is left complete, however the run ended and whoever else fails.
    """
    summary |= {
        "steps": trainer.steps_done,
        "best_step": trainer.state.progress.best_step,
        "before": trainer.state.before,
        "bad_rows": len(trainer.task.bad_rows),
        "restarts": trainer.workers.restarts(),
        "seconds": trainer.seconds,
    }
    write_summary(trainer.path, summary)
    problem = trainer.callbacks.end(trainer, summary)
    with reporting(trainer.path, note):
        Run(trainer.path).report()
    return problem


@contextmanager
def reporting(path: Path, note: Note, what: str = "report.html") -> Iterator[None]:
    """A run, or a search, is what it is without its report too: what fails within is noted."""
    try:
        yield
    except Exception as error:
        note(f"no {what}: {type(error).__name__}: {error}; make it with: rl-llm report {path}")
