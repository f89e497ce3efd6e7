"""What any weighting of the rewards would make of the base policy, from its own scored samples and before any training.

A weighting's advantages, the config's own, tilt the samples of each prompt (`rl_llm.search.tilt`); a metric under the
weighting is a weighted mean of values that are there already. Weightings are compared at one KL from the base.

No claim is made of what the base never samples, of prompts other than these, or of runs that go further than that KL.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations_with_replacement
from typing import Any

import numpy as np

from rl_llm.algorithms import build_algorithm
from rl_llm.config import UTILITY, RunConfig, value_at
from rl_llm.errors import UserError, did_you_mean, option
from rl_llm.mixture import Mixture
from rl_llm.rng import Purpose, stream
from rl_llm.runs.forecasts import ForecastText
from rl_llm.search.dominance import FRONT, NOTHING, OUT_OF_REACH, UNDECIDED, Interval, bootstrap, verdicts
from rl_llm.search.samples import LEAST_SAMPLES, Samples, check_prompts
from rl_llm.search.tilt import Tilted, reach, tilt
from rl_llm.trainer.utility import Utility

FAR = 1.0  # nats: with 64 samples and normal advantages about a seventh of them still count
SHORT = 0.25  # of the KL aimed at: a weighting that cannot come so far has too little signal
FEW = 0.1  # share of the others that may come less far than what all are compared at
STEPS = {2: 20, 3: 12, 4: 8}  # of the grid over the simplex, by its number of components
DRAWS = 256  # points on a larger simplex
BLOCK = 1 << 21  # advantages tilted at once


@dataclass(frozen=True)
class Point:
    """What a weighting would come to.

    Attributes:
        name: "equal", "configured" or "only <component>"; empty for others.
        weights: by member.
        metrics: expected value of each metric, and of the utility where there is one, with 95 % bounds over prompts.
        gains: the same less the base policy's, paired by prompt.
        kl: mean over prompts, nats a completion.
        tau: temperature of the tilt, None without signal.
        ess: effective samples a prompt, mean over prompts.
        verdict: "front": no other is better in every metric; "cannot be told apart": one is, within its interval;
            "dominated": one is, beyond it; "short of the KL": it has too little signal to be compared.
    """

    name: str
    weights: dict[str, float]
    metrics: dict[str, Interval]
    gains: dict[str, Interval]
    kl: float
    tau: float | None
    ess: float
    verdict: str


@dataclass(frozen=True)
class Best:
    """The weighting with the highest utility.

    Attributes:
        weights: chosen on all prompts.
        halves: chosen on each half of them; how far these are apart is how sure the choice is.
        utility: of weights chosen on one half and read on the other, both ways, with 95 % bounds.
        over: the same less the utility of "base", "equal" and "configured", paired by prompt.
        ties: how many of the weightings cannot be told from it.
    """

    weights: dict[str, float]
    halves: list[dict[str, float]]
    utility: Interval
    over: dict[str, Interval]
    ties: int


@dataclass(frozen=True)
class Fight:
    """Following one component alone lowers another's metric, beyond the interval: `change`, for the worse below 0."""

    component: str
    metric: str
    change: Interval


