"""Metrics side by side, with their intervals."""

import io
from dataclasses import dataclass

import rich.table
from rich.console import Console, RichCast
from rich.text import Text

from rl_llm.runs.reader import RunFiles
from rl_llm.runs.text import aligned

Interval = dict[str, float | None]  # mean, low, high: a metric with its 95 % bounds


@dataclass(frozen=True)
class ResultTable:
    """Metrics side by side, to print or show in a notebook; `columns` is `{column: {metric: {mean, low, high}}}`."""

    columns: dict[str, dict[str, Interval]]

    @property
    def metrics(self) -> list[str]:
        """Utility first, then in the order they were measured."""
        names = list(dict.fromkeys(name for metrics in self.columns.values() for name in metrics))
        return sorted(names, key=lambda name: name != "utility")

    def apart(self, metric: str) -> bool:
        """Whether the intervals of before and after do not overlap."""
        before, after = (self.columns.get(label, {}).get(metric, {}) for label in ("before", "after"))
        bounds = [side.get(bound) for side in (before, after) for bound in ("low", "high")]
        low, high, after_low, after_high = bounds
        if low is None or high is None or after_low is None or after_high is None:
            return False
        return after_low > high or after_high < low

    def cells(self) -> list[list[str]]:
        """Header row and one row a metric, as text."""
        rows = [["metric", *(label.replace("_", " ") for label in self.columns)]]
        for name in self.metrics:
            rows.append([name, *(interval_text(metrics.get(name)) for metrics in self.columns.values())])
        return rows

    def __rich__(self) -> rich.table.Table:
        table = rich.table.Table(
            caption=self.caption, caption_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0)
        )
        header, *rows = self.cells()
        for title in header:
            table.add_column(title, no_wrap=True)
        for row in rows:
            styles = ["bold" if title == "after" and self.apart(row[0]) else "" for title in header]
            # The interval on a line of its own: five columns then fit a terminal of 80.
            stacked = [row[0], *(cell.replace(" ", "\n", 1) for cell in row[1:])]
            table.add_row(*(Text(cell, style=style) for cell, style in zip(stacked, styles, strict=True)))
        return table

    @property
    def caption(self) -> str:
        return "mean [95 % interval] on the test split; bold: before and after do not overlap"

    def __str__(self) -> str:
        rows = [["", *self.cells()[0]], *(["*" if self.apart(row[0]) else "", *row] for row in self.cells()[1:])]
        return "\n".join([*aligned(rows), "mean [95 % interval] on the test split; *: before and after do not overlap"])

    def _repr_html_(self) -> str:
        return html_of(self, width=40 + 30 * len(self.columns))


def results_of(run: RunFiles) -> ResultTable:
    """Test-split metrics of a run before, after and for each control."""
    columns = {label: _test_metrics(run, label) for label in ("before", "after")}
    columns |= run.summary.get("controls") or {}
    return ResultTable({label: metrics for label, metrics in columns.items() if metrics})


def _test_metrics(run: RunFiles, label: str) -> dict[str, Interval]:
    noted = run.summary.get(label)
    lines = [line["metrics"] for line in run.evaluations if line["split"] == "test" and line["label"] == label]
    return noted or (lines[-1] if lines else {})


def html_of(table: RichCast, width: int) -> str:
    """A table as a notebook shows it."""
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(table)
    return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def interval_text(entry: Interval | None) -> str:
    """`0.513 [0.480, 0.551]`; - without a value."""
    mean, low, high = (entry or {}).get("mean"), (entry or {}).get("low"), (entry or {}).get("high")
    if mean is None:
        return "-"
    bounds = f" [{_number(low)}, {_number(high)}]" if low is not None and high is not None else ""
    return f"{_number(mean)}{bounds}"


def _number(value: float) -> str:
    shown = f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"
    return "0.000" if shown == "-0.000" else shown
