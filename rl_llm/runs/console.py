"""What the terminal shows of a run: a progress bar over a live table, or a plain line a step."""

import os
import pdb
import re
import sys
from collections import deque
from typing import Any

import rich.console
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from rl_llm.runs.callbacks import Callback, TrainerView
from rl_llm.runs.text import is_number, one_line, printable, prompt_text, short, sparkline

DUMB = ("dumb", "unknown")
HISTORY = 30  # steps in a sparkline


def terminal() -> rich.console.Console:
    """Standard output: with colours and width of a terminal where it is one, plain elsewhere and where TERM=dumb.

    Whatever FORCE_COLOR says, which those who read a terminal's output otherwise set, such as CI.
    """
    stdout = sys.stdout
    plain = os.environ.get("TERM", "") in DUMB or stdout is None or stdout.closed or not stdout.isatty()
    return rich.console.Console(force_terminal=False if plain else None)


def make_console(console: rich.console.Console | None = None) -> "Console":
    """A live display in a terminal; plain lines in a pipe, a notebook, under a debugger or with RL_LLM_PLAIN=1.

    `breakpoint()` inside a reward ends the live display; for other debuggers there is RL_LLM_PLAIN=1.
    """
    console = console or terminal()
    plain = os.environ.get("RL_LLM_PLAIN") == "1" or sys.gettrace() is not None
    return Console() if plain or console.is_jupyter or not console.is_terminal else LiveConsole(console)


class Console(Callback):
    """Plain lines on standard output, for pipes, logs, notebooks and debuggers.

    A terminal can hold up who prints to it for as long as it likes, so a step is shown once it is recorded.
    """

    def __init__(self) -> None:
        self._waiting: list[str] = []

    def on_step(self, trainer: TrainerView, metrics: dict[str, Any]) -> None:
        self._waiting.append(step_line(metrics, trainer.config.trainer.steps))

    def on_evaluation(self, trainer: TrainerView, evaluation: dict[str, Any]) -> None:
        self._waiting += evaluation_lines(evaluation)

    def on_recorded(self, trainer: TrainerView) -> None:
        self._show()

    def on_failure(self, trainer: TrainerView, record: dict[str, Any]) -> None:
        if record["outcome"] != "raise":  # what is raised is shown as what ended the run
            rows = f"{record['rows']} row{'s' if record['rows'] > 1 else ''}"
            what = {"mask": "masked", "impute": "imputed", "retried": "fine one by one"}[record["outcome"]]
            self.on_message(f"{record['component']}: {rows} {what}, {record['status']}: {record['message']}")

    def on_message(self, text: str) -> None:
        self._waiting.append(text)
        self._show()

    def on_end(self, trainer: TrainerView, summary: dict[str, Any]) -> None:
        self.close()

    def close(self) -> None:
        """Show what is still to be shown and give the terminal back; safe to call twice."""
        self._show()

    def _show(self) -> None:
        waiting, self._waiting = self._waiting, []
        for text in waiting:
            self._print(printable(text))

    def _print(self, text: str) -> None:
        print(text, flush=True)


