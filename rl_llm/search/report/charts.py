"""The report's charts as plain plotly figures, and the data of the front's."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rl_llm.config import UTILITY, RunConfig
from rl_llm.runs.report.charts import COLORS, GREY, Chart
from rl_llm.runs.results import interval_text
from rl_llm.runs.text import is_number, printable
from rl_llm.search.compare import over_seeds
from rl_llm.search.course import Entry
from rl_llm.search.front import Candidate, directions, in_conflict, non_dominated, objectives, pairs
from rl_llm.search.plan import CONTROLS
from rl_llm.search.reader import SearchFiles
from rl_llm.search.space import WEIGHTS, Point
from rl_llm.search.wording import knobs, point_text, policy_of, title_of

INK = "#1c2430"
FAR_APART = 50.0  # a knob whose largest value is so many times its smallest is drawn on a logarithmic axis
ENDS = {"done": "circle", "stopped": "x", "failed": "x-open", "waiting": "circle-open", "going": "circle-open"}


def front_data(files: SearchFiles, found: Sequence[Candidate], base: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
    """What the front's chart is drawn from, for every two metrics; None where there are no two."""
    known = directions(files) | ({UTILITY: 1} if files.utility else {})
    axes = {name: sign for name, sign in known.items() if name in base}
    chosen = default_axes(files, found, base)
    if chosen is None:
        return None
    names = list(axes)
    fronts = pairs(found, base, axes)
    first = {(one.role, one.policy): one.name for one in reversed(found)}  # one of its seeds has the name
    number = {one.name: index for index, one in enumerate(found)}
    return {
        "axes": [{"name": printable(name), "label": label(name)} for name in names],
        "x": names.index(chosen[0]),
        "y": names.index(chosen[1]),
        "points": [
            {
                "kind": one.role,
                "label": label(title_of(one.policy)) if first[one.role, one.policy] == one.name else "",
                "text": _hover(one),
                "at": [_bounds(one.values.get(name)) for name in names],
            }
            for one in found
        ],
        "base": [_bounds(base[name]) for name in names],
        "pairs": {
            f"{names.index(x)},{names.index(y)}": {
                "front": [number[one.name] for one in front.points],
                "hypervolume": interval_text(front.hypervolume),
            }
            for (x, y), front in fronts.items()
        },
        "forecast": _forecast(files, names, axes),
    }


def default_axes(
    files: SearchFiles, found: Sequence[Candidate], base: Mapping[str, np.ndarray]
) -> tuple[str, str] | None:
    """The two of the objectives that are in conflict, else of all metrics; None where there are not two."""
    return in_conflict(found, base, objectives(files)) or in_conflict(found, base, directions(files))


def forecast_points(forecast: Mapping[str, Any], x: str, y: str) -> list[tuple[Mapping[str, Any], float, float]]:
    """Points of a forecast with their means in two metrics; those without a value are left out."""
    found = []
    for point in forecast.get("points", []):
        means = [(point["metrics"].get(name) or {}).get("mean") for name in (x, y)]
        across, up = map(_number, means)
        if not math.isnan(across + up):
            found.append((point, across, up))
    return found


def _forecast(files: SearchFiles, names: list[str], signs: Mapping[str, int]) -> dict[str, Any] | None:
    forecast = files.forecast
    if forecast is None:
        return None
    points = forecast.get("points", [])
    means = np.array([[_number((point["metrics"].get(name) or {}).get("mean")) for name in names] for point in points])
    means = means.reshape(len(points), len(names))
    turned = means * np.array([signs[name] for name in names])
    fronts = {}
    for i in range(len(names)):
        for j in range(i + 1, len(names)):
            pair = np.stack([turned[:, i], turned[:, j]], axis=1)
            there = np.flatnonzero(~np.isnan(pair).any(axis=1))
            if len(there):
                fronts[f"{i},{j}"] = there[non_dominated(pair[there])].tolist()
    return {
        "text": [label(point_text({"weights": point["weights"]})) for point in points],
        "at": [[None if math.isnan(value) else value for value in row] for row in means.tolist()],
        "fronts": fronts,
        "note": _basis(files, forecast),
    }


