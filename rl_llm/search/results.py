"""What came out of a search: finalists beside what they are compared with, each trial, what it cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import rich.table
from rich.text import Text

from rl_llm.config import UTILITY
from rl_llm.errors import UserError
from rl_llm.runs.results import Interval, html_of, interval_text
from rl_llm.runs.text import aligned, short
from rl_llm.search.compare import as_interval, holm, mean_of, over_seeds, p_value, paired
from rl_llm.search.course import OVER, Entry
from rl_llm.search.plan import CONTROLS
from rl_llm.search.reader import SearchFiles, prompt_values
from rl_llm.search.wording import knobs, point_text, policy_of, title_of

ALPHA = 0.05


@dataclass(frozen=True)
class Tested:
    """A policy on the test split.

    Attributes:
        policy, role, point: see `policy_of`; the role of the base policy is "base".
        seeds: that it was run on.
        values: by metric, [S, P] a row a seed, NaN for none.
        over: its utility less that of the control, paired by prompt, with 95 % bounds; finalists only.
        p: of no difference, corrected for the number of finalists (Holm).
    """

    policy: str
    role: str
    point: dict[str, Any]
    seeds: int
    values: dict[str, np.ndarray]
    over: Interval | None = None
    p: float | None = None

    @property
    def title(self) -> str:
        return "base policy" if self.role == "base" else title_of(self.policy)

    @property
    def beats(self) -> bool:
        """Whether it is shown to be better than the control: the interval above 0, and the corrected p below 0.05."""
        low = (self.over or {}).get("low")
        return low is not None and low > 0 and self.p is not None and self.p < ALPHA

    def metrics(self) -> dict[str, Interval]:
        """Means with 95 % bounds over prompts and seeds."""
        return {name: as_interval(over_seeds(values)) for name, values in self.values.items()}


@dataclass(frozen=True)
class SearchTable:
    """Policies side by side on the test split, to print or show in a notebook."""

    tested: list[Tested]
    control: str | None

    @property
    def metrics(self) -> list[str]:
        """Utility first, then in the order they were measured."""
        names = dict.fromkeys(name for one in self.tested for name in one.values)
        return sorted(names, key=lambda name: name != UTILITY)

    @property
    def caption(self) -> str:
        parts = ["mean [95 % interval over prompts and seeds] on the test split"]
        if self.control is not None and any(one.over for one in self.tested):
            parts.append(
                f"over {title_of(self.control)}: difference of utility, paired by prompt; p: of no difference, "
                "corrected for the number of finalists (Holm); bold: shown to be better"
            )
        return "; ".join(parts)

    def cells(self) -> list[list[str]]:
        """Header row and one row a policy, as text."""
        compared = any(one.over for one in self.tested)
        over = [f"over {title_of(str(self.control))}", "p"] if compared else []
        rows = [["policy", "point", "seeds", *self.metrics[:1], *over, *self.metrics[1:]]]
        for one in self.tested:
            first, *rest = (interval_text(one.metrics().get(name)) for name in self.metrics)
            apart = ["" if one.over is None else interval_text(one.over), p_text(one.p)] if compared else []
            rows.append([one.title, point_text(one.point), str(one.seeds), first, *apart, *rest])
        return rows

    def __rich__(self) -> rich.table.Table:
        """For a terminal: what varies under the name, intervals of the utility alone, each on a line of its own."""
        table = rich.table.Table(
            caption=self.caption, caption_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0)
        )
        compared = any(one.over for one in self.tested)
        others = [name for name in self.metrics if name != UTILITY]
        ranked = len(others) < len(self.metrics)
        titles = [
            "policy",
            *([UTILITY] if ranked else []),
            *([f"over {title_of(str(self.control))}"] if compared else []),
        ]
        for title in [*titles, *others]:
            table.add_column(title, overflow="fold")
        for one in self.tested:
            metrics = one.metrics()
            cells = ["\n  ".join([one.title, *filter(None, point_text(one.point).split(", "))])]
            if ranked:
                cells.append(interval_text(metrics[UTILITY]).replace(" ", "\n", 1))
            if compared:
                mean, _, bounds = interval_text(one.over).partition(" ")
                cells.append(f"{mean}, p {p_text(one.p)}\n{bounds}" if one.over else "")
            cells += [interval_text(metrics.get(name)).partition(" ")[0] for name in others]
            table.add_row(*(Text(cell, style="bold" if one.beats else "") for cell in cells))
        return table

    def __str__(self) -> str:
        return "\n".join([*aligned(self.cells()), self.caption])

    def _repr_html_(self) -> str:
        return html_of(self, width=60 + 30 * len(self.metrics))


def table_of(files: SearchFiles) -> SearchTable:
    """Finalists, the best on the tune split first, controls and the base policy, as far as tested."""
    groups: dict[str, list[Entry]] = {entries[0].source: entries for entries in ranked_finalists(files)}
    for entry in files.course.entries.values():
        if entry.role == "control":
            groups.setdefault(policy_of(entry), []).append(entry)
    tested = [one for name, entries in groups.items() if (one := _tested(files, name, entries)) is not None]
    control = next((name for name in CONTROLS if any(one.policy == name for one in tested)), None)
    finalists = [one for one in tested if one.role == "finalist"]
    if control is not None and files.utility is not None:
        theirs = next(one for one in tested if one.policy == control)
        finalists = _compared(finalists, theirs)
    others = [one for one in tested if one.role != "finalist"]
    others.sort(key=lambda one: one.policy != control)
    return SearchTable([*finalists, *others, *_base(files)], control)


def ranked_finalists(files: SearchFiles) -> list[list[Entry]]:
    """The finished runs of each finalist, by utility on the tune split over their seeds, and among themselves by it."""
    found: dict[str, list[Entry]] = {}
    for entry in files.course.of("finalist"):
        if entry.state == "done" and entry.best is not None and entry.best.mean is not None:
            found.setdefault(entry.source, []).append(entry)

    def utility(*entries: Entry) -> float:
        return float(np.mean([mean_of(entry.utility) for entry in entries]))

    ranked = sorted(found.values(), key=lambda entries: -utility(*entries))
    return [sorted(entries, key=lambda entry: -utility(entry)) for entries in ranked]


def headline(files: SearchFiles, table: SearchTable) -> str:
    """What a search has found, in a sentence."""
    trials = files.course.of("trial")
    over = sum(entry.state in OVER for entry in trials)
    finalists = [one for one in table.tested if one.role == "finalist"]
    if files.utility is None:
        return f"{over} of {len(trials)} trials are over; no utility was given, so nothing is ranked"
    if not finalists:
        return f"{over} of {len(trials)} trials are over; no finalist has been tested yet"
    best = finalists[0]
    name = f"trial {best.title} ({point_text(best.point)})"
    seeds = f"{best.seeds} seed{'s' if best.seeds > 1 else ''}"
    if best.over is None or best.over["mean"] is None:
        utility = interval_text(best.metrics().get(UTILITY))
        return f"{name} is the best finalist, with a test utility of {utility} ({seeds}; there is no control beside it)"
    to, by = title_of(str(table.control)), interval_text(best.over)
    if best.beats:
        return f"{name} beat {to} by {by} in test utility ({seeds}, p {p_text(best.p)})"
    if (best.over["high"] or 0.0) < 0:
        return f"{name}, the best on the tune split, is below {to} in test utility: {by} ({seeds}, p {p_text(best.p)})"
    return (
        f"{name}, the best on the tune split, cannot be told from {to}: difference in test utility {by} "
        f"({seeds}, p {p_text(best.p)})"
    )


def _compared(finalists: list[Tested], control: Tested) -> list[Tested]:
    """The finalists with their differences to the control."""
    theirs = control.values[UTILITY]
    corrected = holm([p_value(one.values[UTILITY], theirs) for one in finalists])
    return [
        replace(one, over=as_interval(paired(one.values[UTILITY], theirs)), p=p)
        for one, p in zip(finalists, corrected, strict=True)
    ]


def _tested(files: SearchFiles, name: str, entries: Sequence[Entry]) -> Tested | None:
    tables = [values for entry in entries if (values := test_values(files, entry)) is not None]
    if not tables:
        return None
    return Tested(name, entries[0].role, entries[0].point, len(tables), _stacked(files, tables))


def _base(files: SearchFiles) -> list[Tested]:
    try:
        ids, values = prompt_values(files.base.evaluated("before"))
    except UserError:
        return []
    return [Tested("base", "base", {}, 1, _stacked(files, [(ids, values)]))]


def _stacked(files: SearchFiles, tables: Sequence[tuple[np.ndarray, dict[str, np.ndarray]]]) -> dict[str, np.ndarray]:
    """Values by metric, [S, P], of evaluations of the same prompts; the utility is left out where nothing is ranked."""
    if any(not np.array_equal(ids, tables[0][0]) for ids, _ in tables):
        raise UserError(
            f"{files.path}: test evaluations of different prompts; runs of another search are among its own"
        )
    names = [name for name in tables[0][1] if name != UTILITY or files.utility is not None]
    return {name: np.stack([values[name] for _, values in tables]) for name in names}


def test_values(files: SearchFiles, entry: Entry) -> tuple[np.ndarray, dict[str, np.ndarray]] | None:
    """Prompt ids and values by metric of a finished entry's policy on the test split; None where it was not tested."""
    if entry.state != "done":
        return None
    try:
        return prompt_values(files.run(entry.name).evaluated("after"))
    except UserError:
        return None