class LiveConsole(Console):
    """A progress bar and the latest metrics at the bottom of a terminal, messages and samples scrolling above."""

    def __init__(self, console: rich.console.Console) -> None:
        super().__init__()
        self._console = console
        self._live: Live | None = None

    def on_start(self, trainer: TrainerView) -> None:
        self.close()
        self._history: dict[str, deque[float]] = {}
        self._failures: dict[str, int] = {}
        self._metrics: dict[str, Any] = {}
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=self._console)
        self._bar = self._progress.add_task("", total=trainer.config.trainer.steps, completed=trainer.steps_done)
        # No refresh from a thread: whatever a reward does with the terminal, nothing redraws until the step is over.
        self._live = Live(self._render(), console=self._console, auto_refresh=False)
        self._live.start(refresh=True)
        if "PYTHONBREAKPOINT" not in os.environ:
            sys.breakpointhook = self._breakpoint

    def _breakpoint(self, *args: Any, **kwargs: Any) -> None:
        """What `breakpoint()` does while the display is up: give the terminal to pdb and go on in plain lines."""
        self.close()
        pdb.Pdb(skip=[__name__]).set_trace()

    def on_step(self, trainer: TrainerView, metrics: dict[str, Any]) -> None:
        if not self._live:
            super().on_step(trainer, metrics)
            return
        self._metrics.update(metrics)
        for name, value in metrics.items():
            if name.startswith("failures/"):
                component = name.removeprefix("failures/")
                self._failures[component] = self._failures.get(component, 0) + value
        self._remember({name: metrics.get(name) for name in shown_metrics(metrics)})
        self._progress.update(self._bar, completed=metrics["step"])

    def on_evaluation(self, trainer: TrainerView, evaluation: dict[str, Any]) -> None:
        super().on_evaluation(trainer, evaluation)
        if evaluation["split"] == "tune" and self._live:
            utility = (evaluation["metrics"].get("utility") or {}).get("mean")
            self._metrics["utility"] = utility
            self._remember({"utility": utility})

    def _print(self, text: str) -> None:
        self._console.print(Text(text))

    def close(self) -> None:
        super().close()
        if self._live:
            self._live.stop()
            self._live = None
            sys.breakpointhook = sys.__breakpointhook__

    def _show(self) -> None:
        super()._show()
        if self._live:
            self._live.update(self._render(), refresh=True)

    def _remember(self, values: dict[str, float | None]) -> None:
        for name, value in values.items():
            if is_number(value):
                self._history.setdefault(name, deque(maxlen=HISTORY)).append(float(value))  # type: ignore[arg-type]

    def _render(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for name, label in (shown_metrics(self._metrics) | {"utility": "utility"}).items():
            if name in self._history:
                value = self._metrics.get(name)
                table.add_row(Text(label), Text(short(value), justify="right"), Text(sparkline(self._history[name])))
        for name, rows in self._failures.items():
            if rows:
                table.add_row(Text(f"{name} failures", style="red"), Text(short(rows), style="red"), "")
        return Group(Rule(style="dim"), table, self._progress)


def shown_metrics(metrics: dict[str, Any]) -> dict[str, str]:
    """The few metrics worth a line, in order, with their labels: reward, components, length, KL, speed."""
    components = [name for name in metrics if re.fullmatch("reward/.+/mean", name) and "/extra/" not in name]
    labels = {"reward/mean": "reward"}
    labels |= {name: name.removeprefix("reward/").removesuffix("/mean") for name in components}
    labels |= {"completion/length": "len", "kl": "kl", "tokens_per_second": "tok/s"}
    return {name: label for name, label in labels.items() if name in metrics}


def step_line(metrics: dict[str, Any], steps: int) -> str:
    """`step 12/100  reward 0.513  chrf 0.62  len 18.3  kl 0.001  1.2k tok/s`, then failures if there are any."""
    parts = [f"step {metrics['step']}/{steps}"]
    for name, label in shown_metrics(metrics).items():
        value = short(metrics[name])
        parts.append(f"{value} {label}" if name == "tokens_per_second" else f"{label} {value}")
    failed = {name.removeprefix("failures/"): rows for name, rows in metrics.items() if name.startswith("failures/")}
    parts += [f"{name} failed on {short(rows)}" for name, rows in failed.items() if rows]
    return "  ".join(parts)


def evaluation_lines(line: dict[str, Any]) -> list[str]:
    """A heading with every metric and its interval, then each sample's prompt, completion and component rewards."""
    lines = [f"{line['label']} on {line['split']} at step {line['step']}"]
    for name, entry in line["metrics"].items():
        bounds = f"  [{short(entry['low'])}, {short(entry['high'])}]" if is_number(entry.get("low")) else ""
        lines.append(f"  {name} {short(entry['mean'])}{bounds}")
    for sample in line.get("samples", []):
        rewards = "  ".join(f"{name} {short(value)}" for name, value in sample["rewards"].items())
        lines += [
            f"  > {one_line(prompt_text(sample['prompt']))}",
            f"  < {one_line(sample['completion'])}",
            f"    {rewards}",
        ]
    return lines
