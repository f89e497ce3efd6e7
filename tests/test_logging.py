import errno
import io
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import rich.console
from run_factory import evaluation, make_config
from tensorboardX.event_file_writer import EventsWriter

from rl_llm.config import LoggingConfig, RunConfig
from rl_llm.errors import UserError
from rl_llm.runs.callbacks import Callback
from rl_llm.runs.console import Console, LiveConsole, evaluation_lines, make_console, step_line
from rl_llm.runs.jsonl import JsonlWriter, read_jsonl
from rl_llm.runs.text import short, sparkline
from rl_llm.runs.trackers import MLflow, TensorBoard, Tracker, WandB, sinks
from rl_llm.values import to_json

METRICS = {
    "step": 12,
    "loss": 0.1,
    "reward/mean": 0.5131,
    "reward/std": 0.2,
    "reward/chrf/mean": 0.62,
    "reward/chrf/std": 0.1,
    "reward/length/mean": float("nan"),
    "completion/length": 18.3,
    "failures/chrf": 0,
    "tokens_per_second": 1234.0,
}


@dataclass
class FakeTrainer:
    path: Path
    steps_done: int = 0
    config: RunConfig = field(default_factory=lambda: make_config({"chrf": 1.0}))
    state: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(before={"chrf": 0.5}))


def test_json_has_no_nan_and_no_numpy() -> None:
    line = {"a": float("nan"), "b": [np.float32(0.5), float("-inf")], "c": np.int64(3), "d": np.array([1.0])}
    assert json.loads(to_json(line)) == {"a": None, "b": [0.5, None], "c": 3, "d": [1.0]}


def test_floats_survive_the_file_exactly(tmp_path: Path) -> None:
    value = 0.1 + 0.2
    JsonlWriter(tmp_path / "m.jsonl").write({"step": 1, "x": value})
    assert read_jsonl(tmp_path / "m.jsonl")[0]["x"] == value


def test_each_line_is_on_disk_when_written(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.write({"step": 1})
    writer.write({"step": 2, "text": "line\nbreak \u2028 é"})
    assert [row["step"] for row in read_jsonl(tmp_path / "m.jsonl")] == [1, 2]
    assert read_jsonl(tmp_path / "m.jsonl")[1]["text"] == "line\nbreak \u2028 é"


def test_a_resumed_file_goes_on_after_the_checkpoint_byte_for_byte(tmp_path: Path) -> None:
    def write(path: Path, steps: range, **how: int) -> None:
        writer = JsonlWriter(path, **how)
        for step in steps:
            writer.write({"step": step, "x": step / 3, "y": float("nan")})
        writer.close()

    write(tmp_path / "left_alone.jsonl", range(1, 9))
    write(tmp_path / "killed.jsonl", range(1, 7))
    with (tmp_path / "killed.jsonl").open("a") as file:
        file.write('{"step": 7, "x"')
    write(tmp_path / "killed.jsonl", range(5, 9), last_step=4)
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "left_alone.jsonl").read_bytes()


def test_a_new_run_starts_its_files_anew(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"step": 0}\n')
    JsonlWriter(tmp_path / "m.jsonl").close()
    assert read_jsonl(tmp_path / "m.jsonl") == []


@pytest.mark.parametrize("kept", [0, 4])
def test_tensorboard_after_a_resume_has_each_step_once(tmp_path: Path, kept: int) -> None:
    for done, steps, value in ((0, range(1, 7), 1.0), (kept, range(kept + 1, 9), 2.0)):
        trainer, sink = FakeTrainer(tmp_path, steps_done=done), TensorBoard()
        sink.on_start(trainer)
        for step in steps:
            sink.on_step(trainer, {"step": step, "loss": value, "kl": float("nan")})
        sink.on_evaluation(trainer, evaluation(steps[-1], "tune", "validation", ["chrf"], 0.5, "text"))
        sink.on_end(trainer, {"status": "finished"})
    events = tensorboard(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        *((step, 1.0) for step in range(1, kept + 1)),
        *((step, 2.0) for step in range(kept + 1, 9)),
    ]
    assert "kl" not in events.Tags()["scalars"]
    assert [event.step for event in events.Scalars("eval/tune/utility")] == [8]


def test_tensorboard_of_a_run_killed_before_its_first_checkpoint_has_step_0_once(tmp_path: Path) -> None:
    for _ in range(2):
        trainer, sink = FakeTrainer(tmp_path, state=SimpleNamespace(before={})), TensorBoard()
        sink.on_start(trainer)
        sink.on_evaluation(trainer, evaluation(0, "tune", "validation", ["chrf"], 0.5, "text"))
    assert [event.step for event in tensorboard(tmp_path).Scalars("eval/tune/utility")] == [0]


def tensorboard(path: Path) -> Any:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return reader.EventAccumulator(str(path / "tensorboard")).Reload()


def test_sinks_follow_the_config() -> None:
    assert sinks(LoggingConfig(tensorboard=False)) == []
    assert [type(sink) for sink in sinks(LoggingConfig())] == [TensorBoard]