@dataclass(frozen=True)
class Forecast:
    """The forecast of many weightings of the `members`, other components at their configured weights.

    Attributes:
        metrics: what is better higher (1) or lower (-1); with a utility, what it weighs.
        utility: its weights, None where there is none.
        prompts, samples: that it is made from, samples a prompt.
        kl: at which weightings are compared, `asked` or less where too many cannot come so far.
        base: metrics of the base policy's samples.
        signal: by component, the share of prompts whose samples differ in it, as the mixture sees it.
        fights: see `Fight`; `best`: None without a utility.
    """

    members: list[str]
    metrics: dict[str, int]
    utility: dict[str, float] | None
    prompts: int
    samples: int
    kl: float
    asked: float
    base: dict[str, Interval]
    points: list[Point]
    best: Best | None
    signal: dict[str, float]
    fights: list[Fight]

    @property
    def front(self) -> list[Point]:
        """Points that no other one has been shown to be better than."""
        return [point for point in self.points if point.verdict in (FRONT, UNDECIDED)]

    @property
    def silent(self) -> list[str]:
        """Components that teach nothing here: no two samples of a prompt differ in them."""
        return [name for name, share in self.signal.items() if share == 0]

    def named(self, name: str) -> Point | None:
        return next((point for point in self.points if point.name == name), None)

    def best_points(self, count: int) -> list[dict[str, float]]:
        """Weights to try first: the highest utility and, apart from those before, the next ones; without a utility
        those of the front that lie furthest apart."""
        known = [point for point in self.points if point.verdict != OUT_OF_REACH]
        if self.utility is None:
            known = [point for point in known if point.verdict == FRONT]
        else:
            known.sort(key=lambda point: -(point.metrics[UTILITY]["mean"] or 0.0))
        lie = np.array([_on_simplex(list(point.weights.values())) for point in known]).reshape(len(known), -1)
        chosen = [0] if known else []
        while len(chosen) < min(count, len(known)):
            distance = np.abs(lie[:, None] - lie[chosen]).sum(axis=2).min(axis=1) / 2
            if not (distance > NOTHING).any():
                break
            far = np.flatnonzero(distance >= min(0.2, distance.max()))
            chosen.append(int(far[0] if self.utility is not None else np.argmax(distance)))
        return [dict(zip(self.members, map(float, lie[index]), strict=True)) for index in chosen[:count]]

    def __rich__(self) -> ForecastText:
        return ForecastText(self.to_dict())

    def __str__(self) -> str:
        return str(ForecastText(self.to_dict()))

    def _repr_html_(self) -> str:
        return ForecastText(self.to_dict())._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def default_kl(samples: int) -> float:
    """Half of log(n / 4), the most that n samples a prompt could say anything about, and 1 nat at most."""
    return min(FAR, math.log(samples / 4) / 2)


def check_kl(samples: int, kl: float | None) -> float:
    """The KL to compare at, the default where none is given. Raises `UserError` where so many samples do not tell."""
    if samples < LEAST_SAMPLES:
        raise UserError(
            f"{option('samples')} {samples}: a forecast goes up to a KL of log(samples / 4) at most, so it needs "
            f"{LEAST_SAMPLES} or more; 64 are usual"
        )
    highest = math.log(samples / 4)
    asked = default_kl(samples) if kl is None else kl
    if not 0 < asked <= highest + NOTHING:
        raise UserError(
            f"{option('kl')} {asked:g}: from {samples} samples a prompt a forecast can be made above 0 and up to "
            f"log({samples} / 4) = {highest:.2f}"
        )
    return asked


def forecast(
    samples: Samples,
    config: RunConfig,
    members: Sequence[str] = (),
    utility: Mapping[str, float] | None = None,
    *,
    weightings: Sequence[Mapping[str, float]] = (),
    kl: float | None = None,
) -> Forecast:
    """Forecast weightings of the `members`, all components where none are named.

    Args:
        config: of the run; its mixture and algorithm make the advantages.
        utility: weight by metric; None leaves the front unranked.
        weightings: to look at, by member; by default a grid over the simplex, or random points where it is large.
        kl: nats a completion at which weightings are compared.

    Raises:
        UserError: unknown names, too few samples, or a KL that so many cannot speak of.
    """
    prompts, n = samples.shape
    check_prompts(prompts)
    asked = check_kl(n, kl)
    members = list(members) or list(config.rewards.components)
    _refuse_unknown("members", members, config.rewards.components)
    _refuse_unknown("utility", utility or {}, samples.values)
    names, weights = _weightings(config, members, weightings)
    parts = [samples, samples.half(0), samples.half(1)]
    advantages = [_advantages(part, config, members, weights) for part in parts]
    reached = np.min([reach(part) for part in advantages], axis=0)
    able = reached[reached >= SHORT * asked]
    level = min(asked, float(np.quantile(able, FEW))) if len(able) else asked
    compared = reached >= level * (1 - NOTHING)
    scored = Utility(dict(utility), samples.base) if utility else None
    metrics = [*samples.values, *([UTILITY] if scored else [])]
    reads = [_read(part, found, level, scored) for part, found in zip(parts, advantages, strict=True)]
    whole, *halves = reads
    apart = np.empty_like(whole.values)
    for half, read in enumerate(halves):
        apart[:, :, half::2] = read.values
    signs = {name: _sign(name, config, utility) for name in samples.values}
    objectives = {name: sign for name, sign in signs.items() if not utility or utility.get(name)}
    judged = [metrics.index(name) for name in objectives]
    verdict = verdicts(whole.values[:, judged], apart[:, judged], list(objectives.values()), compared)
    means, gains = bootstrap(whole.values), bootstrap(whole.values - whole.base)
    base = bootstrap(whole.base[None])
    points = [
        Point(
            name=names[w],
            weights=dict(zip(members, map(float, weights[w]), strict=True)),
            metrics={metric: means.at(w, m) for m, metric in enumerate(metrics)},
            gains={metric: gains.at(w, m) for m, metric in enumerate(metrics)},
            kl=float(whole.kl[w]),
            tau=float(whole.tau[w]) if np.isfinite(whole.tau[w]) else None,
            ess=float(whole.ess[w]),
            verdict=verdict[w],
        )
        for w in range(len(weights))
    ]
    return Forecast(
        members=members,
        metrics=objectives,
        utility=dict(utility) if utility else None,
        prompts=prompts,
        samples=n,
        kl=level,
        asked=asked,
        base={metric: base.at(0, m) for m, metric in enumerate(metrics)},
        points=points,
        best=_best(points, whole.base[-1], apart[:, -1], compared) if scored else None,
        signal=_signal(samples, config),
        fights=_fights(points, signs, members),
    )


