"""Who follows a run: the base class of everything that does, and the one channel its events go out on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from rl_llm.config import RunConfig
from rl_llm.mixture import Mixture


class TrainerView(Protocol):
    """What a callback may rely on finding on the trainer it is given."""

    @property
    def config(self) -> RunConfig: ...

    @property
    def path(self) -> Path:
        """The run directory."""

    @property
    def steps_done(self) -> int:
        """Steps finished so far; in `on_start` those that a resumed run does not repeat, which may be 0."""

    @property
    def mixture(self) -> Mixture:
        """The reward weights; `mixture.set_weight` changes one between two steps."""

    @property
    def evaluation(self) -> Any:
        """The latest `Evaluation`: in `on_evaluation` that one, with each metric's value a prompt; None before."""

    @property
    def state(self) -> Any:
        """What a checkpoint holds of the trainer, a `TrainerState`: `before`, `progress`, `utility`, ..."""


class Callback:
    """Base class for whatever wants to follow a run; override what you need, the rest does nothing.

    Callbacks run in the driver process, in the order given, and are waited for: a slow one slows training. An exception
    is not caught: it ends the run with status "failed", everything up to the last checkpoint being kept.

    A run that is killed and resumed calls `on_start` again, and repeats the steps after `trainer.steps_done` with the
    same numbers: all of them where it has no checkpoint yet. So does a trainer that goes on from another checkpoint, or
    with another config in another directory. A callback that keeps its own record must drop the later steps first; see
    `last_recorded`.

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

        Seconds are under `time/`. The keys of a component are left out where it had no value in the whole step.
        """

    def on_evaluation(self, trainer: TrainerView, evaluation: dict[str, Any]) -> None:
        """After each evaluation. `evaluation` is the line of eval.jsonl.

        Keys: `step`, `split` ("tune" or "test"), `label` ("before", "validation" or "after"), `metrics` as
        `{name: {"mean", "low", "high"}}` with 95 % bounds, `utility` among them, and `samples` as a list of
        `{"prompt", "completion", "rewards": {name: value or None}}`.
        """

    def on_failure(self, trainer: TrainerView, record: dict[str, Any]) -> None:
        """When reward rows failed. `record` is the line of failures.jsonl: `component`, `status`, `outcome`, ..."""

    def on_checkpoint(self, trainer: TrainerView, path: Path) -> None:
        """After a checkpoint folder is complete on disk."""

    def on_recorded(self, trainer: TrainerView) -> None:
        """When all that a step brought about is on disk: its line, its evaluation, its checkpoint."""

    def on_message(self, text: str) -> None:
        """A line about the run for whoever watches it; also before it starts and after its end."""

    def on_end(self, trainer: TrainerView, summary: dict[str, Any]) -> None:
        """After the last step, however the run ended. `summary` is summary.json: `status`, `reason`, `steps`, ..."""


def last_recorded(trainer: TrainerView) -> int:
    """In `on_start`: the last step whose record stands, 0 for what is measured before the first; -1 where none does."""
    # What is measured before the first step is kept as soon as a checkpoint has it.
    return trainer.steps_done if trainer.state.before else -1


class Callbacks:
    """Sends every event of a run to all who follow it, in their order."""

    def __init__(self, members: Sequence[Callback]) -> None:
        self.members = list(members)
        self._started: list[Callback] = []

    def emit(self, event: str, *args: Any) -> None:
        """Call the method `event` of everybody."""
        for member in self.members:
            getattr(member, event)(*args)
            if event == "on_start" and member not in self._started:
                self._started.append(member)

    def end(self, trainer: TrainerView, summary: dict[str, Any]) -> Exception | None:
        """Tell everybody who has started, whatever another one raises; returns the first of what they raised."""
        problems = []
        for member in self._started:
            try:
                member.on_end(trainer, summary)
            except Exception as problem:
                problems.append(problem)
        self._started = []
        return problems[0] if problems else None

    def message(self, text: str) -> None:
        self.emit("on_message", text)