@pytest.mark.parametrize(("key", "module"), [("wandb_project", "wandb"), ("mlflow_experiment", "mlflow")])
def test_a_configured_sink_that_is_not_installed_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, key: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"logging\.{key} needs {module}: pip install {module}"):
        sinks(LoggingConfig(**{key: "mine"}))


class Recorder:
    """Stands for a module or object of W&B or MLflow: notes each call and answers with itself."""

    id = "run-1"

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.summary: dict[str, Any] = {}
        self.info = SimpleNamespace(run_id="run-1")

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> "Recorder":
            self.calls.append((name, args, kwargs))
            return self

        return call

    def named(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


@pytest.mark.parametrize(
    ("key", "module", "remedy"),
    [("wandb_project", "wandb", "WANDB_MODE=offline"), ("mlflow_experiment", "mlflow", "MLFLOW_TRACKING_URI")],
)
def test_a_sink_that_lets_nobody_in_is_refused_before_a_run_starts(
    monkeypatch: pytest.MonkeyPatch, key: str, module: str, remedy: str
) -> None:
    class Shut(Recorder):
        def login(self, *args: Any, **how: Any) -> None:
            raise ConnectionError("nobody\nanswers")

        get_experiment_by_name = login

        def MlflowClient(self) -> "Shut":
            return self

    monkeypatch.setitem(sys.modules, module, Shut())
    with pytest.raises(UserError, match=rf"logging\.{key}: ConnectionError: nobody answers; .*{remedy}"):
        sinks(LoggingConfig(tensorboard=False, **{key: "mine"}))


class Flaky(Tracker):
    """A view that can be down; `tried` is what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.tried = False, []  # type: ignore[var-annotated]

    def _hear(self, what: Any) -> None:
        self.tried.append(what)
        if self.down:
            raise ConnectionError("server is down")

    def begin(self, trainer: Any) -> None:
        self._hear("begin")

    def show(self, numbers: dict[str, float], step: int) -> None:
        self._hear(step)

    def end(self, summary: dict[str, Any]) -> None:
        self._hear("end")


def test_an_outage_of_a_tracker_warns_once_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sink, trainer = Flaky(), FakeTrainer(tmp_path)
    sink.on_start(trainer)
    for step in range(1, 41):
        sink.down = 3 <= step < 30
        sink.on_step(trainer, {"step": step})
    sink.on_end(trainer, {"status": "finished"})
    # Tried again after 2, 4, 8 and 16 events, by opening it anew.
    assert sink.tried == ["begin", 1, 2, 3, "begin", "begin", "begin", "begin", 37, 38, 39, 40, "end"]
    assert [record.message for record in caplog.records] == [
        "Flaky fails, and the run goes on without: ConnectionError: server is down", "Flaky is back",
    ]  # fmt: skip


def test_a_tracker_that_is_down_to_the_end_hears_of_it(tmp_path: Path) -> None:
    sink = Flaky()
    sink.down = True
    follow(sink, FakeTrainer(tmp_path))
    sink.down = False
    sink.on_end(FakeTrainer(tmp_path), {"status": "failed"})
    assert sink.tried[-2:] == ["begin", "end"]


def test_a_disk_without_room_for_tensorboard_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sink, trainer = TensorBoard(), FakeTrainer(tmp_path)
    sink.on_start(trainer)
    with monkeypatch.context() as full:
        full.setattr(EventsWriter, "write_event", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        for step in range(1, 30):
            sink.on_step(trainer, {"step": step} | {f"number/{i}": 1.0 for i in range(40)})
    for step in range(30, 100):
        sink.on_step(trainer, {"step": step, "loss": 1.0})
    sink.on_end(trainer, {"status": "finished"})
    assert tensorboard(tmp_path).Scalars("loss")[-1].step == 99
    assert "TensorBoard fails, and the run goes on without: OSError: [Errno 28] No space left" in caplog.text


def follow(sink: Callback, trainer: FakeTrainer) -> None:
    sink.on_start(trainer)
    sink.on_step(trainer, METRICS)
    sink.on_evaluation(trainer, evaluation(12, "tune", "validation", ["a~b"], 0.5, "text"))
    sink.on_end(trainer, {"status": "failed", "reason": "x", "best_step": 1})


def test_wandb_logs_numbers_and_resumes_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for done in (0, 0, 4):  # the second start is one of a run that had no checkpoint yet
        follow(WandB("proj"), FakeTrainer(tmp_path, steps_done=done))
    assert [kwargs["id"] for _, kwargs in wandb.named("init")] == [None, "run-1", "run-1"]
    (logged,), where = wandb.named("log")[0]
    assert logged["reward/mean"] == 0.5131
    assert "reward/length/mean" not in logged
    assert where == {"step": 12}
    assert wandb.named("finish")[0][1] == {"exit_code": 1}


class FakeMLflow(Recorder):
    """Keeps every number that is logged, as MLflow does: a step that is logged twice is there twice."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[str, list[int]] = {}

    def MlflowClient(self) -> "FakeMLflow":
        return self

    def log_metrics(self, numbers: dict[str, float], step: int) -> None:
        for name in numbers:
            self.numbers.setdefault(name, []).append(step)

    def get_metric_history(self, run: str, name: str) -> list[SimpleNamespace]:
        assert run == "run-1"
        return [SimpleNamespace(step=step) for step in self.numbers.get(name, [])]


def test_mlflow_logs_numbers_once_under_names_it_admits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    for done in (0, 0, 4):
        sink, trainer = MLflow("exp"), FakeTrainer(tmp_path, steps_done=done)
        sink.on_start(trainer)
        for step in range(done + 1, 9 if done else 6):
            sink.on_step(trainer, METRICS | {"step": step})
        sink.on_evaluation(trainer, evaluation(12, "tune", "validation", ["a~b"], 0.5, "text"))
        sink.on_end(trainer, {"status": "failed", "reason": "x", "best_step": 1})
    assert [kwargs["run_id"] for _, kwargs in mlflow.named("start_run")] == [None, "run-1", "run-1"]
    assert mlflow.numbers["reward/chrf/mean"] == list(range(1, 9))
    assert mlflow.numbers["eval/tune/a_b"] == [12]
    assert mlflow.named("end_run")[0][1] == {"status": "FAILED"}


def test_a_plain_step_is_one_line() -> None:
    assert step_line(METRICS, 100) == "step 12/100  reward 0.513  chrf 0.62  length -  len 18.3  1.23k tok/s"
    assert step_line(METRICS | {"failures/chrf": 3}, 100).endswith("chrf failed on 3")


@pytest.mark.parametrize(
    ("value", "shown"), [(0.51312, "0.513"), (-0.1, "-0.1"), (18.34, "18.3"), (1234, "1.23k"), (None, "-")]
)
def test_numbers_are_short(value: float | None, shown: str) -> None:
    assert short(value) == shown


def test_a_sparkline_spans_its_values() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([2.0, 2.0]) == "▁▁"


def test_samples_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.on_evaluation(None, evaluation(3, "tune", "validation", ["chrf"], 0.5, "\x1b[2Jhi\r[bold]x[/bold]\n"))
    console.close()
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\r" not in shown
    assert "hi" in shown
    assert "[bold]x[/bold]" in shown


def test_an_evaluation_shows_intervals_and_samples_with_their_rewards() -> None:
    lines = evaluation_lines(evaluation(3, "tune", "validation", ["chrf"], 0.5, "text"))
    assert lines[0] == "validation on tune at step 3"
    assert "  chrf 0.45  [0.4, 0.5]" in lines
    assert lines[-1].strip() == "chrf -"


def terminal(**how: Any) -> rich.console.Console:
    return rich.console.Console(file=io.StringIO(), width=100, **how)


def test_the_console_is_live_only_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    monkeypatch.delenv("RL_LLM_PLAIN", raising=False)
    assert isinstance(make_console(terminal(force_terminal=True)), LiveConsole)
    assert not isinstance(make_console(terminal(force_terminal=False)), LiveConsole)
    assert not isinstance(make_console(terminal(force_terminal=True, force_jupyter=True)), LiveConsole)
    monkeypatch.setenv("RL_LLM_PLAIN", "1")
    assert not isinstance(make_console(terminal(force_terminal=True)), LiveConsole)


@pytest.mark.parametrize(
    ("isatty", "term", "live"), [(True, "xterm", True), (True, "dumb", False), (False, "xterm", False)]
)
def test_colours_are_for_terminals_whatever_is_forced(
    monkeypatch: pytest.MonkeyPatch, isatty: bool, term: str, live: bool
) -> None:
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: isatty, closed=False, write=len, flush=list))
    for name, value in (("TERM", term), ("FORCE_COLOR", "1"), ("TTY_COMPATIBLE", "1")):
        monkeypatch.setenv(name, value)
    assert isinstance(make_console(), LiveConsole) == live


def test_a_debugger_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "gettrace", lambda: print)
    assert not isinstance(make_console(terminal(force_terminal=True)), LiveConsole)


def test_the_live_console_shows_progress_and_metrics_and_closes_twice() -> None:
    output = terminal(force_terminal=True)
    console = LiveConsole(output)
    trainer = SimpleNamespace(config=make_config({"chrf": 1.0}, ("trainer.steps=100",)), steps_done=10)
    console.on_message("the [plan]")
    console.on_start(trainer)
    console.on_step(trainer, METRICS | {"failures/chrf": 2})
    console.on_evaluation(trainer, evaluation(12, "tune", "validation", ["chrf"], 0.5, "[red]a sample"))
    console.close()
    console.close()
    shown = output.file.getvalue()  # type: ignore[attr-defined]
    for part in ("the [plan]", "12/100", "chrf", "0.62", "chrf failures", "utility", "[red]a sample"):
        assert part in shown
