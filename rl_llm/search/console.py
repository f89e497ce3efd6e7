"""What the terminal shows of a search: a live table of its trials, or a plain line a report and a decision."""

import os
from pathlib import Path
from typing import Any

import rich.console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rl_llm.config import TOKENS, UTILITY
from rl_llm.runs.console import terminal
from rl_llm.runs.results import interval_text
from rl_llm.runs.text import printable, short
from rl_llm.search.compare import as_interval, column, over_seeds
from rl_llm.search.course import OVER, Course, Entry, Report
from rl_llm.search.following import Follower
from rl_llm.search.wording import decision_lines, point_text

STYLES = {"done": "green", "failed": "red", "stopped": "dim", "waiting": "dim"}


def make_search_console(console: rich.console.Console | None = None) -> "SearchConsole":
    """A live table in a terminal; plain lines in a pipe, a notebook or with RL_LLM_PLAIN=1."""
    console = console or terminal()
    plain = os.environ.get("RL_LLM_PLAIN") == "1" or console.is_jupyter or not console.is_terminal
    return SearchConsole() if plain else LiveSearchConsole(console)


class SearchConsole(Follower):
    """Plain lines on standard output, for pipes, logs and notebooks."""

    def on_line(self, course: Course, line: dict[str, Any]) -> None:
        if "report" in line:
            self._print(report_line(course.entries[line["report"]], line))
        for said in decision_lines(line):
            self._print(said)

    def on_message(self, text: str) -> None:
        self._print(text)

    def on_end(self, course: Course, summary: dict[str, Any]) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back; safe to call twice."""

    def _print(self, text: str) -> None:
        print(printable(text), flush=True)


class LiveSearchConsole(SearchConsole):
    """A row a trial at the bottom of a terminal; decisions and messages scroll above."""

    def __init__(self, console: rich.console.Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._utilities: dict[tuple[str, int], str] = {}

    def on_start(self, course: Course, path: Path) -> None:
        # No refresh from a thread: nothing is drawn between two events.
        self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="visible")
        self._live.start()
        self._draw(course)

    def on_line(self, course: Course, line: dict[str, Any]) -> None:
        if "report" not in line:
            super().on_line(course, line)
        self._draw(course)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, text: str) -> None:
        self._console.print(Text(printable(text)))

    def _draw(self, course: Course) -> None:
        if self._live is not None:
            self._live.update(self._table(list(course.entries.values())), refresh=True)

    def _table(self, entries: list[Entry]) -> Table:
        room = max(self._console.height - 4, 3)
        # Where there are more than the terminal has lines for, those that are over make room.
        urgent = sorted(entries, key=lambda entry: entry.state in OVER)[:room]
        shown = [entry for entry in entries if entry in urgent]
        rows = [self._cells(entry) for entry in shown]
        # Points and reasons share what the other columns leave.
        widths = [max(map(len, column)) for column in zip(TITLES, *rows, strict=True)]
        left = self._console.width - sum(widths) - 2 * len(widths) + widths[POINT] + widths[REASON]
        point = min(widths[POINT], max(left * 3 // 5, 12))
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for title in TITLES:
            table.add_column(title, justify="right" if title in ("step", "tokens") else "left", no_wrap=True)
        for entry, cells in zip(shown, rows, strict=True):
            cells[POINT], cells[REASON] = _cut(cells[POINT], point), _cut(cells[REASON], left - point)
            table.add_row(*(Text(printable(cell)) for cell in cells), style=STYLES.get(entry.state, ""))
        if len(shown) < len(entries):
            table.add_row(Text(f"and {len(entries) - len(shown)} more", style="dim"))
        return table

    def _cells(self, entry: Entry) -> list[str]:
        """Under `TITLES`; the utility is that of the last evaluation, with 95 % bounds over prompts."""
        step = tokens = utility = ""
        if entry.reports:
            last = entry.reports[-1]
            step, tokens, at = str(last.step), short(last.tokens), (entry.name, last.step)
            if at not in self._utilities:
                self._utilities[at] = utility_text(last)
            utility = self._utilities[at]
        point, reason = point_text(entry.point), entry.reason.replace("\n", " ")
        return [entry.name, entry.role, point, step, utility, tokens, entry.state, reason]


TITLES = ("trial", "role", "point", "step", "utility", "tokens", "state", "reason")
POINT, REASON = TITLES.index("point"), TITLES.index("reason")


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: max(width - 1, 0)]}…"


def report_line(entry: Entry, line: dict[str, Any]) -> str:
    """`t03 step 20  utility 0.71 [0.62, 0.80]  chrf 0.41  18k tokens  finished`."""
    if line["failed"]:
        return f"{entry.name} failed: {line['failed']}"
    report = Report(**{key: value for key, value in line.items() if key != "report"})
    parts = [f"{entry.name} step {report.step}"]
    if report.mean is not None:
        parts.append(f"utility {utility_text(report)}")
    parts += [f"{name} {short(value)}" for name, value in report.metrics.items() if name not in (UTILITY, TOKENS)]
    return "  ".join([*parts, f"{short(report.tokens)} tokens", *filter(None, [report.ended])])


def utility_text(report: Report) -> str:
    return interval_text(as_interval(over_seeds(column(report.utility))))
