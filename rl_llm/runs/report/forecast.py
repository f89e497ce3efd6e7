"""The report's section on a forecast: what it says, its table, and its charts, from forecast.json."""

import html
from itertools import combinations
from typing import Any

from rl_llm.config import UTILITY
from rl_llm.runs.forecasts import OUT_OF_REACH, weights_text
from rl_llm.runs.report.charts import COLORS, DIVERGING, GREY, Chart, drawable

PAIRS = 6  # charts of two metrics each
MARKS = {
    "front": (COLORS[0], "no other is better in every metric"),
    "cannot be told apart": ("#9db8d3", "another is better in every metric, within the interval"),
    "dominated": ("#d8dde4", "another is better in every metric, beyond the interval"),
}


def forecast_charts(data: dict[str, Any]) -> list[Chart]:
    """The front over two metrics at a time, those that fight first, and what each component alone would do."""
    return drawable([*(_front(data, *pair) for pair in _pairs(data)), _alone(data)])


def _pairs(data: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs of metrics worth a chart: of components that fight, of the utility, then the others."""
    pairs = list(combinations(data["metrics"], 2))
    fights = {frozenset((fight["component"], fight["metric"])) for fight in data["fights"]}
    return sorted(pairs, key=lambda pair: frozenset(pair) not in fights)[:PAIRS]


def _front(data: dict[str, Any], x: str, y: str) -> Chart:
    traces = []
    for verdict, (color, meaning) in MARKS.items():
        points = [point for point in data["points"] if point["verdict"] == verdict]
        marker = {"color": color, "size": 7}
        traces.append(_places(points, x, y, verdict, marker) | {"meta": meaning})
    named = [point for point in data["points"] if point["name"] and point["verdict"] != OUT_OF_REACH]
    labels = {"mode": "markers+text", "textposition": "top center", "textfont": {"size": 10}, "showlegend": False}
    ring = {"color": "rgba(0,0,0,0)", "size": 10, "line": {"color": "#1c2430", "width": 1}}
    traces.append(_places(named, x, y, "named", ring) | labels | {"text": [html.escape(p["name"]) for p in named]})
    base = [{"metrics": data["base"], "weights": {}, "name": "base policy"}]
    traces.append(_places(base, x, y, "base policy", {"color": GREY, "size": 10, "symbol": "x"}))
    if data["best"]:
        best = [point for point in data["points"] if point["weights"] == data["best"]["weights"]][:1]
        star = {"color": COLORS[1], "size": 14, "symbol": "star"}
        traces.append(_places(best, x, y, "best utility", star))
    better = {1: "higher is better", -1: "lower is better"}
    axes = {"xaxis": x, "yaxis": y}
    layout: dict[str, Any] = {
        axis: {"title": {"text": f"{html.escape(name)} ({better[data['metrics'][name]]})"}, "type": "linear"}
        for axis, name in axes.items()
    }
    note = f"expected under each weighting at a KL of {data['kl']:.2f} nats from the base"
    return Chart(f"{y} against {x}", note, traces, layout | {"hovermode": "closest"}, wide=True)


def _places(points: list[Any], x: str, y: str, name: str, marker: dict[str, Any]) -> dict[str, Any]:
    def mean(point: Any, metric: str) -> float | None:
        value = (point["metrics"].get(metric) or {}).get("mean")
        return None if value is None else float(f"{value:.5g}")

    return {
        "x": [mean(point, x) for point in points],
        "y": [mean(point, y) for point in points],
        "customdata": [html.escape(weights_text(point["weights"]) or point["name"]) for point in points],
        "hovertemplate": "%{customdata}<br>%{x}, %{y}<extra></extra>",
        "name": html.escape(name),
        "mode": "markers",
        "marker": marker,
    }


def _alone(data: dict[str, Any]) -> Chart:
    """What each component alone does to each metric, coloured by the largest change of that metric."""
    named = {point["name"]: point for point in data["points"]}
    alone = {name: named[f"only {name}"] for name in data["members"]}
    metrics = [name for name in data["base"] if name != UTILITY]
    largest = {metric: max(abs(_gain(point, metric)) for point in alone.values()) or 1.0 for metric in metrics}
    heat = {
        "type": "heatmap",
        "x": [html.escape(metric) for metric in metrics],
        "y": [html.escape(name) for name in alone],
        "z": [[_gain(point, metric) / largest[metric] for metric in metrics] for point in alone.values()],
        "text": [[f"{_gain(point, metric):+.3g}" for metric in metrics] for point in alone.values()],
        "texttemplate": "%{text}",
        "zmin": -1,
        "zmax": 1,
        "colorscale": DIVERGING,
        "showscale": False,
    }
    layout = {
        "xaxis": {"title": {"text": "what it does to"}, "type": "category"},
        "yaxis": {"type": "category", "autorange": "reversed"},
        "hovermode": "closest",
    }
    note = "change of each metric's expected value; a row is the component that alone is followed"
    return Chart("Each component alone", note, [heat], layout, wide=len(metrics) > 4)


def _gain(point: dict[str, Any], metric: str) -> float:
    return float(point["gains"][metric]["mean"] or 0.0)
