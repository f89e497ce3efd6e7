"""A run as its user holds it: its files, its table, its report."""

from pathlib import Path

from rl_llm.runs.reader import RunFiles
from rl_llm.runs.report.html import write_report
from rl_llm.runs.results import ResultTable, results_of


def load_run(path: str | Path) -> "Run":
    """Open a run directory; see `RunFiles`."""
    return Run(path)


class Run(RunFiles):
    """A run directory with ways to look at it."""

    def table(self) -> ResultTable:
        """Test-split metrics before, after and for each control, with 95 % intervals."""
        return results_of(self)

    def report(self) -> Path:
        """Write report.html, one file that works offline, and return its path."""
        return write_report(self)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self.status}, {len(self.metrics)} steps)"

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()