def _refuse_unknown(where: str, names: Sequence[str] | Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"{where}: there is no {name!r}; {did_you_mean(name, known)}")


def _sign(name: str, config: RunConfig, utility: Mapping[str, float] | None) -> int:
    """1 where a metric is better higher, -1 where lower: as the utility has it, else as the mixture pushes it."""
    weight = (utility or {}).get(name) or config.measured[name].scale * _turn(name, config)
    return -1 if weight < 0 else 1


def _turn(name: str, config: RunConfig) -> int:
    """-1 for a component whose configured weight is negative: its part of the simplex is, too."""
    weights = config.rewards.weights
    return -1 if name in weights and value_at(weights[name], 0) < 0 else 1


# Which weightings.


def _weightings(
    config: RunConfig, members: list[str], given: Sequence[Mapping[str, float]]
) -> tuple[list[str], np.ndarray]:
    """Names and weights [W, K]: equal ones, each component alone, the configured ones, then those given or a grid."""
    count, turn = len(members), np.array([_turn(name, config) for name in members])
    configured = np.array([value_at(config.rewards.weights[name], 0) for name in members])
    named = {"equal": turn / count, "configured": configured}
    named |= {f"only {name}": np.eye(count)[k] * turn for k, name in enumerate(members)}
    for weights in given:
        _refuse_unknown("weightings", weights, dict.fromkeys(members))
    rest = [np.array([weights.get(name, 0.0) for name in members]) for weights in given]
    names, rows = list(named), list(named.values())
    known = {_place(row) for row in rows}
    for row in rest or [turn * point for point in _simplex(count)]:
        if _place(row) not in known:
            known.add(_place(row))
            names.append("")
            rows.append(row)
    return names, np.stack(rows)


def _place(weights: np.ndarray) -> tuple[float, ...]:
    """Equal for weights that differ in their scale alone."""
    return tuple((_on_simplex(weights).round(9) + 0.0).tolist())


