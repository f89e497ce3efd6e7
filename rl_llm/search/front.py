"""The policies of a search that no other one is better than in every metric, and how much they dominate.

Front and hypervolume are of the tune split, which every trial is measured on. The hypervolume is that between the base
policy and the front, each metric in spreads of the base policy over prompts: 0 where no policy is better than the base
in all metrics at once (Zitzler & Thiele 1998; computed by moocore).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import moocore
import numpy as np

from rl_llm.config import UTILITY, RunConfig, value_at
from rl_llm.errors import UserError
from rl_llm.rng import Purpose, stream
from rl_llm.runs.results import Interval
from rl_llm.search.compare import as_interval, over_seeds
from rl_llm.search.course import Entry
from rl_llm.search.reader import SearchFiles, prompt_values
from rl_llm.search.space import Point
from rl_llm.search.wording import policy_of
from rl_llm.trainer.utility import base_statistics

DRAWS = 500  # resamples of a hypervolume; each is a computation of its own


@dataclass(frozen=True)
class Candidate:
    """A policy of a search at its best evaluation, or at the one that its exported model is of.

    Attributes:
        name, role, point: see `Entry`.
        policy: whose seeds it is one of.
        step: of the evaluation.
        values: each metric on the tune split, [P], NaN for none.
        model: its folder; None where it was not exported.
    """

    name: str
    role: str
    point: Point
    policy: str
    step: int
    values: dict[str, np.ndarray]
    model: Path | None

    def mean(self, metric: str) -> float:
        """NaN where no prompt has a value."""
        return _mean(self.values.get(metric, np.empty(0)))


@dataclass(frozen=True)
class Front:
    """Non-dominated candidates.

    Attributes:
        metrics: 1 where higher is better, -1 where lower.
        points: the front, the highest in the first metric first.
        behind: candidates that another one is at least as good as in every metric and better in one.
        hypervolume: with 95 % bounds over prompts.
    """

    metrics: dict[str, int]
    points: list[Candidate]
    behind: list[Candidate]
    hypervolume: Interval


def candidates(files: SearchFiles) -> list[Candidate]:
    """Trials, controls, soups and finalists that were evaluated and have not failed, as far as the search has come."""
    found = []
    for entry in files.course.entries.values():
        if entry.best is not None and entry.state != "failed":
            label = "soup" if entry.role == "soup" else "validation"
            try:
                step = evaluated_at(files, entry)
                _, values = prompt_values(files.run(entry.name).evaluated(label, step))
            except UserError:  # its directory is gone, or it never wrote one
                continue
            model = files.folder(entry.name) / "model"
            there = model if model.is_dir() else None
            found.append(Candidate(entry.name, entry.role, entry.point, policy_of(entry), step, values, there))
    return found


def evaluated_at(files: SearchFiles, entry: Entry) -> int:
    """The step of the policy that stands for an entry: that of its model, else its best."""
    run = files.run(entry.name)
    best = run.summary.get("best_step") if (run.path / "model").is_dir() else None
    if best is not None:
        return int(best)
    assert entry.best is not None
    return entry.best.step


def directions(files: SearchFiles) -> dict[str, int]:
    """Every metric that a policy can be better in: 1 where higher is better, -1 where lower.

    As the utility has it, else the search's objectives, else as the recipe's mixture pushes it; what is only measured
    is better higher.
    """
    config, utility = files.run_config, files.utility or {}
    given = {name: 1.0 if direction == "max" else -1.0 for name, direction in files.config.objectives.items()}
    given = {name: weight for name, weight in {**given, **utility}.items() if name != UTILITY}
    return {name: -1 if given.get(name, _pushed(config, name)) < 0 else 1 for name in [*config.measured, *given]}


def _pushed(config: RunConfig, name: str) -> float:
    weight = config.rewards.weights.get(name)
    turned = 1.0 if weight is None else math.copysign(1.0, value_at(weight, 0))
    return config.measured[name].scale * turned if name in config.measured else turned


def objectives(files: SearchFiles) -> dict[str, int]:
    """The metrics that the front of a search is of: its utility's, else its objectives, else all that are measured."""
    known = directions(files)
    named = [name for name in files.utility or files.config.objectives if name in known]
    return {name: known[name] for name in named or known}


