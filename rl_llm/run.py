"""A finished, running or killed run, read from its directory."""

import io
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import rich.table
import yaml
from rich.console import Console
from rich.text import Text

from rl_llm.config import RunConfig, build_config
from rl_llm.errors import UserError
from rl_llm.logger import read_jsonl

Interval = dict[str, float | None]  # mean, low, high: a metric with its 95 % bounds


def load_run(path: str | Path) -> "Run":
    """Open a run directory; see `Run`."""
    return Run(path)


class Run:
    """Everything a run left in its directory. Files are read when first asked for; a new `Run` sees newer ones.

    Args:
        path: the run directory.

    Raises:
        UserError: there is no run at `path`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "config.yaml").is_file():
            raise UserError(f"{self.path} is no run directory (no config.yaml in it); give the --output of a run")

    @cached_property
    def config(self) -> RunConfig:
        """The resolved config, without the library versions that its file also notes."""
        where = self.path / "config.yaml"
        raw = yaml.safe_load(where.read_text(encoding="utf-8"))
        return build_config({key: raw[key] for key in RunConfig.model_fields if key in raw}, where=str(where))

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """metrics.jsonl, a row a step and a column a metric; NaN where a step has no such value."""
        frame = pd.DataFrame(read_jsonl(self.path / "metrics.jsonl"))
        return frame.apply(pd.to_numeric) if len(frame) else pd.DataFrame({"step": pd.Series(dtype="int64")})

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """eval.jsonl: `step`, `split`, `label`, `metrics` as `{name: {mean, low, high}}`, `samples`."""
        return read_jsonl(self.path / "eval.jsonl")

    @cached_property
    def failures(self) -> list[dict[str, Any]]:
        """failures.jsonl: `step`, `component`, `status`, `rows`, `outcome`, `message`, `prompt_ids`."""
        return read_jsonl(self.path / "failures.jsonl")

    @cached_property
    def summary(self) -> dict[str, Any]:
        """summary.json; empty while the run is going on or after it was killed."""
        where = self.path / "summary.json"
        return json.loads(where.read_text(encoding="utf-8")) if where.is_file() else {}

    @property
    def model(self) -> Path:
        """The folder of the best policy, which `transformers` loads.

        Raises:
            UserError: the run has not saved one yet.
        """
        folder = self.path / "model"
        if not folder.is_dir():
            raise UserError(f"{self.path} has no model/ yet; finish the run with --resume")
        return folder

    @property
    def rollout_steps(self) -> list[int]:
        """The steps whose rollout tables were kept, in order."""
        return sorted(int(file.stem.removeprefix("step-")) for file in self.path.glob("rollouts/step-*.parquet"))

    def rollouts(self, step: int | None = None) -> pa.Table:
        """The rollout table of one step as trained on, or of all kept steps one after the other with a `step` column.

        Raises:
            UserError: no table, or not that step's, was kept.
        """
        kept = self.rollout_steps
        if not kept:
            raise UserError(f"{self.path} has no rollout tables; logging.rollouts says how many a run keeps")
        if step is None:
            tables = [self.rollouts(number) for number in kept]
            numbers = np.repeat(kept, [table.num_rows for table in tables])
            whole = pa.concat_tables(tables, promote_options="default")
            return whole.add_column(0, "step", pa.array(numbers, pa.int64()))
        if step not in kept:
            raise UserError(f"{self.path} has no rollout table of step {step}; kept: {kept[0]} to {kept[-1]}")
        return pq.read_table(self.path / "rollouts" / f"step-{step:06d}.parquet")

    def table(self) -> "ResultTable":
        """Test-split metrics before, after and for each control, with 95 % intervals."""
        columns = {label: self._test_metrics(label) for label in ("before", "after")}
        columns |= self.summary.get("controls") or {}
        return ResultTable({label: metrics for label, metrics in columns.items() if metrics})

    def _test_metrics(self, label: str) -> dict[str, Interval]:
        noted = self.summary.get(label)
        lines = [line["metrics"] for line in self.evaluations if line["split"] == "test" and line["label"] == label]
        return noted or (lines[-1] if lines else {})

    def report(self) -> Path:
        """Write report.html, one file that works offline, and return its path."""
        from rl_llm.report.html import write_report  # here, because the report itself reads runs

        return write_report(self.path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self.status}, {len(self.metrics)} steps)"

    @property
    def status(self) -> str:
        """finished, stopped_early, interrupted or failed; "running or killed" while there is no summary."""
        return str(self.summary.get("status") or "running or killed")

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


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
            rows.append([name, *(_interval(metrics.get(name)) for metrics in self.columns.values())])
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
        widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, "mean [95 % interval] on the test split; *: before and after do not overlap"])

    def _repr_html_(self) -> str:
        console = Console(record=True, width=40 + 30 * len(self.columns), file=io.StringIO())
        console.print(self)
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def _interval(entry: Interval | None) -> str:
    mean, low, high = (entry or {}).get("mean"), (entry or {}).get("low"), (entry or {}).get("high")
    if mean is None:
        return "-"
    bounds = f" [{_number(low)}, {_number(high)}]" if low is not None and high is not None else ""
    return f"{_number(mean)}{bounds}"


def _number(value: float) -> str:
    shown = f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"
    return "0.000" if shown == "-0.000" else shown
