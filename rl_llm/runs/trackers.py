"""Views of a run that others draw: TensorBoard, W&B, MLflow. The run directory is the record."""

import importlib
import math
import re
from types import ModuleType
from typing import Any

import yaml
from tensorboardX import SummaryWriter

from rl_llm.config import LoggingConfig
from rl_llm.errors import UserError
from rl_llm.runs.callbacks import Callback, TrainerView
from rl_llm.values import to_json


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

    def __init__(self) -> None:
        self._writer: Any = None

    def on_start(self, trainer: TrainerView) -> None:
        if self._writer is not None:
            self._writer.close()
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
        self._run: Any = None

    def on_start(self, trainer: TrainerView) -> None:
        if self._run is not None:
            self._run.finish()
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
        self._open = False

    def on_start(self, trainer: TrainerView) -> None:
        if self._open:
            self._mlflow.end_run()
        noted = trainer.path / "mlflow_run_id.txt"
        self._mlflow.set_experiment(self._experiment)
        resumed = noted.read_text() if trainer.steps_done and noted.is_file() else None
        run = self._mlflow.start_run(run_id=resumed, run_name=trainer.path.name)
        noted.write_text(run.info.run_id)
        self._open = True
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
