"""report.html of a search: one file that says which weights, and on what grounds; works offline."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rl_llm.files import write_text
from rl_llm.runs.report.html import (
    chart_section,
    config,
    document,
    duration,
    fact_list,
    forecast,
    heading,
    interval,
    text,
)
from rl_llm.runs.report.style import DRAW
from rl_llm.runs.results import interval_text
from rl_llm.runs.text import short
from rl_llm.search.compare import as_interval, over_seeds
from rl_llm.search.course import Entry
from rl_llm.search.front import Candidate
from rl_llm.search.reader import SEARCH, SearchFiles
from rl_llm.search.report.charts import coordinates, curves, front_data
from rl_llm.search.report.script import CSS, DRAW_FRONT
from rl_llm.search.report.svg import front_picture
from rl_llm.search.results import SearchTable, cost_of, headline, table_of
from rl_llm.search.wording import decision_lines, point_text, title_of, value_text

PICTURE = "front.svg"


def write_report(files: SearchFiles, found: Sequence[Candidate], base: Mapping[str, np.ndarray]) -> Path:
    """Write `report.html` and `front.svg` of a finished, running or killed search; returns the path of the first.

    Args:
        found: policies on the tune split.
        base: the base policy's metrics there, [P] each.
    """
    where = files.path / "report.html"
    picture = front_picture(files, found, base)
    if picture is not None:
        write_text(files.path / PICTURE, picture)
    write_text(where, page(files, found, base))
    return where


def page(files: SearchFiles, found: Sequence[Candidate], base: Mapping[str, np.ndarray]) -> str:
    """The whole document. Everything a search produced is text to this page: it is escaped, never interpreted."""
    figures: list[dict[str, Any]] = []
    table = table_of(files)
    front = front_data(files, found, base)
    charts = [chart for chart in (coordinates(files), curves(files)) if chart is not None]
    body = [
        f"<style>{CSS}</style>",
        header(files, table),
        results(table),
        front_section(front),
        forecast(files.path, figures),
        chart_section("Trials", charts, figures),
        trials(files),
        failures(files),
        decisions(files),
        config(files.path / SEARCH),
    ]
    return document(files.path.resolve().name, body, {"charts": figures, "front": front}, DRAW + DRAW_FRONT)


def header(files: SearchFiles, table: SearchTable) -> str:
    """The answer in a sentence, what it cost, and the facts of the search."""
    search, course = files.config, files.course
    states = [entry.state for entry in course.of("trial")]
    counted = {state: states.count(state) for state in ("done", "stopped", "failed", "going", "waiting")}
    steps = f"{files.run_config.trainer.steps} steps"
    budget = f"{short(search.tokens)} tokens or {steps}" if search.tokens else steps
    facts = {
        "trials": ", ".join(f"{count} {state}" for state, count in counted.items() if count) or "none yet",
        "budget of a trial": budget,
        "duration": duration(files.summary.get("seconds")),
        "recipe": search.recipe,
        "searcher": search.searcher,
        "scheduler": search.scheduler,
        "ranked by": _weighed(files.utility) or "nothing: no utility was given",
        "space": "; ".join(f"{path}: {_kind(kind)}" for path, kind in search.space.items()),
        "base policy": files.run_config.policy.model or "from scratch, warm-started",
        "data": files.run_config.task.data,
    }
    return (
        heading(files.path, files.status, files.summary.get("reason"))
        + f'<p class="answer">{text(_sentence(headline(files, table)))}</p>'
        + f'<p class="reason">{text(_sentence(str(cost_of(files))))}</p>'
        + fact_list(facts)
    )


def _sentence(said: str) -> str:
    return said[:1].upper() + said[1:] + "."


def _weighed(utility: Mapping[str, float] | None) -> str:
    return " + ".join(f"{weight:g} {name}" for name, weight in (utility or {}).items()).replace("+ -", "- ")


def _kind(kind: Mapping[str, Any]) -> str:
    shown = {name: value if isinstance(value, list) else [value] for name, value in kind.items()}
    return "; ".join(f"{name} {', '.join(map(value_text, values))}" for name, values in shown.items())


def results(table: SearchTable) -> str:
    """Finalists, controls and the base policy on the test split."""
    if not table.tested:
        return ""
    (titles, *rows), body = table.cells(), ""
    for one, row in zip(table.tested, rows, strict=True):
        strong = {"policy", "p", f"over {title_of(str(table.control))}"} if one.beats else set()
        cells = ""
        for title, cell in zip(titles, row, strict=True):
            kind = "point" if title == "point" else "value apart" if title in strong else "value"
            cells += f'<td class="{kind}">{text(cell) if title in ("policy", "point") else interval(cell)}</td>'
        body += f"<tr>{cells}</tr>"
    return section("Result", table.caption, titles, body)


def section(title: str, note: str, titles: Sequence[str], rows: str, kind: str = "") -> str:
    """A table under its heading."""
    head = "".join(f"<th>{text(name)}</th>" for name in titles)
    return (
        f'<h2>{text(title)}</h2><p class="note">{text(note)}</p>'
        f'<div class="card scroll"><table class="{kind}"><tr>{head}</tr>{rows}</table></div>'
    )


def front_section(front: Mapping[str, Any] | None) -> str:
    """The front over any two metrics, to be chosen on the page."""
    if front is None:
        return ""
    behind = f"; behind it the {front['forecast']['note']}" if front["forecast"] else ""
    note = (
        "Every policy of the search at its best evaluation on the tune split, with 95 % intervals over prompts; "
        f"dotted: those that no other one is better than in both metrics{behind}."
    )
    return (
        f'<h2>Front</h2><div class="charts"><figure class="wide"><figcaption>What trades against what'
        f'<span>{text(note)}</span></figcaption><div class="axes"><label>across <select id="front-x"></select></label>'
        '<label>up <select id="front-y"></select></label><span>hypervolume against the base policy, in its spreads: '
        '<b id="front-volume"></b></span></div><div class="plot" id="front-plot"></div></figure></div>'
    )


def trials(files: SearchFiles) -> str:
    """Every trial of any role: its point, what became of it and why."""
    rows = "".join(_trial(entry) for entry in files.course.entries.values())
    titles = ["trial", "role", "from", "point", "seed", "steps", "tokens", "tune utility", "state", "reason"]
    note = "tune utility: mean [95 % interval over prompts] at the best evaluation"
    return section("All trials", note, titles, rows, "dense") if rows else ""


def _trial(entry: Entry) -> str:
    last = entry.reports[-1] if entry.reports else None
    cells = [
        entry.name,
        entry.role,
        entry.source,
        point_text(entry.point),
        "" if entry.seed is None else str(entry.seed),
        "" if last is None else str(last.step),
        "" if last is None else short(last.tokens),
        interval_text(as_interval(over_seeds(entry.utility)) if len(entry.utility) else None),
        entry.state,
        entry.reason,
    ]
    kinds = {3: "point", 9: "why"}
    shown = (f'<td class="{kinds.get(i, "value")}">{text(cell)}</td>' for i, cell in enumerate(cells))
    return f"<tr>{''.join(shown)}</tr>"


def decisions(files: SearchFiles) -> str:
    """What was decided, in order."""
    lines = [said for line in files.decisions for said in decision_lines(line)]
    rows = "".join(f"<tr><td class=value>{i}</td><td>{text(line)}</td></tr>" for i, line in enumerate(lines, start=1))
    return section("Decisions", "as they stand in decisions.jsonl, reports left out", ["", "decision"], rows, "dense")


def failures(files: SearchFiles) -> str:
    """Trials that crashed, hung or had no value, tried again or given up."""
    rows = ""
    for line in files.decisions:
        name, reason = line.get("fail") or line.get("report"), line.get("reason") or line.get("failed")
        if name and reason:
            then = "tried again" if line.get("again") else "given up"
            rows += (
                f'<tr><td class="value">{text(name)}</td><td>{then}</td><td class="message">{text(reason)}</td></tr>'
            )
    note = "A failed trial is no bad one: it is left out of every comparison."
    return section("Failures", note, ["trial", "what became of it", "reason"], rows) if rows else ""