def _basis(files: SearchFiles, forecast: Mapping[str, Any]) -> str:
    greedy = files.run_config.evaluation.temperature == 0
    apart = "; it is of sampled answers, and evaluations are greedy" if greedy else ""
    return f"forecast at a KL of {forecast['kl']:.2f} nats from {forecast['samples']} samples a prompt{apart}"


def _hover(one: Candidate) -> str:
    lines = [f"<b>{label(one.name)}</b>, step {one.step}", *map(label, point_text(one.point).split(", "))]
    return "<br>".join(line for line in lines if line)


def _bounds(values: np.ndarray | None) -> list[float | None] | None:
    if values is None or np.isnan(values).all():
        return None
    return list(over_seeds(values))


def coordinates(files: SearchFiles) -> Chart | None:
    """Parallel coordinates: each trial that has not failed a line through its knobs and its results."""
    trials = [entry for entry in files.course.of("trial") if entry.best is not None and entry.state != "failed"]
    rows: list[dict[str, Any]] = []
    for entry in trials:
        best = entry.best
        assert best is not None
        row = {_knob_name(path): value for path, value in knobs(whole_point(files, entry.point))}
        row |= {label(name): best.metrics.get(name) for name in objectives(files)}
        rows.append(row | ({UTILITY: best.mean} if files.utility else {}))
    names = list(dict.fromkeys(name for row in rows for name in row))
    dimensions = [_dimension(name, [row.get(name) for row in rows]) for name in names]
    drawn = [dimension for dimension in dimensions if dimension is not None]
    if len(rows) < 2 or not drawn:
        return None
    line = {
        "color": drawn[-1]["values"],
        "colorscale": [[0, "#c9d3df"], [0.5, "#6f9fd0"], [1, "#0b3d6b"]],
        "showscale": False,
    }
    data = {"type": "parcoords", "dimensions": drawn, "line": line, "labelangle": -20 if len(drawn) > 6 else 0}
    data["rangefont"] = {"color": "rgba(0,0,0,0)"}  # the ticks say it in round numbers
    last = UTILITY if files.utility else list(objectives(files))[-1]
    note = f"a line a trial, at its best evaluation on the tune split; darker: higher {last}; drag on an axis to choose"
    layout = {"margin": {"l": 60, "r": 40, "t": 70 if len(drawn) > 6 else 50, "b": 20}}
    return Chart("Points and results", note, [data], layout, wide=True)


def _knob_name(path: str) -> str:
    """The last part of a path; that of a weight may be a metric's too."""
    before, _, name = path.rpartition(".")
    return label(f"weight {name}" if before == WEIGHTS else name)


def whole_point(files: SearchFiles, point: Point) -> Point:
    """The point with a value for all that varies; what it leaves out has the run's own."""
    return {path: point.get(path, own_value(files.run_config, path)) for path in files.config.space}


def own_value(config: RunConfig, path: str) -> Any:
    """A config's value at a dotted path; None where it has no such section."""
    value: Any = config.to_dict()
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _dimension(name: str, values: list[Any]) -> dict[str, Any] | None:
    """An axis of parallel coordinates; None for one without a value. What is no number has a place for each value."""
    if all(value is None or (is_number(value) and not isinstance(value, bool)) for value in values):
        there = [float(value) for value in values if value is not None]
        if not there:
            return None
        # The library draws no gaps; who has no value lies at the lowest.
        numbers = [min(there) if value is None else float(value) for value in values]
        if min(there) > 0 and max(there) / min(there) > FAR_APART:
            ticks = np.linspace(math.log10(min(there)), math.log10(max(there)), 4)
            shown = {"tickvals": ticks.tolist(), "ticktext": [f"{10**tick:.1e}" for tick in ticks]}
            return {"label": name, "values": [math.log10(number) for number in numbers], **shown}
        return {"label": name, "values": numbers}
    kinds = list(dict.fromkeys(map(str, values)))
    shown = {"tickvals": list(range(len(kinds))), "ticktext": [label(kind) for kind in kinds]}
    return {"label": name, "values": [kinds.index(str(value)) for value in values], **shown}


