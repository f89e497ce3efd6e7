"""Equal weights, what a search hands on, and each rule that moves weights: three tasks, equal tokens, one table.

    python benchmarks/weights.py [--synopsis FILE] [--task NAME ...] [--seeds 3] [--steps 54] [--output FOLDER]

The tasks are the quickstart, `style` of forecast.py, and a problem of trap.py; with a FILE of synopses its `synopsis`,
real text, takes the third place. Everything on a task begins from one warm-started policy.

- The budget is the tokens that equal weights generate in the given number of steps, evaluations included: measured,
  once a task. Every other run ends at the first evaluation at or past it, or after twice the steps where its texts are
  so short. So that nothing hangs on how many steps a budget comes to, the learning rate is constant after its warm-up.
- "search" is the best of 8 weightings, by halving on that budget a trial, trained again. What finding it took is not
  in its budget; it stands below the table.
- The rules set out from equal weights. `variance` needs `normalize_then_sum` and `hypervolume` an advantage that is
  not divided by its spread, here `dr_grpo`: these two are compared with equal weights under the same setting.
- `constraint` needs bounds, and they are set by a rule: a component that has full marks which any text can get is held
  at nine tenths of them, the others are maximised.

All run on the same fresh seeds. The best policy of a run by the utility on the tune split, its first one included, is
what counts, and its test prompts are what is shown: the mean utility of the seeds, the lowest and the highest, and the
difference to equal weights with a 95 % bootstrap interval over prompts and seeds, paired by prompt; bold where it does
not hold 0. The utility is that of the task in spreads of the base policy, not clipped.

What is there already is not run again: an interrupted benchmark goes on.
"""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# As the commands do, and before torch is there: threads that wait spinning slow the processes beside them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pyarrow.parquet as pq
from forecast import settings_of
from search_cost import tokens
from trap import Problem

from rl_llm.imports import look_in
from rl_llm.launch.preflight import load_tokenizer
from rl_llm.runs.text import short
from rl_llm.search.compare import paired
from rl_llm.search.config import build_search
from rl_llm.search.forecasting import TABLE
from rl_llm.search.launching import run_search
from rl_llm.search.search import Search
from rl_llm.search.space import CONTROLLER, WEIGHTS, Point, put
from rl_llm.search.wording import RECIPE, point_text
from rl_llm.trainer.utility import base_statistics

FULL_MARKS = {
    "quickstart": ("facts", "sentence"),
    "style": ("chatty", "long"),
    "trap": ("match",),
    "synopsis": ("short",),
}
"""Components of which 1 is the most, and which any text can have whole. Of chrF nobody knows what can be reached."""
HELD = 0.9
TRAP = 1000  # one of the problems that trap.py was made with
EQUAL = "equal weights"
SETTINGS: tuple[tuple[Point, tuple[str, ...]], ...] = (
    ({}, ("constraint", "variation")),
    ({"rewards.combine": "normalize_then_sum"}, ("variance",)),
    ({"algorithm.name": "dr_grpo"}, ("hypervolume",)),
)
"""Settings of runs, and the rules that are compared with equal weights under them."""
NO_SEARCH = {"scheduler": "none", "finalists": 0, "controls": False, "forecast": 0, "overoptimized": 0}


@dataclass(frozen=True)
class Row:
    """A way to weigh, on a task.

    Attributes:
        utility: on the test split, [S, P], NaN for none.
        tokens: that each seed's run generated.
    """

    utility: np.ndarray
    tokens: list[int]

    def cells(self, control: "Row", budget: int) -> list[str]:
        means, shares = np.nanmean(self.utility, axis=1), [spent / budget for spent in self.tokens]
        mean, low, high = paired(self.utility, control.utility)
        over = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
        return [
            f"{means.mean():.2f} ({means.min():.2f} to {means.max():.2f})",
            "" if self is control else f"**{over}**" if low > 0 or high < 0 else over,
            f"{min(shares):.0%} to {max(shares):.0%}",
        ]


def settings(name: str, data: str | None, steps: int, folder: Path) -> dict[str, Any]:
    """The plain settings of a task's runs, their weights equal."""
    given = Problem(TRAP).settings(folder) if name == "trap" else settings_of(name, data, None).to_dict()
    components = given["rewards"]["components"]
    point = {
        WEIGHTS: {component: 1 / len(components) for component in components},
        "learner.schedule": "constant",
        "trainer.steps": 2 * steps,
        "evaluation.every": max(1, round(steps / 9)),
    }
    return put(given, point)


