"""What a search left in its directory, as data: finished, running or killed."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rl_llm.config import RunConfig
from rl_llm.errors import UserError, option
from rl_llm.runs.forecasts import FORECAST
from rl_llm.runs.jsonl import read_json, read_jsonl
from rl_llm.runs.reader import RunFiles
from rl_llm.search.config import SearchConfig, load_search, run_of
from rl_llm.search.course import Course, Plan
from rl_llm.search.ledger import DECISIONS, Ledger
from rl_llm.search.plan import utility_of
from rl_llm.search.schedulers import Plain, levels_of
from rl_llm.search.searchers import Outcome
from rl_llm.search.space import Point

SEARCH, BASE, TRIALS = "search.yaml", "base", "trials"


def is_search(path: Path) -> bool:
    """Whether a directory is that of a search."""
    return (path / SEARCH).is_file()


class SearchFiles:
    """Everything a search left in its directory. Files are read when first asked for; a new one sees newer ones.

    Args:
        path: the search's directory.

    Raises:
        UserError: there is no search at `path`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not is_search(self.path):
            of_a_search = f"give the {option('output')} of a search"
            raise UserError(f"{self.path} is no search directory (no {SEARCH} in it); {of_a_search}")

    @cached_property
    def config(self) -> SearchConfig:
        """The resolved search."""
        return load_search(self.path / SEARCH)

    @cached_property
    def run_config(self) -> RunConfig:
        """The config that trials are made from."""
        return run_of(self.config)

    @cached_property
    def utility(self) -> dict[str, float] | None:
        """What ranks: weight by metric; None where nothing does."""
        return utility_of(self.config, self.run_config)

    @cached_property
    def decisions(self) -> list[dict[str, Any]]:
        """The lines of decisions.jsonl, in their order."""
        return read_jsonl(self.path / DECISIONS)

    @cached_property
    def course(self) -> Course:
        """The search as far as its decisions say; it decides nothing more."""
        return _Past(self.config, self.run_config, self.utility is not None, self.decisions)

    @cached_property
    def base(self) -> RunFiles:
        """The evaluations of the policy before training."""
        return RunFiles(self.path / BASE)

    def run(self, name: str) -> RunFiles:
        """The run directory of a trial of any role."""
        return RunFiles(self.folder(name))

    def folder(self, name: str) -> Path:
        return self.path / TRIALS / name

    @cached_property
    def forecast(self) -> dict[str, Any] | None:
        """forecast.json; None where no forecast was made."""
        return read_json(self.path / FORECAST)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """summary.json; empty while the search is going on or after it was killed."""
        return read_json(self.path / "summary.json") or {}

    @property
    def status(self) -> str:
        """finished, interrupted or failed; "running or killed" while there is no summary."""
        return str(self.summary.get("status") or "running or killed")


class _Past(Course):
    """A course that only takes what was decided."""

    def __init__(self, config: SearchConfig, run: RunConfig, ranked: bool, lines: list[dict[str, Any]]) -> None:
        in_tokens = config.tokens is not None
        plan = Plan(
            trials=config.trials,
            bracket=config.trials,
            firsts=[],
            controls=[],
            finalists=config.finalists,
            seeds=[],
            soups=lambda controls: [],
            budget=config.tokens or run.trainer.steps,
            in_tokens=in_tokens,
            overoptimized=config.overoptimized,
        )
        ledger = Ledger()
        ledger.lines = lines
        super().__init__(plan, _Deaf(), Plain(levels_of(config, run.trainer.steps)), ranked, ledger)

    def _decide(self) -> None:
        pass


class _Deaf:
    """A searcher that is asked nothing."""

    name = ""

    def ask(self, number: int, given: Point | None) -> Point:
        raise AssertionError("a course that is only read decides nothing, so nobody asks")

    def asked(self, number: int, point: Point) -> None:
        pass

    def tell(self, number: int, outcome: Outcome) -> None:
        pass


def prompt_values(table: pa.Table) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """An evaluation's table as prompt ids, [P], and each metric's values, float64 [P], NaN for none."""
    columns = {
        name: table[name].to_numpy(zero_copy_only=False).astype(np.float64)
        for name in table.column_names
        if name != "prompt_id"
    }
    return table["prompt_id"].to_numpy(), columns
