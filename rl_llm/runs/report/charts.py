"""The report's charts as plain plotly figures: a title, a sentence on how to read it, traces and layout."""

import html
import math
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from rl_llm.runs.reader import RunFiles

POINTS = 1000  # a longer run is drawn as means of equal stretches of steps, to keep the page light
MANY = 4  # lines whose legend fits under a narrow chart
SMOOTH = 20  # the smoothed line averages over this share of the run: 1 / SMOOTH
COLORS = ("#0b62a4", "#d1600a", "#2a8a57", "#a8326e", "#6a51a3", "#8c6d1f", "#1793a5", "#b3261e")
GREY = "#7a8594"
DIVERGING = [[0, "#6f9fd0"], [0.5, "#ffffff"], [1, "#e0876a"]]

SINGLES = {
    "kl": ("KL to the reference", "mean per token, under the policy"),
    "kl/coef": ("KL coefficient", "moved towards kl.target"),
    "entropy": ("Entropy", "nats per token; a fall towards 0 is a policy that has stopped exploring"),
    "completion/distinct": (
        "Distinct completions",
        "different ones of a group over its samples",
    ),
    "completion/length": ("Completion length", "tokens, mean over samples"),
    "completion/stopped": ("Completions that ended by themselves", "share; the others were cut at max_new_tokens"),
    "groups/without_signal": ("Groups without signal", "share of groups whose samples all got the same reward"),
    "groups/drawn": ("Groups drawn", "for the step, with those drawn in place of groups without signal"),
    "clip_fraction": ("Clipped tokens", "share whose ratio was outside its bounds, over all updates of a step"),
    "value/explained": (
        "Explained variance",
        "of the returns by the values; below 0: worse than the returns' mean",
    ),
    "value/loss": ("Value loss", "before its weight"),
    "correction/kept": ("Tokens kept", "share whose correction weight is above 0"),
    "correction/weight": ("Correction weight", "mean; 1 where engine and learner agree"),
    "loss": ("Loss", "of the policy; its level means little, spikes do"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "mismatch": ("Mismatch", "mean absolute difference of log-probs between the engine that sampled and the learner"),
    "lr": ("Learning rate", ""),
    "temperature": ("Sampling temperature", ""),
    "bad_steps": ("Skipped steps", "loss or gradient was not finite"),
    "tokens_per_second": ("Speed", "sampled tokens per second of the whole step"),
}


@dataclass(frozen=True)
class Chart:
    title: str
    note: str
    data: list[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)
    wide: bool = False


def reward_charts(run: RunFiles) -> list[Chart]:
    """Utility, weighted reward, then a chart for each component and each metric that is only measured."""
    frame = thinned(run.metrics)
    components = list(run.config.rewards.components)
    charts = [utility_chart(run)]
    if "reward/mean" in frame:
        traces = smoothed(frame, "reward/mean", "sampled", COLORS[0])
        charts.append(Chart("Weighted reward", "mean over the samples of a step", traces))
    for name in [*components, *run.config.evaluation.metrics]:
        color = color_of(name, components)
        column = f"reward/{name}/mean"
        traces = smoothed(frame, column, "sampled", color) if column in frame else []
        traces += validation(run, name)
        measured = "" if name in components else "measured, not trained on; "
        charts.append(Chart(name, f"{measured}raw values, before weight and scale", traces))
    return drawable(charts)


def utility_chart(run: RunFiles) -> Chart:
    """Utility of the validations with its 95 % band, the best step marked."""
    steps, entries = validations(run, "utility")
    mean, low, high = ([entry.get(key) for entry in entries] for key in ("mean", "low", "high"))
    edge = {"x": steps, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    traces: list[dict[str, Any]] = [
        {**edge, "y": low},
        {**edge, "y": high, "fill": "tonexty", "fillcolor": "rgba(11,98,164,0.15)"},
        {"x": steps, "y": mean, "name": "utility", "mode": "lines+markers", "line": {"color": COLORS[0]}},
    ]
    best = run.summary.get("best_step")
    if best in steps:
        at = {"x": [best], "y": [mean[steps.index(best)]], "mode": "markers", "name": "best"}
        traces.append({**at, "marker": {"size": 13, "symbol": "star", "color": COLORS[1]}})
    note = "validation on the tune split, in spreads of the untrained policy, with 95 % interval; picks the best policy"
    return Chart("Utility", note, traces, wide=True)


def mixture_charts(run: RunFiles) -> list[Chart]:
    """What each component had to say: weights, shares of the advantage, correlations, failures."""
    frame = thinned(run.metrics)
    components = list(run.config.rewards.components)
    families = {
        "weights/{}": ("Weights", "as applied in each step"),
        "controller/violation/{}": ("Violation", "how far the mean is on the wrong side of its constraint"),
        "share/{}": ("Share of the advantage", "how much of what the learner followed came from each component"),
        "reward/{}/std": ("Spread", "standard deviation of each raw component over the samples of a step"),
        "failures/{}": ("Failed rows", "error or timeout, rows a step; handled as on_failure says"),
        "not_applicable/{}": ("Rows without a value", "the component did not apply, rows a step"),
    }
    charts = []
    for family, (title, note) in families.items():
        present = {name: family.format(name) for name in components if family.format(name) in frame}
        traces = [trace(frame, column, name, color_of(name, components)) for name, column in present.items()]
        if family in ("failures/{}", "not_applicable/{}"):
            traces = [drawn for drawn in traces if any(drawn["y"])]
        charts.append(Chart(title, note, traces, {"yaxis": {"rangemode": "tozero"}}, wide=len(traces) > MANY))
    return drawable([*charts, correlation_chart(run, components)])


def correlation_chart(run: RunFiles, components: list[str]) -> Chart:
    """Correlation of every two components, averaged over the last tenth of the run."""
    recent = run.metrics.tail(max(len(run.metrics) // 10, 1))
    grid: list[list[float | None]] = [[None] * len(components) for _ in components]
    for row, first in enumerate(components):
        for column, second in enumerate(components):
            for name in (f"correlation/{first}~{second}", f"correlation/{second}~{first}"):
                if name in recent and not math.isnan(mean := recent[name].mean()):
                    grid[row][column] = round(float(mean), 3)
    if not any(value is not None for row in grid for value in row):
        return Chart("", "", [])
    names = [html.escape(name) for name in components]
    heat = {"type": "heatmap", "x": names, "y": names, "z": grid, "zmin": -1, "zmax": 1, "colorscale": DIVERGING}
    shown = {"texttemplate": "%{z:.2f}", "hoverongaps": False, "colorbar": {"thickness": 10}}
    layout = {
        "xaxis": {"title": {"text": ""}, "type": "category"},
        "yaxis": {"type": "category", "autorange": "reversed"},
        "hovermode": "closest",
    }
    note = "between raw values over a step's samples, last tenth of the run; two near 1 reward the same thing"
    return Chart("Correlation of components", note, [heat | shown], layout, wide=len(components) > MANY)


def training_charts(run: RunFiles) -> list[Chart]:
    """Policy, optimiser and speed, one chart a number, and where the seconds of a step went."""
    frame = thinned(run.metrics)
    # What stays as configured tells nothing.
    config = run.config
    usual = {"bad_steps": 0, "kl/coef": config.algorithm.kl.coef, "groups/drawn": config.rollout.prompts_per_step}
    charts = [
        Chart(title, note, [trace(frame, name, title, COLORS[0])], level(frame[name]))
        for name, (title, note) in SINGLES.items()
        if name in frame and (name not in usual or (frame[name] != usual[name]).any())
    ]
    times = [name for name in frame if name.startswith("time/") and not name.startswith("time/reward/")]
    scoring = [name for name in frame if name.startswith("time/reward/")]
    for title, note, names in (
        ("Seconds a step", "by phase", times),
        ("Seconds of scoring", "by component", scoring),
    ):
        traces = [
            trace(frame, name, name.rsplit("/", 1)[-1], COLORS[index % len(COLORS)]) for index, name in enumerate(names)
        ]
        charts.append(Chart(title, note, traces, wide=len(traces) > MANY))
    return drawable(charts)


def level(values: pd.Series) -> dict[str, Any]:
    """Layout for a number that never changes: by itself plotly draws 1e-5 between -1 and 1."""
    low, high = values.min(), values.max()
    return {"yaxis": {"range": sorted((0.0, 2 * float(low)))}} if low == high and low else {}


def thinned(frame: pd.DataFrame) -> pd.DataFrame:
    """At most `POINTS` rows: means over equal stretches of steps where there are more."""
    stretch = -(-len(frame) // POINTS)
    return frame if stretch <= 1 else frame.groupby(frame.index // stretch).mean()


def trace(frame: pd.DataFrame, column: str, label: str, color: str) -> dict[str, Any]:
    """One column of the metrics as a plotly line; NaN leaves a gap."""
    values = [None if math.isnan(value) else float(f"{value:.5g}") for value in frame[column]]
    steps = [int(step) for step in frame["step"]]
    # A lone point draws no line.
    mode = "lines" if len(steps) > 1 else "markers"
    return {"x": steps, "y": values, "name": html.escape(label), "mode": mode, "line": {"color": color, "width": 2}}


def smoothed(frame: pd.DataFrame, column: str, label: str, color: str) -> list[dict[str, Any]]:
    """The raw line, pale under its running mean where the run is long enough to need one."""
    raw = trace(frame, column, label, color)
    window = len(frame) // SMOOTH
    if window < 2:
        return [raw]
    mean = frame.assign(**{column: frame[column].rolling(window, min_periods=1).mean()})
    pale = raw | {"opacity": 0.3, "hoverinfo": "skip", "showlegend": False}
    return [pale, trace(mean, column, f"{label} (mean)", color)]


def validation(run: RunFiles, metric: str) -> list[dict[str, Any]]:
    """Validation means of a metric with 95 % bars."""
    steps, entries = validations(run, metric)
    if not steps:
        return []
    mean = [entry.get("mean") for entry in entries]
    up, down = ([gap(entry, key) for entry in entries] for key in ("high", "low"))
    bars = {"type": "data", "array": up, "arrayminus": down, "width": 3, "thickness": 1}
    style = {"mode": "lines+markers", "line": {"color": "#1c2430", "width": 1.5, "dash": "dot"}, "marker": {"size": 6}}
    return [{"x": steps, "y": mean, "error_y": bars, "name": "validation", **style}]


def gap(entry: dict[str, Any], bound: str) -> float | None:
    mean, edge = entry.get("mean"), entry.get(bound)
    return None if mean is None or edge is None else abs(edge - mean)


def validations(run: RunFiles, metric: str) -> tuple[list[int], list[dict[str, Any]]]:
    """Steps and intervals of `metric` on the tune split."""
    lines = [line for line in run.evaluations if line["split"] == "tune" and line["metrics"].get(metric)]
    return [line["step"] for line in lines], [line["metrics"][metric] for line in lines]


def color_of(name: str, components: list[str]) -> str:
    """A component keeps its colour in every chart; metrics that are only measured are grey."""
    return COLORS[components.index(name) % len(COLORS)] if name in components else GREY


def drawable(charts: list[Chart]) -> list[Chart]:
    """Charts with at least one value to show."""
    return [chart for chart in charts if any(has_values(drawn) for drawn in chart.data)]


def has_values(drawn: dict[str, Any]) -> bool:
    return drawn.get("type") == "heatmap" or any(value is not None for value in drawn["y"])