def p_text(p: float | None) -> str:
    if p is None or math.isnan(p):
        return ""
    return f"{p:.3f}"


@dataclass(frozen=True)
class Cost:
    """Generated tokens and seconds, those of trials that run at once added up.

    Attributes:
        trials, finalists, controls: spent on each role; soups are among the controls.
        whole: what the trials would have come to had each run to the end, at its own tokens and seconds a step.
    """

    trials: tuple[int, float]
    finalists: tuple[int, float]
    controls: tuple[int, float]
    whole: tuple[int, float]

    @property
    def share(self) -> float | None:
        """Of the tokens that all trials to the end would have taken."""
        return self.trials[0] / self.whole[0] if self.whole[0] else None

    def __str__(self) -> str:
        if self.share is None:
            return "nothing was spent yet"
        (tokens, seconds), (all_tokens, all_seconds) = self.trials, self.whole
        apart = [
            f"{name} {short(spent[0])} tokens and {short(spent[1])} s"
            for name, spent in (("finalists", self.finalists), ("controls", self.controls))
            if spent[0]
        ]
        return (
            f"trials took {short(tokens)} of the {short(all_tokens)} tokens ({self.share:.0%}) and {short(seconds)} of "
            f"the {short(all_seconds)} s that running each to the end, at the pace it had, would have taken"
            + (f"; apart from these {', '.join(apart)}" if apart else "")
        )