def make_front(found: Sequence[Candidate], base: Mapping[str, np.ndarray], metrics: Mapping[str, int]) -> Front:
    """The front of the candidates that have a value in every one of the `metrics`.

    Args:
        base: the base policy's values on the same prompts.
    """
    metrics = {name: sign for name, sign in metrics.items() if name in base}
    known = [one for one in found if metrics and not any(math.isnan(one.mean(name)) for name in metrics)]
    if not known:
        return Front(metrics, [], [], {"mean": None, "low": None, "high": None})
    scale = Scale(base, metrics)
    at = scale.means(known)
    front = non_dominated(at)
    order = sorted(range(len(known)), key=lambda i: -at[i, 0])
    return Front(
        metrics,
        [known[i] for i in order if front[i]],
        [known[i] for i in order if not front[i]],
        scale.hypervolume(known),
    )


class Scale:
    """Metrics as distances from the base policy, in its spreads over prompts, turned so that higher is better."""

    def __init__(self, base: Mapping[str, np.ndarray], metrics: Mapping[str, int]) -> None:
        self.names, self.base = list(metrics), np.stack([base[name] for name in metrics])
        self.origin, spread = np.array(list(base_statistics({name: base[name] for name in metrics}).values())).T
        self.turn = np.array(list(metrics.values())) / spread

    def means(self, found: Sequence[Candidate]) -> np.ndarray:
        """[N, M]."""
        means = np.array([[one.mean(name) for name in self.names] for one in found]).reshape(len(found), -1)
        return (means - self.origin) * self.turn

    def hypervolume(self, found: Sequence[Candidate]) -> Interval:
        """Of the candidates' front over the base policy, with 95 % percentile-bootstrap bounds over prompts."""
        values = np.stack([self.base, *(np.stack([one.values[name] for name in self.names]) for one in found)])
        prompts = values.shape[2]
        counts = stream(0, Purpose.BOOTSTRAP, prompts).multinomial(prompts, np.full(prompts, 1 / prompts), size=DRAWS)
        there = ~np.isnan(values)
        total = np.where(there, values, 0.0) @ counts.T
        with np.errstate(invalid="ignore"):
            means = total / (there @ counts.T)  # [1 + N, M, DRAWS]; a resample without a value says nothing
        drawn = [_volume((means[1:, :, b] - means[0, :, b]) * self.turn) for b in range(DRAWS)]
        low, high = np.quantile(drawn, [0.025, 0.975])
        return {"mean": _volume(self.means(found)), "low": float(low), "high": float(high)}


def non_dominated(points: np.ndarray) -> np.ndarray:
    """Which of [N, M] points, better higher, no other one is better than, bool [N]; equals are so together."""
    found: np.ndarray = moocore.is_nondominated(points, maximise=True, keep_weakly=True)
    return found


def pairs(
    found: Sequence[Candidate], base: Mapping[str, np.ndarray], known: Mapping[str, int]
) -> dict[tuple[str, str], Front]:
    """The front of every two metrics that the candidates have."""
    there = [name for name in known if name in base and any(not math.isnan(one.mean(name)) for one in found)]
    return {(x, y): make_front(found, base, {x: known[x], y: known[y]}) for x, y in combinations(there, 2)}


def in_conflict(
    found: Sequence[Candidate], base: Mapping[str, np.ndarray], known: Mapping[str, int]
) -> tuple[str, str] | None:
    """The two metrics that oppose each other the most over the candidates, by correlation; None for fewer than two."""
    names = [name for name in known if name in base and any(not math.isnan(one.mean(name)) for one in found)]
    complete = [one for one in found if not any(math.isnan(one.mean(name)) for name in names)]
    if len(names) < 2:
        return None
    if len(complete) < 3:
        return names[0], names[1]
    at = Scale(base, {name: known[name] for name in names}).means(complete)
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = np.nan_to_num(np.corrcoef(at.T), nan=1.0)
    x, y = min(combinations(range(len(names)), 2), key=lambda pair: correlation[pair])
    return names[x], names[y]


def pareto(front: Front) -> dict[str, Any]:
    """A front as pareto.json has it."""
    return {
        "split": "tune",
        "metrics": {name: "max" if sign > 0 else "min" for name, sign in front.metrics.items()},
        "hypervolume": front.hypervolume,
        "points": [
            {
                "name": one.name,
                "role": one.role,
                "point": one.point,
                "step": one.step,
                "metrics": {name: as_interval(over_seeds(values)) for name, values in one.values.items()},
                "model": None if one.model is None else str(one.model.relative_to(one.model.parents[2])),
            }
            for one in front.points
        ],
    }


def _mean(values: np.ndarray) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else float("nan")


def _volume(points: np.ndarray) -> float:
    whole = points[~np.isnan(points).any(axis=1)]
    return float(moocore.hypervolume(whole, ref=np.zeros(points.shape[1]), maximise=True)) if len(whole) else 0.0
