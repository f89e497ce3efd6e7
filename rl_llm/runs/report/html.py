"""report.html: one file that shows a run, works offline and can be sent to somebody."""

import html
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from rl_llm.config import Ramp
from rl_llm.files import write_text
from rl_llm.runs.forecasts import FORECAST, ForecastText
from rl_llm.runs.jsonl import read_json
from rl_llm.runs.reader import RunFiles
from rl_llm.runs.report.charts import Chart, mixture_charts, reward_charts, training_charts
from rl_llm.runs.report.forecast import forecast_charts
from rl_llm.runs.report.style import CSS, DRAW
from rl_llm.runs.results import interval_text, results_of
from rl_llm.runs.text import is_number, printable, prompt_text, short
from rl_llm.values import to_json

CODE_CHANGES = "code_changes/"
MESSAGE_LIMIT = 600  # characters of a failure's message


def write_report(run: RunFiles) -> Path:
    """Write `report.html` of a finished, running or killed run into its directory and return the file's path."""
    where = run.path / "report.html"
    write_text(where, page(run))
    return where


def page(run: RunFiles) -> str:
    """The whole document. Everything a run produced is text to this page: it is escaped, never interpreted."""
    sections = {
        "Rewards": reward_charts(run),
        "Mixture": mixture_charts(run),
        "Training": training_charts(run),
    }
    figures: list[dict[str, Any]] = []
    body = [
        header(run),
        code_changes(run),
        results(run),
        chart_section("Rewards", sections["Rewards"], figures),
        forecast(run.path, figures),
        samples(run),
        chart_section("Mixture", sections["Mixture"], figures),
        failures(run),
        chart_section("Training", sections["Training"], figures),
        config(run.path / "config.yaml"),
    ]
    return document(run.path.resolve().name, body, {"charts": figures}, DRAW)


def write_forecast(path: Path) -> Path:
    """Write `forecast.html` beside the forecast.json in a directory and return the file's path."""
    figures: list[dict[str, Any]] = []
    name = path.resolve().name
    body = [f"<h1>{text(name)}</h1>", forecast(path, figures)]
    where = path / "forecast.html"
    write_text(where, document(name, body, {"charts": figures}, DRAW))
    return where


def document(name: str, body: list[str], data: dict[str, Any], script: str) -> str:
    """A page of sections with a title; `script` finds each of the `data` as JSON in the element of its id."""
    # "<" inside the data could end the script element early.
    encoded = {key: to_json(values).replace("<", "\\u003c") for key, values in data.items()}
    elements = (f'<script type="application/json" id="{key}">{values}</script>' for key, values in encoded.items())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{text(name)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{CSS}</style></head><body><main>{''.join(body)}</main>"
        f"{''.join(elements)}<script>{get_plotlyjs()}</script><script>{script}</script></body></html>"
    )


def header(run: RunFiles) -> str:
    """Name, status with its reason, and the facts of the run."""
    config, summary = run.config, run.summary
    done = summary.get("steps", int(run.metrics["step"].max()) if len(run.metrics) else 0)
    facts = {
        "steps": f"{done} of {config.trainer.steps}",
        "best step": summary.get("best_step"),
        "duration": duration(summary.get("seconds")),
        "seed": config.trainer.seed,
        "algorithm": config.algorithm.name,
        "policy": config.policy.model or "from scratch, warm-started",
        "data": config.task.data,
        "samples a step": f"{config.rollout.prompts_per_step} prompts x {config.rollout.samples_per_prompt}",
        "reward": mixture_formula(run),
        "controller": config.rewards.controller and config.rewards.controller.kind,
        "bad data rows": summary.get("bad_rows"),
        "worker restarts": sum(summary.get("restarts", {}).values()) or None,
    }
    empty = "" if len(run.metrics) else '<p class="note">No step has finished.</p>'
    return heading(run.path, run.status, summary.get("reason")) + fact_list(facts) + empty


def heading(path: Path, status: str, reason: str | None) -> str:
    why = f'<p class="reason">{text(reason)}</p>' if reason else ""
    badge = f'<span class="status {text(status)}">{text(status.replace("_", " "))}</span>'
    return f"<h1>{text(path.resolve().name)} {badge}</h1>{why}"


def fact_list(facts: dict[str, Any]) -> str:
    """Names and values; those that are None are left out."""
    shown = "".join(f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in facts.items() if v is not None)
    return f"<dl>{shown}</dl>"


def code_changes(run: RunFiles) -> str:
    """Which rewards went on with other code than they began with, and since when."""
    notes = []
    for name in (column for column in run.metrics if column.startswith(CODE_CHANGES)):
        counts = run.metrics[["step", name]].dropna().drop_duplicates(name)
        steps = ", ".join(str(int(step)) for step in counts["step"])
        component = name.removeprefix(CODE_CHANGES)
        notes.append(f'<p class="reason">The code of the reward {text(component)} changed before step {steps}.</p>')
    return "".join(notes)


def mixture_formula(run: RunFiles) -> str:
    """The initial mixture as a sum, e.g. `1 chrf + 0.3 length`."""
    initial = {k: w.start if isinstance(w, Ramp) else w for k, w in run.config.rewards.weights.items()}
    formula = " + ".join(f"{weight:g} {name}" for name, weight in initial.items())
    return formula.replace("+ -", "- ")


def results(run: RunFiles) -> str:
    """Test-split metrics side by side: before, after and the controls."""
    table = results_of(run)
    if not table.columns:
        return ""
    titles, *rows = table.cells()
    head = "".join(f"<th>{text(title)}</th>" for title in titles)
    body = ""
    for name, *cells in rows:
        marks = [" apart" if table.apart(name) and title == "after" else "" for title in titles[1:]]
        values = (f'<td class="value{mark}">{interval(cell)}</td>' for mark, cell in zip(marks, cells, strict=True))
        body += f"<tr><td>{text(name)}</td>{''.join(values)}</tr>"
    return (
        f'<h2>Result</h2><p class="note">{text(table.caption)}</p>'
        f'<div class="card scroll"><table><tr>{head}</tr>{body}</table></div>'
    )