def _on_simplex(weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """The weights divided by the sum of their sizes; all 0 stays so."""
    weights = np.asarray(weights, dtype=np.float64)
    return weights / (np.abs(weights).sum() or 1.0)


def _simplex(count: int) -> list[np.ndarray]:
    """Points of the simplex over `count` components: a regular grid of it, or uniform draws where it is large."""
    if count == 1:
        return []
    if count in STEPS:
        steps = STEPS[count]
        # A point is where `steps` balls lie in `count` boxes.
        boxes = combinations_with_replacement(range(count), steps)
        return [np.bincount(box, minlength=count) / steps for box in boxes]
    return list(stream(0, Purpose.WEIGHTINGS).dirichlet(np.ones(count), size=DRAWS))


# Reading a weighting.


@dataclass(frozen=True)
class _Read:
    """W weightings on P prompts.

    Attributes:
        values: [W, M, P] expected metrics, NaN where no sample has a value; base: [M, P], the base policy's.
        tau, kl, ess: [W], see `Tilted`.
    """

    values: np.ndarray
    base: np.ndarray
    tau: np.ndarray
    kl: np.ndarray
    ess: np.ndarray


def _advantages(samples: Samples, config: RunConfig, members: list[str], weights: np.ndarray) -> np.ndarray:
    """The config's own advantages of each weighting, float64 [W, P, n]."""
    algorithm, mixture = build_algorithm(config.algorithm), Mixture(config.rewards.uncontrolled())
    groups = None if algorithm.per_token else samples.groups
    components = {name: samples.values[name] for name in config.rewards.components}
    out = np.empty((len(weights), *samples.shape))
    for w, row in enumerate(weights):
        for name, weight in zip(members, row, strict=True):
            mixture.set_weight(name, float(weight))
        out[w] = mixture.mix(components, groups, 0, algorithm.scale).advantages.reshape(samples.shape)
    return out


def _read(samples: Samples, advantages: np.ndarray, kl: float, utility: Utility | None) -> _Read:
    columns = {**samples.values, **({UTILITY: utility.per_prompt(samples.values)} if utility else {})}
    values = np.stack([column.reshape(samples.shape) for column in columns.values()], axis=2)
    there = ~np.isnan(values)
    filled, present = np.where(there, values, 0.0), there.astype(np.float64)

    def expected(q: np.ndarray) -> np.ndarray:
        """[W, M, P] of weights [W, P, n]."""
        total = np.einsum("wpn,pnm->wmp", q, filled, optimize=True)
        mass = np.einsum("wpn,pnm->wmp", q, present, optimize=True)
        return np.where(mass > NOTHING, total / np.maximum(mass, NOTHING), np.nan)

    size = max(BLOCK // (samples.shape[0] * samples.shape[1]), 1)
    tilted: list[Tilted] = []
    parts: list[np.ndarray] = []
    for start in range(0, len(advantages), size):
        found = tilt(advantages[start : start + size], kl)
        parts.append(expected(found.q))
        tilted.append(found)
    base = expected(np.full((1, *samples.shape), 1 / samples.shape[1]))[0]
    tau, reached, ess = (np.concatenate([getattr(one, name) for one in tilted]) for name in ("tau", "kl", "ess"))
    return _Read(np.concatenate(parts), base, tau, reached, ess)


# What follows from it.


def _best(points: list[Point], base: np.ndarray, utility: np.ndarray, compared: np.ndarray) -> Best | None:
    """By utilities [W, P] that each half of the prompts has been read for by itself, and those of the base, [P]."""
    if not compared.any():
        return None
    prompts = np.arange(len(base))
    chosen = [_highest(bootstrap(utility[:, half::2]).mean, compared) for half in (0, 1)]
    crossed = utility[np.array(chosen)[1 - prompts % 2], prompts]
    means = np.array([point.metrics[UTILITY]["mean"] for point in points], dtype=np.float64)
    weights = [points[w].weights for w in (_highest(means, compared), *chosen)]
    others = {"base": base}
    others |= {point.name: utility[w] for w, point in enumerate(points) if point.name in ("equal", "configured")}
    return Best(
        weights=weights[0],
        halves=weights[1:],
        utility=bootstrap(crossed).at(),
        over={name: bootstrap(crossed - other).at() for name, other in others.items()},
        ties=int((compared & (bootstrap(crossed - utility).low <= 0)).sum()),
    )


def _highest(utility: np.ndarray, compared: np.ndarray) -> int:
    return int(np.argmax(np.where(compared & ~np.isnan(utility), utility, -np.inf)))


def _signal(samples: Samples, config: RunConfig) -> dict[str, float]:
    """By component the share of prompts that it alone would have an advantage in."""
    names = list(config.rewards.components)
    alone = _advantages(samples, config, names, np.eye(len(names)))
    return {name: float((np.ptp(alone[k], axis=1) > NOTHING).mean()) for k, name in enumerate(names)}


def _fights(points: list[Point], signs: Mapping[str, int], members: list[str]) -> list[Fight]:
    """What each member alone makes worse beyond the interval."""
    found = []
    for member in members:
        point = next(point for point in points if point.name == f"only {member}")
        for metric, sign in signs.items():
            change = point.gains[metric]
            low, high = change["low"], change["high"]
            if metric == member or low is None or high is None:
                continue
            if (high if sign > 0 else -low) < 0:
                found.append(Fight(member, metric, change))
    return found
