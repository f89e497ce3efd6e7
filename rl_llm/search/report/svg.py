"""front.svg: forecast and trained front as one small picture, readable on light and on dark paper."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rl_llm.runs.text import printable, short
from rl_llm.search.front import Candidate, directions, make_front, non_dominated
from rl_llm.search.reader import SearchFiles
from rl_llm.search.report.charts import default_axes, forecast_points
from rl_llm.search.results import ranked_finalists
from rl_llm.search.wording import title_of

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 44, 52

# Mid tones for viewers that do not say what their paper is.
STYLE = """
.ink { fill: #5b6675; } .line { stroke: #7a8594; stroke-opacity: .28; } .grey { fill: #7a8594; fill-opacity: .4; }
.forecast { stroke: #7a8594; stroke-opacity: .45; stroke-width: 7; fill: none; stroke-linejoin: round;
  stroke-linecap: round; }
.front { stroke: #2b7fc4; stroke-width: 1.8; fill: none; stroke-dasharray: 5 4; }
.trial { fill: #2b7fc4; fill-opacity: .75; } .soup { fill: #2f9e63; } .control { fill: #d8701c; }
.finalist { fill: #2b7fc4; } .base { stroke: #7a8594; stroke-width: 2.5; }
text { font: 13px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
.small { font-size: 12px; } .strong { font-weight: 600; }
@media (prefers-color-scheme: dark) { .ink { fill: #b6c0cd; } .trial, .finalist { fill: #62a8e5; }
  .front { stroke: #62a8e5; } }
"""


@dataclass(frozen=True)
class Place:
    """A point of the picture; `kind` is also its class in the style."""

    kind: str
    x: float
    y: float
    label: str = ""


def front_picture(files: SearchFiles, found: Sequence[Candidate], base: Mapping[str, np.ndarray]) -> str | None:
    """The two metrics that are in conflict, over all policies of the search on the tune split; None without two."""
    axes = default_axes(files, found, base)
    if axes is None:
        return None
    x, y = axes
    known = directions(files)
    front = make_front(found, base, {x: known[x], y: known[y]})
    ranked = ranked_finalists(files)
    best = ranked[0][0].source if ranked else None
    places, named = [], set()
    for one in [*front.points, *front.behind]:
        label = title_of(one.policy) if one.role == "control" else ""
        if one.role == "finalist" and one.policy == best:
            label = "best finalist"
        places.append(Place(one.role, one.mean(x), one.mean(y), "" if label in named else label))
        named.add(label)  # one of its seeds has it
    places.append(Place("base", float(np.nanmean(base[x])), float(np.nanmean(base[y])), "base policy"))
    trained = sorted((one.mean(x), one.mean(y)) for one in front.points)
    points = forecast_points(files.forecast or {}, x, y)
    places = [*(Place("grey", at, up) for _, at, up in points), *places]
    forecast: list[tuple[float, float]] = []
    if points:
        at = np.array([[a, b] for _, a, b in points])
        on = non_dominated(at * np.array([known[x], known[y]]))
        forecast = sorted(map(tuple, at[on].tolist()))
    return picture(x, y, places, trained, forecast)


def picture(
    x: str,
    y: str,
    places: Sequence[Place],
    front: Sequence[tuple[float, float]],
    forecast: Sequence[tuple[float, float]],
) -> str:
    """An SVG of points, the front through some of them and the one that was forecast, if there was one."""
    across = Axis.over([place.x for place in places], LEFT, WIDTH - RIGHT)
    up = Axis.over([place.y for place in places], HEIGHT - BOTTOM, TOP)

    def at(point: tuple[float, float]) -> str:
        return f"{across.at(point[0]):.1f},{up.at(point[1]):.1f}"

    parts = [_grid(across, up), *_names(x, y)]
    if forecast:
        parts.append(f'<polyline class="forecast" points="{" ".join(map(at, forecast))}"/>')
    parts.append(f'<polyline class="front" points="{" ".join(map(at, front))}"/>')
    marks = [(across.at(place.x), up.at(place.y)) for place in places]
    parts += [_mark(place.kind, *mark) for place, mark in zip(places, marks, strict=True)]
    taken = [
        Box(x - 6, x + 6, y - 6, y + 6) for place, (x, y) in zip(places, marks, strict=True) if place.kind != "grey"
    ]
    for place, mark in zip(places, marks, strict=True):
        if place.label:
            parts.append(_label(place, *mark, taken))
    said = f"{x} against {y}: policies of the search" + (", and the forecast" if forecast else "")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="{_text(said)}"><title>{_text(said)}</title><style>{STYLE}</style>'
        f"{_legend(bool(forecast))}{''.join(parts)}</svg>\n"
    )


@dataclass(frozen=True)
class Axis:
    """From values to pixels, with a few round values to mark."""

    low: float
    high: float
    start: float
    end: float
    ticks: list[float]

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float) -> "Axis":
        low, high = min(values), max(values)
        span = (high - low) or abs(high) or 1.0
        low, high = low - 0.07 * span, high + 0.07 * span
        raw = (high - low) / 7
        power = 10 ** math.floor(math.log10(raw))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
        ticks = [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
        return cls(low, high, start, end, ticks)

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _grid(across: Axis, up: Axis) -> str:
    parts = []
    for tick in across.ticks:
        x = across.at(tick)
        parts.append(f'<line class="line" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        label = short(0.0 if abs(tick) < 1e-12 else tick)
        parts.append(
            f'<text class="ink small" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{label}</text>'
        )
    for tick in up.ticks:
        y = up.at(tick)
        parts.append(f'<line class="line" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        label = short(0.0 if abs(tick) < 1e-12 else tick)
        parts.append(f'<text class="ink small" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    return "".join(parts)


def _names(x: str, y: str) -> list[str]:
    middle, height = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    return [
        f'<text class="ink strong" x="{middle:.0f}" y="{HEIGHT - 12}" text-anchor="middle">{_text(x)}</text>',
        f'<text class="ink strong" x="16" y="{height:.0f}" text-anchor="middle" '
        f'transform="rotate(-90 16 {height:.0f})">{_text(y)}</text>',
    ]


def _mark(kind: str, x: float, y: float) -> str:
    if kind == "grey":
        return f'<circle class="grey" cx="{x:.1f}" cy="{y:.1f}" r="2"/>'
    if kind == "base":
        return f'<path class="base" d="M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10"/>'
    if kind == "control":
        return f'<path class="control" d="M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7 -7z"/>'
    if kind == "soup":
        return f'<rect class="soup" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
    if kind == "finalist":
        star = [(9.5 if k % 2 == 0 else 4, math.pi * (k / 5 - 0.5)) for k in range(10)]
        corners = " ".join(f"{x + r * math.cos(a):.1f},{y + r * math.sin(a):.1f}" for r, a in star)
        return f'<polygon class="finalist" points="{corners}"/>'
    return f'<circle class="trial" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    right: float
    top: float
    bottom: float

    def meets(self, other: "Box") -> bool:
        beside = self.left < other.right and other.left < self.right
        return beside and self.top < other.bottom and other.top < self.bottom


def _label(place: Place, x: float, y: float, taken: list[Box]) -> str:
    """A name beside, above or below its mark, where nothing else is; `taken` grows."""
    width = 6.8 * len(place.label)
    sides = [(x + 11, y), (x - 11 - width, y), (x - width / 2, y - 15), (x - width / 2, y + 15)]
    sides += [(x + 8, y - 13), (x + 8, y + 13), (x - 8 - width, y - 13), (x - 8 - width, y + 13)]
    boxes = [Box(left, left + width, middle - 7, middle + 7) for left, middle in sides]
    inside = [box for box in boxes if box.left > LEFT and box.right < WIDTH and box.top > TOP - 12] or boxes
    free = [box for box in inside if not any(box.meets(other) for other in taken)]
    box = (free or inside)[0]
    taken.append(box)
    kind = "ink small strong" if place.kind == "finalist" else "ink small"
    return f'<text class="{kind}" x="{box.left:.1f}" y="{box.bottom - 3:.1f}">{_text(place.label)}</text>'


def _legend(forecast: bool) -> str:
    x, parts = float(LEFT), []
    shown = [("grey", "forecast")] if forecast else []
    roles = [("trial", "trials"), ("finalist", "finalists"), ("control", "controls"), ("soup", "soups")]
    for kind, name in [*shown, ("front", "front"), *roles]:
        if kind == "grey":
            parts.append(f'<path class="forecast" d="M{x:.0f} 20h18"/>')
        elif kind == "front":
            parts.append(f'<path class="front" d="M{x:.0f} 20h20"/>')
        else:
            parts.append(_mark(kind, x + 9, 20))
        parts.append(f'<text class="ink small" x="{x + 27:.0f}" y="24">{name}</text>')
        x += 46 + 7 * len(name)
    return "".join(parts)


def _text(said: str) -> str:
    return html.escape(printable(said))
