"""Where a run's numbers go: JSON lines in the run directory, and callbacks (TensorBoard, W&B, MLflow, the user's own).

The run directory is the record; everything else is a view of it that a `Callback` feeds.
"""

import importlib
import json
import math
import os
import re
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Protocol

import numpy as np
import yaml
from tensorboardX import SummaryWriter

from rl_llm.config import LoggingConfig, RunConfig
from rl_llm.errors import UserError

# Evaluations that a run makes when its steps are done; a resumed run makes them again.
MADE_AT_THE_END = ("after", "supervised")


class TrainerView(Protocol):
    """What a callback may rely on finding on the trainer it is given."""

    @property
    def config(self) -> RunConfig: ...

    @property
    def path(self) -> Path:
        """The run directory."""

    @property
    def steps_done(self) -> int:
        """Steps finished so far; above 0 in `on_start` when a run resumes."""


class Callback:
    """Base class for whatever wants to follow a run; override what you need, the rest does nothing.

    Callbacks run in the driver process, in the order given, and are waited for: a slow one slows training. An exception
    is not caught: it ends the run with status "failed", everything up to the last checkpoint being kept.

    A run that is killed and resumed calls `on_start` again with `trainer.steps_done` above 0, and repeats the steps
    after its last checkpoint with the same numbers. A callback that keeps its own record must drop those first.

    Example:
        class StopWhenShort(rl_llm.Callback):
            def on_step(self, trainer, metrics):
                if metrics["completion/length"] < 3:
                    raise RuntimeError("the policy has collapsed to empty completions")
    """

    def on_start(self, trainer: TrainerView) -> None:
        """Before the first step (of a resumed run: before the first one it still has to do)."""

    def on_step(self, trainer: TrainerView, metrics: dict[str, Any]) -> None:
        """After each step. `metrics` is the line of metrics.jsonl: `step` (from 1), `loss`, `reward/<name>/mean`, ...

        Seconds are under `time/`; NaN where a component had no value in the whole step.
        """

    def on_evaluation(self, trainer: TrainerView, evaluation: dict[str, Any]) -> None:
        """After each evaluation. `evaluation` is the line of eval.jsonl.

        Keys: `step`, `split` ("tune" or "test"), `label` ("before", "validation" or "after"), `metrics` as
        `{name: {"mean", "low", "high"}}` with 95 % bounds, `utility` among them, and `samples` as a list of
        `{"prompt", "completion", "rewards": {name: value or None}}`.
        """

    def on_checkpoint(self, trainer: TrainerView, path: Path) -> None:
        """After a checkpoint folder is complete on disk."""

    def on_end(self, trainer: TrainerView, summary: dict[str, Any]) -> None:
        """After the last step, however the run ended. `summary` is summary.json: `status`, `reason`, `steps`, ..."""