def cost_of(files: SearchFiles) -> Cost:
    """What the search has cost so far."""
    course = files.course
    spent = {role: _spent(course.of(role)) for role in ("trial", "finalist", "control", "soup")}
    controls = (spent["control"][0] + spent["soup"][0], spent["control"][1] + spent["soup"][1])
    wholes = []
    for entry in course.of("trial"):
        if entry.reports and entry.reports[-1].step:
            last = entry.reports[-1]
            # A budget of tokens and the steps are both an end; the nearer one is that of the whole.
            shares = [last.step / files.run_config.trainer.steps]
            shares += [last.tokens / course.plan.budget] if course.plan.in_tokens else []
            # Who ended by itself, or went on beyond a budget of tokens to its evaluation, is whole as it is.
            factor = 1.0 if entry.state == "done" else max(1 / max(shares), 1.0)
            wholes.append((last.tokens * factor, last.seconds * factor))
    count = len(course.of("trial"))
    mean = np.mean(wholes, axis=0) if wholes else np.zeros(2)
    return Cost(spent["trial"], spent["finalist"], controls, (round(mean[0] * count), float(mean[1] * count)))


def _spent(entries: Sequence[Entry]) -> tuple[int, float]:
    last = [entry.reports[-1] for entry in entries if entry.reports]
    return sum(report.tokens for report in last), sum(report.seconds for report in last)


def trials_frame(files: SearchFiles) -> pd.DataFrame:
    """A row a trial of any role: what it was, what became of it, what it cost, how good it was.

    Columns: `name`, `role`, `source`, `bracket`, `seed`, `state`, `reason`, `step`, `best_step`, `tokens`, `seconds`,
    `point/<path>`, means on the tune split `tune/<metric>` with bounds of the utility `tune/utility/low` and `/high`,
    and means on the test split `test/<metric>`.
    """
    rows = []
    for entry in files.course.entries.values():
        row = {name: getattr(entry, name) for name in ("name", "role", "source", "bracket", "seed", "state", "reason")}
        row |= {f"point/{path}": value for path, value in knobs(entry.point)}
        if entry.best is not None:
            last, best = entry.reports[-1], entry.best
            row |= {"step": last.step, "best_step": best.step, "tokens": last.tokens, "seconds": last.seconds}
            row |= {f"tune/{name}": value for name, value in best.metrics.items()}
            if best.mean is not None:
                _, low, high = over_seeds(entry.utility)
                row |= {"tune/utility": best.mean, "tune/utility/low": low, "tune/utility/high": high}
        found = test_values(files, entry)
        if found is not None:
            row |= {f"test/{name}": as_interval(over_seeds(values))["mean"] for name, values in found[1].items()}
        rows.append(row)
    return pd.DataFrame(rows)
