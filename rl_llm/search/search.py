"""A search as its user holds it: its table, its front, its best model, its report."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from rl_llm.errors import UserError
from rl_llm.files import replacing, write_text
from rl_llm.runs.run import Run
from rl_llm.search.front import Candidate, Front, candidates, make_front, objectives, pareto
from rl_llm.search.reader import SearchFiles, prompt_values
from rl_llm.search.report.html import write_report
from rl_llm.search.results import Cost, SearchTable, cost_of, headline, ranked_finalists, table_of, trials_frame
from rl_llm.search.space import Point
from rl_llm.values import to_json


def load_search(path: str | Path) -> "Search":
    """Open the directory of a search; see `SearchFiles`."""
    return Search(path)


@dataclass(frozen=True)
class Best:
    """The finalist with the highest utility on the tune split, over its seeds; the test split chooses nothing.

    Attributes:
        trial: that it was.
        point: what of the run's settings it has.
        runs: on its seeds, the highest utility on the tune split first.
    """

    trial: str
    point: Point
    runs: list[Run]

    @property
    def model(self) -> Path:
        """The folder of the first run's best policy."""
        return self.runs[0].model


class Search(SearchFiles):
    """The directory of a search with ways to look at it."""

    def table(self) -> SearchTable:
        """Finalists, controls and the base policy on the test split, with 95 % intervals over prompts and seeds."""
        return table_of(self)

    @cached_property
    def candidates(self) -> list[Candidate]:
        """Policies of every role at their best evaluations on the tune split."""
        return candidates(self)

    @cached_property
    def base_values(self) -> dict[str, np.ndarray]:
        """The base policy's metrics on the tune split, [P] each; empty where it has not been measured yet."""
        try:
            return prompt_values(self.base.evaluated("validation"))[1]
        except UserError:
            return {}

    @cached_property
    def front(self) -> Front:
        """The front in the metrics of the utility, without one in all that are measured."""
        return make_front(self.candidates, self.base_values, objectives(self))

    @property
    def best(self) -> Best:
        """Raises `UserError` where no finalist has finished."""
        ranked = ranked_finalists(self)
        if not ranked:
            why = "no finalist has finished yet" if self.utility else "without a utility nothing is the best"
            raise UserError(f"{self.path}: {why}")
        runs = ranked[0]
        return Best(runs[0].source, runs[0].point, [Run(self.folder(entry.name)) for entry in runs])

    @property
    def model(self) -> Path:
        """The folder of the best finalist's best policy. Raises `UserError` as `best`."""
        return self.best.model

    @property
    def trials(self) -> pd.DataFrame:
        """A row a trial of any role; see `trials_frame`."""
        return trials_frame(self)

    @property
    def headline(self) -> str:
        """The answer in a sentence."""
        return headline(self, self.table())

    @property
    def cost(self) -> Cost:
        """Tokens and seconds, against those of running every trial to the end."""
        return cost_of(self)

    def export(self, base: str, note: Callable[[str], None]) -> None:
        """Leave the model of each point of the front as a folder; see `export_models`."""
        from rl_llm.search.export import export_models  # with torch, which reading a search does not need

        export_models(self, self.front.points, base, note)
        del self.candidates, self.front  # they have folders now

    def report(self) -> Path:
        """Write report.html, front.svg, trials.parquet and pareto.json; returns the path of the first."""
        with replacing(self.path / "trials.parquet") as aside:
            self.trials.to_parquet(aside)
        write_text(self.path / "pareto.json", to_json(pareto(self.front)) + "\n")
        return write_report(self, self.candidates, self.base_values)

    def __repr__(self) -> str:
        return f"Search({str(self.path)!r}, {self.status}, {len(self.course.of('trial'))} trials)"

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()