def to_json(value: Any) -> str:
    """Strict JSON on one line: NaN and infinities become null, numpy numbers plain ones, paths strings."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, none if it is not there yet; a last line cut short by a kill is left out.

    Raises:
        UserError: a line before the last one is broken, which no kill explains.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UserError(f"{path}:{number}: not valid JSON; repair or remove this line") from None
    return rows


class JsonlWriter:
    """Appends objects to a JSON-lines file, a line each, flushed at once so that readers and a kill find it whole.

    Args:
        path: the file; made when missing.
        last_step: lines whose `step` is above this are dropped on opening, and so is a broken last line: a resumed run
            writes them again. The default starts the file anew.
    """

    def __init__(self, path: Path, last_step: int = -1) -> None:
        kept = [row for row in read_jsonl(path) if row["step"] <= last_step and row.get("label") not in MADE_AT_THE_END]
        aside = path.with_name(path.name + ".tmp")
        aside.write_text("".join(to_json(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(aside, path)
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(to_json(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def sinks(config: LoggingConfig) -> list[Callback]:
    """The callbacks that `logging` asks for.

    Raises:
        UserError: W&B or MLflow is configured and not installed.
    """
    callbacks: list[Callback] = []
    if config.tensorboard:
        callbacks.append(TensorBoard())
    if config.wandb_project:
        callbacks.append(WandB(config.wandb_project))
    if config.mlflow_experiment:
        callbacks.append(MLflow(config.mlflow_experiment))
    return callbacks


class TensorBoard(Callback):
    """Scalars and sample completions in `tensorboard/` of the run directory."""

    def on_start(self, trainer: TrainerView) -> None:
        # Steps that a resumed run repeats are in the earlier event file already; purge_step makes readers drop them.
        purge = trainer.steps_done + 1 if trainer.steps_done else None
        # File names hold only the second; the suffix keeps a quick resume from writing over the earlier file.
        suffix = f".{trainer.steps_done}"
        self._writer = SummaryWriter(str(trainer.path / "tensorboard"), purge_step=purge, filename_suffix=suffix)

    def on_step(self, trainer: TrainerView, metrics: dict[str, Any]) -> None:
        for name, value in _numbers(metrics).items():
            self._writer.add_scalar(name, value, metrics["step"])
        self._writer.flush()

    def on_evaluation(self, trainer: TrainerView, evaluation: dict[str, Any]) -> None:
        for name, value in _evaluation_numbers(evaluation).items():
            self._writer.add_scalar(name, value, evaluation["step"])
        for index, sample in enumerate(evaluation["samples"]):
            shown = f"{sample['prompt']}\n\n{sample['completion']}\n\n{to_json(sample['rewards'])}"
            indented = "\n".join("    " + line for line in shown.splitlines())  # a code block: text shown as it is
            self._writer.add_text(
                f"samples/{evaluation['split']}/{evaluation['label']}/{index}", indented, evaluation["step"]
            )
        self._writer.flush()

    def on_end(self, trainer: TrainerView, summary: dict[str, Any]) -> None:
        self._writer.close()


class WandB(Callback):
    """A Weights & Biases run in project `project`; a resumed run goes on in the same one."""

    def __init__(self, project: str) -> None:
        self._wandb = _installed("wandb", "logging.wandb_project")
        self._project = project

    def on_start(self, trainer: TrainerView) -> None:
        noted = trainer.path / "wandb_run_id.txt"
        self._run = self._wandb.init(
            project=self._project,
            name=trainer.path.name,
            dir=str(trainer.path),
            config=trainer.config.model_dump(mode="json"),
            id=noted.read_text() if trainer.steps_done and noted.is_file() else None,
            resume="allow",
        )
        noted.write_text(self._run.id)

    # W&B drops steps below its last one: those that a resumed run repeats have the same numbers, so nothing is lost.
    def on_step(self, trainer: TrainerView, metrics: dict[str, Any]) -> None:
        self._run.log(_numbers(metrics), step=metrics["step"])

    def on_evaluation(self, trainer: TrainerView, evaluation: dict[str, Any]) -> None:
        self._run.log(_evaluation_numbers(evaluation), step=evaluation["step"])

    def on_end(self, trainer: TrainerView, summary: dict[str, Any]) -> None:
        self._run.summary.update({key: summary.get(key) for key in ("status", "reason", "best_step")})
        self._run.finish(exit_code=int(summary["status"] == "failed"))


class MLflow(Callback):
    """An MLflow run in experiment `experiment`, on the server that MLFLOW_TRACKING_URI names."""

    ENDED = {"finished": "FINISHED", "stopped_early": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}

    def __init__(self, experiment: str) -> None:
        self._mlflow = _installed("mlflow", "logging.mlflow_experiment")
        self._experiment = experiment

    def on_start(self, trainer: TrainerView) -> None:
        noted = trainer.path / "mlflow_run_id.txt"
        self._mlflow.set_experiment(self._experiment)
        resumed = noted.read_text() if trainer.steps_done and noted.is_file() else None
        run = self._mlflow.start_run(run_id=resumed, run_name=trainer.path.name)
        noted.write_text(run.info.run_id)
        self._mlflow.log_dict(yaml.safe_load(trainer.config.to_yaml()), "config.yaml")

    def on_step(self, trainer: TrainerView, metrics: dict[str, Any]) -> None:
        self._log(_numbers(metrics), metrics["step"])

    def on_evaluation(self, trainer: TrainerView, evaluation: dict[str, Any]) -> None:
        self._log(_evaluation_numbers(evaluation), evaluation["step"])

    def _log(self, numbers: dict[str, float], step: int) -> None:
        allowed = {re.sub(r"[^\w\-. /]", "_", name): value for name, value in numbers.items()}  # MLflow's own rule
        self._mlflow.log_metrics(allowed, step=step)

    def on_end(self, trainer: TrainerView, summary: dict[str, Any]) -> None:
        self._mlflow.end_run(status=self.ENDED[summary["status"]])


def _installed(module: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{key} needs {module}: pip install {module}, or remove the key") from None


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in metrics.items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


def _evaluation_numbers(evaluation: dict[str, Any]) -> dict[str, float]:
    split = evaluation["split"]
    # The test split is measured several times at one step: after training, and for a control.
    where = f"eval/{split}" if split == "tune" else f"eval/{split}/{evaluation['label']}"
    means = {f"{where}/{name}": entry["mean"] for name, entry in evaluation["metrics"].items()}
    return _numbers(means)