def interval(cell: str) -> str:
    mean, _, bounds = cell.partition(" ")
    return f"{text(mean)} <small>{text(bounds)}</small>"


def chart_section(title: str, charts: list[Chart], figures: list[dict[str, Any]]) -> str:
    """A grid of charts; their data is added to `figures`, which the page's script draws."""
    if not charts:
        return ""
    cells = []
    for chart in charts:
        name = f"chart-{len(figures)}"
        layout = {"showlegend": sum(trace.get("showlegend", True) for trace in chart.data) > 1, **chart.layout}
        figures.append({"id": name, "data": chart.data, "layout": layout})
        wide = ' class="wide"' if chart.wide else ""
        cells.append(
            f"<figure{wide}><figcaption>{text(chart.title)}<span>{text(chart.note)}</span></figcaption>"
            f'<div class="plot" id="{name}"></div></figure>'
        )
    return f'<h2>{text(title)}</h2><div class="charts">{"".join(cells)}</div>'


def forecast(path: Path, figures: list[dict[str, Any]]) -> str:
    """What was forecast for the directory's mixture, before any training; nothing where nobody has asked."""
    data = read_json(path / FORECAST)
    if data is None:
        return ""
    told = ForecastText(data)
    said = "".join(f"<li>{text(sentence)}</li>" for sentence in told.sentences())
    head = "".join(f"<th>{text(title)}</th>" for title in ("weighting", *told.metrics, "note"))
    body = ""
    for name, metrics, note in told.rows():
        values = "".join(
            f'<td class="value">{interval(interval_text(metrics.get(metric)))}</td>' for metric in told.metrics
        )
        body += f"<tr><td>{text(name)}</td>{values}<td>{text(note)}</td></tr>"
    table = f'<div class="card scroll"><table><tr>{head}</tr>{body}</table></div>'
    charts = chart_section("Forecast front", forecast_charts(data), figures)
    return f'<h2>Forecast</h2><ul class="note">{said}</ul>{table}{charts}'


def samples(run: RunFiles) -> str:
    """The same prompts answered by the first and by the best policy."""
    cards = []
    for first, best in sample_lines(run):
        answers = {sample["prompt"]: sample for sample in best["samples"]} if best else {}
        for sample in first["samples"]:
            after = answers.get(sample["prompt"])
            sides = side("before", first["step"], sample)
            if best and after:
                sides += side("after", best["step"], after)
            split = {"test": "test split", "tune": "tune split"}[first["split"]]
            cards.append(
                f'<div class="card sample"><span class="chip">{split}</span><pre class="prompt">'
                f'{text(prompt_text(sample["prompt"]))}</pre><div class="sides">{sides}</div></div>'
            )
    return f"<h2>Samples before and after</h2>{''.join(cards)}" if cards else ""


def sample_lines(run: RunFiles) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    """For each split the first evaluation and, if it is another, that of the best policy (in tune else the latest)."""
    pairs = []
    for split in ("test", "tune"):
        lines = [line for line in run.evaluations if line["split"] == split and line.get("samples")]
        if split == "test":
            # The last line of this split may be that of a control.
            best = [line for line in lines if line["label"] == "after"]
        else:
            best = [line for line in lines if line["step"] == run.summary.get("best_step")] or lines
        if lines:
            pairs.append((lines[0], best[-1] if best and best[-1] is not lines[0] else None))
    return pairs


def side(label: str, step: int, sample: dict[str, Any]) -> str:
    chips = "".join(
        f'<span class="chip">{text(name)} {short(value)}</span>' for name, value in sample["rewards"].items()
    )
    completion = text(sample["completion"]) or "<i>(empty)</i>"
    return f'<div class="side {label}"><b>{label}, step {step}</b><pre>{completion}</pre>{chips}</div>'


def failures(run: RunFiles) -> str:
    """Failed reward rows by component, status and outcome, each with its first message."""
    kinds: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for line in run.failures:
        kinds.setdefault((line["component"], line["status"], line["outcome"]), []).append(line)
    if not kinds:
        return ""
    rows = []
    for (component, status, outcome), lines in kinds.items():
        steps = sorted({line["step"] for line in lines})
        span = f"{steps[0]}" if len(steps) == 1 else f"{len(steps)} steps, {steps[0]} to {steps[-1]}"
        count = sum(line["rows"] for line in lines)
        cells = "".join(f'<td class="value">{text(value)}</td>' for value in (component, status, outcome, count, span))
        rows.append(f'<tr>{cells}<td class="message">{text(lines[0]["message"][:MESSAGE_LIMIT])}</td></tr>')
    titles = ("component", "what", "outcome", "rows", "steps", "first message")
    head = "".join(f"<th>{title}</th>" for title in titles)
    return (
        '<h2>Failed rewards</h2><p class="note">A failed row is never a 0: it is tried again by itself, then masked, '
        "imputed or the end of the run.</p>"
        f'<div class="card scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
    )


def config(file: Path) -> str:
    """The config file as it lies in the directory, versions included."""
    content = file.read_text(encoding="utf-8")
    shown = f'<details class="card"><summary>{text(file.name)}</summary><pre>{text(content)}</pre></details>'
    return f"<h2>Configuration</h2>{shown}"


def duration(seconds: float | None) -> str | None:
    if not is_number(seconds) or seconds is None:
        return None
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def text(value: Any) -> str:
    return html.escape(printable(str(value)))
