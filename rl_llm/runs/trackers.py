"""Views of a run that others draw: TensorBoard, W&B, MLflow. The run directory is the record."""

import contextlib
import importlib
import logging
import math
import os
import re
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar, text

from rl_llm.config import LoggingConfig
from rl_llm.errors import UserError
from rl_llm.files import write_text
from rl_llm.runs.callbacks import Callback, TrainerView, last_recorded
from rl_llm.values import to_json

log = logging.getLogger(__name__)

MOST_SKIPPED = 64


def sinks(config: LoggingConfig) -> list[Callback]:
    """The callbacks that `logging` asks for.

    Raises:
        UserError: W&B or MLflow is configured and not installed, or does not let anybody in.
    """
    callbacks: list[Callback] = []
    if config.tensorboard:
        callbacks.append(TensorBoard())
    if config.wandb_project:
        callbacks.append(WandB(config.wandb_project))
    if config.mlflow_experiment:
        callbacks.append(MLflow(config.mlflow_experiment))
    return callbacks


class Tracker(Callback):
    """A view of a run that may fail: an outage is warned of once, and the run goes on without.

    A server that is down may take minutes to say so. So after each failure in a row twice as many events are left out
    before the next try, which opens the view anew.
    """

    def __init__(self) -> None:
        self._begun = False
        self._failures = self._skipped = 0

    @abstractmethod
    def begin(self, trainer: TrainerView) -> None:
        """Open the view of a run. What the directory notes of an earlier one is gone on with, whatever step it is."""

    @abstractmethod
    def show(self, numbers: dict[str, float], step: int) -> None:
        """Add numbers of a step."""

    def show_samples(self, evaluation: dict[str, Any]) -> None:
        """Add what an evaluation shows beside numbers."""

    @abstractmethod
    def end(self, summary: dict[str, Any]) -> None:
        """Close the view."""

    def on_start(self, trainer: TrainerView) -> None:
        self._begun, self._failures, self._skipped = False, 0, 0
        self._try(trainer)

    def on_step(self, trainer: TrainerView, metrics: dict[str, Any]) -> None:
        self._try(trainer, lambda: self.show(_numbers(metrics), metrics["step"]))

    def on_evaluation(self, trainer: TrainerView, evaluation: dict[str, Any]) -> None:
        def show() -> None:
            self.show(_evaluation_numbers(evaluation), evaluation["step"])
            self.show_samples(evaluation)

        self._try(trainer, show)

    def on_end(self, trainer: TrainerView, summary: dict[str, Any]) -> None:
        self._skipped = MOST_SKIPPED  # there is no later try
        self._try(trainer, lambda: self.end(summary))

    def _try(self, trainer: TrainerView, event: Callable[[], None] = lambda: None) -> None:
        self._skipped += 1
        if self._failures and self._skipped <= min(2**self._failures, MOST_SKIPPED):
            return
        name = type(self).__name__
        try:
            if not self._begun:
                self.begin(trainer)
                self._begun = True
            event()
        except Exception as error:
            if not self._failures:
                log.warning("%s fails, and the run goes on without: %s", name, _reason(error))
            self._begun, self._failures, self._skipped = False, self._failures + 1, 0
        else:
            if self._failures:
                log.warning("%s is back", name)
            self._failures = 0