def curves(files: SearchFiles) -> Chart | None:
    """Learning curves of all trials, over steps or tokens, in the utility or a metric; where each was stopped."""
    entries = [entry for entry in files.course.of("trial") if entry.reports]
    controls = [entry for entry in files.course.of("control") if entry.source in CONTROLS and entry.reports]
    control = controls[0] if controls else None
    metrics = ([UTILITY] if files.utility else []) + list(objectives(files))
    if not entries or not metrics:
        return None
    drawn = [*entries, *([control] if control else [])]
    chosen = {name: COLORS[i % len(COLORS)] for i, name in enumerate(files.course.finalists or [])}
    steps = [[report.step for report in entry.reports] for entry in drawn]
    tokens = [[report.tokens for report in entry.reports] for entry in drawn]
    levels = {
        name: [
            [report.mean if name == UTILITY else report.metrics.get(name) for report in entry.reports]
            for entry in drawn
        ]
        for name in metrics
    }
    data = [
        {"x": steps[i], "y": levels[metrics[0]][i], **_line(entry, chosen.get(entry.name), entry is control)}
        for i, entry in enumerate(drawn)
    ]
    over = [
        {"label": name, "method": "update", "args": [{"x": x}, {"xaxis.title.text": name}]}
        for name, x in (("steps", steps), ("tokens", tokens))
    ]
    of = [{"label": label(name), "method": "restyle", "args": [{"y": levels[name]}]} for name in metrics]
    menu = {"type": "dropdown", "y": 1.02, "yanchor": "bottom", "xanchor": "left", "pad": {"t": 0}, "showactive": True}
    menus = [{**menu, "buttons": of, "x": 0}, {**menu, "buttons": over, "x": 0.25}]
    layout = {
        "updatemenus": menus,
        "margin": {"l": 52, "r": 12, "t": 44, "b": 36},
        "xaxis": {"title": {"text": "steps"}},
        "hovermode": "closest",
        "legend": {"x": 1.01, "y": 1, "font": {"size": 11}},
    }
    note = (
        "tune split; a trial's last mark says what became of it: a dot for one that is done, a cross for one that was "
        "stopped or failed (point at it for the reason); in colour: finalists"
    )
    if control:
        note += f"; dashed: {title_of(control.source)}"
    return Chart("Learning curves", note, data, layout, wide=True)


def _line(entry: Entry, color: str | None, control: bool) -> dict[str, Any]:
    count = len(entry.reports)
    tint = INK if control else color or GREY
    said = label(f"{entry.state}: {entry.reason}" if entry.reason else entry.state)
    name = label(title_of(policy_of(entry)))
    texts = [f"<b>{name}</b>, {label(point_text(entry.point))}"] * count
    texts[-1] += f"<br>{said}"
    return {
        "name": name,
        "mode": "lines+markers",
        "line": {"color": tint, "width": 2 if color or control else 1.2, "dash": "dash" if control else "solid"},
        "marker": {"symbol": ["circle"] * (count - 1) + [ENDS[entry.state]], "size": [3] * (count - 1) + [9]},
        "opacity": 1.0 if color or control else 0.55,
        "text": texts,
        "hovertemplate": "%{text}<br>%{x}: %{y:.3g}<extra></extra>",
    }


def label(text: str) -> str:
    """A text as plotly shows it and does not interpret it."""
    return html.escape(printable(text))


def _number(value: Any) -> float:
    return float(value) if is_number(value) else float("nan")