def searched(run: dict[str, Any], path: Path, **rest: Any) -> Search:
    return run_search(build_search({"run": run, **rest}), path, resume=True)


def budget_of(run: dict[str, Any], steps: int, path: Path) -> int:
    """Tokens that equal weights generate in some steps."""
    space = {CONTROLLER: {"grid": [None]}}
    found = searched(put(run, {"trainer.steps": steps}), path, space=space, searcher="grid", **NO_SEARCH)
    return tokens(found.course)


def rule(kind: str, held: tuple[str, ...]) -> dict[str, Any]:
    if kind != "constraint":
        return {"kind": kind}
    return {"kind": kind, "constraints": {component: {"at_least": HELD} for component in held}}


def rows_of(search: Search) -> dict[str, Row]:
    """What was run on the fresh seeds, by name: equal weights, the search's result, each rule."""
    statistics = base_statistics(search.base_values)
    rows = {}
    for one in search.table().tested:
        entries = [entry for entry in search.course.entries.values() if entry.source == one.policy]
        if not entries:
            continue  # the base policy
        name = EQUAL if one.policy == RECIPE else (one.point.get(CONTROLLER) or {"kind": "search"})["kind"]
        terms = [
            weight * (one.values[metric] - statistics[metric][0]) / statistics[metric][1]
            for metric, weight in (search.utility or {}).items()
        ]
        rows[name] = Row(np.sum(terms, axis=0), [entry.reports[-1].tokens for entry in entries])
    return rows


def cost(search: Search, budget: int) -> str:
    """What it took to find the weights, in runs of the budget."""
    texts = pq.read_table(search.path / TABLE)["completion"].to_pylist()
    ids = load_tokenizer(str(search.model))(texts, add_special_tokens=False)["input_ids"]
    forecast = sum(len(row) + 1 for row in ids)  # and the end
    return (
        f"the search took {tokens(search.course) / budget:.1f} runs' tokens for its trials and {forecast / budget:.1f} "
        f"for its forecast, and found {point_text(search.best.point)}"
    )


def run_task(name: str, data: str | None, steps: int, seeds: int, folder: Path) -> tuple[list[str], str]:
    """The lines of a task in the table, and one on its search."""
    folder.mkdir(parents=True, exist_ok=True)
    run = settings(name, data, steps, folder)
    budget = budget_of(run, steps, folder / "budget")
    rest: dict[str, Any] = {"tokens": budget, "seeds": seeds}
    space = {WEIGHTS: {"simplex": list(run["rewards"]["components"])}}
    search = searched(run, folder / "search", space=space, trials=8, finalists=1, controls=False, **rest)
    lines = []
    for point, kinds in SETTINGS:
        grid = {CONTROLLER: {"grid": [rule(kind, FULL_MARKS[name]) for kind in kinds]}}
        fixed = {"space": grid, "searcher": "grid", "finalists": len(kinds)}
        rows = rows_of(searched(put(run, point), folder / "-".join(kinds), **fixed, **rest))
        under = "".join(f", {value}" for value in point.values())
        rows |= {} if point else rows_of(search)
        for title in (EQUAL, *([] if point else ["search"]), *kinds):
            cells = rows[title].cells(rows[EQUAL], budget)
            lines.append(f"| {' | '.join((name, title + under, *cells))} |")
    return lines, f"{name}: a run is {short(budget)} tokens; {cost(search, budget)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--synopsis", metavar="FILE")
    parser.add_argument("--task", action="append", choices=list(FULL_MARKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=54, help="of the run of equal weights that sets the budget")
    parser.add_argument("--output", type=Path, default=Path("runs/weights"))
    given = parser.parse_args()
    look_in(Path(__file__).parent)
    names = given.task or ["quickstart", "style", "synopsis" if given.synopsis else "trap"]
    lines, notes = [], []
    for name in names:
        data = given.synopsis if name == "synopsis" else None
        rows, about = run_task(name, data, given.steps, given.seeds, given.output / name)
        lines += rows
        notes.append(about)
    print("| task | weights | test utility | over equal weights | tokens of the budget |")
    print("|---" * 5 + "|")
    print("\n".join([*lines, "", *notes]))


if __name__ == "__main__":
    main()