class TensorBoard(Tracker):
    """Scalars and sample completions in `tensorboard/` of the run directory."""

    def __init__(self) -> None:
        super().__init__()
        self._file: Any = None

    def begin(self, trainer: TrainerView) -> None:
        before, self._file = self._file, None
        if before is not None:
            with contextlib.suppress(OSError):
                before.close()
        kept, folder = last_recorded(trainer), trainer.path / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        earlier = len(list(folder.iterdir()))
        # tensorboardX's own SummaryWriter leaves the file to a thread, and waits for ever for one that met a full disk.
        # File names hold only the second; the suffix keeps a quick resume from writing over an earlier file.
        self._file = EventsWriter(str(folder / "events"), f".{earlier}")
        if earlier:
            # Steps that a resumed run repeats are in a file already; this makes readers drop them.
            self._write(kept + 1, session_log=SessionLog(status=SessionLog.START))

    def show(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._write(step, summary=scalar(name, value))
        self._file.flush()

    def show_samples(self, evaluation: dict[str, Any]) -> None:
        for index, sample in enumerate(evaluation["samples"]):
            shown = f"{sample['prompt']}\n\n{sample['completion']}\n\n{to_json(sample['rewards'])}"
            indented = "\n".join("    " + line for line in shown.splitlines())  # a code block: text shown as it is
            tag = f"samples/{evaluation['split']}/{evaluation['label']}/{index}"
            self._write(evaluation["step"], summary=text(tag, indented))
        self._file.flush()

    def _write(self, step: int, **what: Any) -> None:
        self._file.write_event(Event(wall_time=time.time(), step=step, **what))

    def end(self, summary: dict[str, Any]) -> None:
        file, self._file = self._file, None
        file.close()


class WandB(Tracker):
    """A Weights & Biases run in project `project`; a resumed run goes on in the same one."""

    def __init__(self, project: str) -> None:
        super().__init__()
        self._wandb = _installed("wandb", "logging.wandb_project")
        self._project = project
        self._run: Any = None
        remedy = "`wandb login` or WANDB_API_KEY gives the key, and WANDB_MODE=offline needs none"
        with _refused("logging.wandb_project", remedy):
            self._wandb.login(verify=True)

    def begin(self, trainer: TrainerView) -> None:
        if self._run is not None:
            self._run.finish()
        noted = trainer.path / "wandb_run_id.txt"
        self._run = self._wandb.init(
            project=self._project,
            name=trainer.path.name,
            dir=str(trainer.path),
            config=trainer.config.model_dump(mode="json"),
            id=_noted(noted),
            resume="allow",
        )
        write_text(noted, self._run.id)

    # W&B drops steps below its last one: those that a resumed run repeats have the same numbers, so nothing is lost.
    def show(self, numbers: dict[str, float], step: int) -> None:
        self._run.log(numbers, step=step)

    def end(self, summary: dict[str, Any]) -> None:
        self._run.summary.update({key: summary.get(key) for key in ("status", "reason", "best_step")})
        self._run.finish(exit_code=int(summary["status"] == "failed"))


class MLflow(Tracker):
    """An MLflow run in experiment `experiment`, on the server that MLFLOW_TRACKING_URI names."""

    ENDED = {"finished": "FINISHED", "stopped_early": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}

    def __init__(self, experiment: str) -> None:
        super().__init__()
        self._mlflow = _installed("mlflow", "logging.mlflow_experiment")
        self._experiment = experiment
        self._open = False
        remedy = "start the server that MLFLOW_TRACKING_URI names, or correct it"
        with _refused("logging.mlflow_experiment", remedy), _few_retries():
            self._mlflow.MlflowClient().get_experiment_by_name(experiment)

    def begin(self, trainer: TrainerView) -> None:
        if self._open:
            self._mlflow.end_run()
        noted = trainer.path / "mlflow_run_id.txt"
        self._mlflow.set_experiment(self._experiment)
        resumed = _noted(noted)
        self._run_id = self._mlflow.start_run(run_id=resumed, run_name=trainer.path.name).info.run_id
        write_text(noted, self._run_id)
        self._open = True
        # By name, the last step that the run had been given when it was resumed; None for a run that begins.
        self._there: dict[str, int] | None = None if resumed is None else {}
        self._mlflow.log_dict(yaml.safe_load(trainer.config.to_yaml()), "config.yaml")

    def show(self, numbers: dict[str, float], step: int) -> None:
        allowed = {re.sub(r"[^\w\-. /]", "_", name): value for name, value in numbers.items()}  # MLflow's own rule
        if allowed and step > self._last(next(iter(allowed))):
            self._mlflow.log_metrics(allowed, step=step)

    def _last(self, name: str) -> int:
        """MLflow keeps a step twice that is logged twice; those that a resumed run repeats have the same numbers."""
        if self._there is None:
            return -1
        if name not in self._there:
            history = self._mlflow.MlflowClient().get_metric_history(self._run_id, name)
            self._there[name] = max((point.step for point in history), default=-1)
        return self._there[name]

    def end(self, summary: dict[str, Any]) -> None:
        self._mlflow.end_run(status=self.ENDED[summary["status"]])


def _noted(file: Path) -> str | None:
    """The id that an earlier start noted; None where there is none."""
    return (file.read_text().strip() or None) if file.is_file() else None


@contextlib.contextmanager
def _refused(key: str, remedy: str) -> Iterator[None]:
    """Raises what goes wrong as `UserError`: here a run has not started yet."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{key}: {_reason(error)}; {remedy}; or remove the key") from None


@contextlib.contextmanager
def _few_retries() -> Iterator[None]:
    """MLflow goes on trying for minutes; whoever waits for a run to begin should hear sooner."""
    key = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    given = os.environ.get(key)
    os.environ.setdefault(key, "1")
    try:
        yield
    finally:
        if given is None:
            del os.environ[key]


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


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
