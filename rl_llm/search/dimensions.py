"""What a path of a search's space may be: the weights of a simplex, a number within bounds, one of some values."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, Protocol

import numpy as np

from rl_llm.errors import UserError, did_you_mean
from rl_llm.values import to_json

_FACTORS = (0.8, 1.2)
_ANEW = 0.25  # of perturbations; both as in population-based training (arXiv 1711.09846)
_SMALLEST = 1e-12  # uniform that a logarithm is taken of
_ROUNDING = 1e-9
_DRAWS, _TRIES = 64, 20_000


@dataclass(frozen=True)
class Axis:
    """A plain parameter, as optimisers of hyperparameters have them; `count` is that of the values of a choice."""

    kind: Literal["float", "log", "int", "choice"]
    low: float = 0.0
    high: float = 1.0
    count: int = 0


class Dimension(Protocol):
    """The values of a path."""

    def corners(self) -> list[Any]:
        """Its extreme values."""

    def draw(self, generator: np.random.Generator) -> Any:
        """A value, uniformly (of a `loguniform`, its logarithm)."""

    def moved(self, value: Any, generator: np.random.Generator) -> Any:
        """A value near one of its values, or one drawn anew."""

    def nearest(self, value: Any) -> Any:
        """Its value nearest to any value; None where none is near."""

    def read(self, value: Any, where: str) -> Any:
        """A value that somebody gives. Raises `UserError` where it is not one of these."""

    def axes(self, path: str) -> dict[str, Axis]:
        """Independent parameters that the value is made of, by name."""

    def from_axes(self, path: str, values: Mapping[str, Any]) -> Any:
        """The value that such parameters stand for."""

    def to_axes(self, path: str, value: Any) -> dict[str, Any]:
        """Parameters that stand for one of its values."""


@dataclass(frozen=True)
class Number:
    """A number from `low` to `high`, both included; `log`: uniform in its logarithm; `whole`: an integer."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def corners(self) -> list[Any]:
        return [self._within(self.low), self._within(self.high)]

    def draw(self, generator: np.random.Generator) -> Any:
        if self.whole:
            return int(generator.integers(int(self.low), int(self.high), endpoint=True))
        if self.log:
            return self._within(np.exp(generator.uniform(np.log(self.low), np.log(self.high))))
        return float(generator.uniform(self.low, self.high))

    def moved(self, value: Any, generator: np.random.Generator) -> Any:
        anew, factor = generator.random() < _ANEW, generator.choice(_FACTORS)
        if anew:
            return self.draw(generator)
        moved = self._within(value * factor)
        if self.whole and moved == value:
            moved = self._within(value + (1 if factor > 1 else -1))
        return moved

    def nearest(self, value: Any) -> Any:
        return self._within(value) if is_number(value) else None

    def read(self, value: Any, where: str) -> Any:
        number = _number(value, where)
        if not self.low <= number <= self.high or (self.whole and number != int(number)):
            raise UserError(f"{where}: {number:g} is not of its space, {self}")
        return self._within(number)

    def axes(self, path: str) -> dict[str, Axis]:
        return {path: Axis("int" if self.whole else "log" if self.log else "float", self.low, self.high)}

    def from_axes(self, path: str, values: Mapping[str, Any]) -> Any:
        return self._within(values[path])

    def to_axes(self, path: str, value: Any) -> dict[str, Any]:
        return {path: value}

    def _within(self, value: float) -> Any:
        bounded = min(max(float(value), self.low), self.high)
        return round(bounded) if self.whole else bounded

    def __str__(self) -> str:
        kind = "int" if self.whole else "loguniform" if self.log else "uniform"
        return f"{{{kind}: [{self.low:g}, {self.high:g}]}}"


@dataclass(frozen=True)
class Choice:
    """One of some values, of any kind."""

    values: tuple[Any, ...]

    def corners(self) -> list[Any]:
        return list(self.values)

    def draw(self, generator: np.random.Generator) -> Any:
        return self.values[generator.integers(len(self.values))]

    def moved(self, value: Any, generator: np.random.Generator) -> Any:
        anew, step = generator.random() < _ANEW, int(generator.choice((-1, 1)))
        if anew:
            return self.draw(generator)
        return self.values[min(max(self.values.index(value) + step, 0), len(self.values) - 1)]

    def nearest(self, value: Any) -> Any:
        return value if value in self.values else None

    def read(self, value: Any, where: str) -> Any:
        if value not in self.values:
            raise UserError(f"{where}: {to_json(value)} is none of its values, {to_json(list(self.values))}")
        return self.values[self.values.index(value)]

    # Values of any kind are told by their number: parameters of optimisers are plain.

    def axes(self, path: str) -> dict[str, Axis]:
        return {path: Axis("choice", count=len(self.values))}

    def from_axes(self, path: str, values: Mapping[str, Any]) -> Any:
        return self.values[values[path]]

    def to_axes(self, path: str, value: Any) -> dict[str, Any]:
        return {path: self.values.index(value)}


@dataclass(frozen=True)
class Simplex:
    """Weights that add up to 1, each within bounds; those that stand still have equal ones.

    Attributes:
        bounds: lowest and highest weight by member; attainable, so that the others can fill up to 1.
    """

    bounds: dict[str, tuple[float, float]]

    @property
    def members(self) -> list[str]:
        return list(self.bounds)

    @property
    def free(self) -> list[str]:
        """Members whose weight varies."""
        return [name for name, (low, high) in self.bounds.items() if low < high]

    def corners(self) -> list[Any]:
        """The vertices: all members but one are at a bound of theirs."""
        low, high, mass = self._box()
        found: dict[tuple[float, ...], None] = {}
        for filler in range(len(low)):
            others = [pair for i, pair in enumerate(zip(low, high, strict=True)) if i != filler]
            for ends in product(*others):
                left = mass - sum(ends)
                if low[filler] - _ROUNDING <= left <= high[filler] + _ROUNDING:
                    vertex = [*ends[:filler], float(np.clip(left, low[filler], high[filler])), *ends[filler:]]
                    found[tuple(np.round(vertex, 12).tolist())] = None
        return [self._whole(np.array(vertex)) for vertex in found]

    def draw(self, generator: np.random.Generator) -> Any:
        """Uniform over the simplex within the bounds: uniform over a simplex around that, until it is inside.

        Of the simplex of all weights above the lows and that of all below the highs the smaller one is drawn from.
        """
        low, high, mass = self._box()
        above, below = mass - low.sum(), high.sum() - mass
        for _ in range(_TRIES):
            shares = generator.dirichlet(np.ones(len(low)), size=_DRAWS)
            weights = low + above * shares if above <= below else high - below * shares
            inside = ((weights >= low) & (weights <= high)).all(axis=1)
            if inside.any():
                return self._whole(weights[np.argmax(inside)])
        raise UserError(f"space.rewards.weights: the bounds {to_json(self.bounds)} leave too little to draw from")

    def moved(self, value: Any, generator: np.random.Generator) -> Any:
        """Free weights times a factor each, then scaled to their sum and put within their bounds."""
        low, high, mass = self._box()
        anew, factors = generator.random() < _ANEW, generator.choice(_FACTORS, size=len(low))
        weights = np.array([value[name] for name in self.free])
        moved = weights * factors
        if not anew and moved.sum() > 0:
            moved = project(moved * mass / moved.sum(), low, high, mass)
            if not np.allclose(moved, weights):
                return self._whole(moved)
        return self.draw(generator)

    def nearest(self, value: Any) -> Any:
        """Of weights at any scale."""
        low, high, mass = self._box()
        weights = [value.get(name) if isinstance(value, dict) else None for name in self.free]
        numbers = np.array([weight for weight in weights if is_number(weight)])
        if len(numbers) < len(weights) or numbers.sum() <= 0:
            return None
        return self._whole(project(numbers * (mass / numbers.sum()), low, high, mass))

    def read(self, value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            raise UserError(f"{where}: write a weight by member, {{{', '.join(self.members)}}}, not {value!r}")
        for name in value:
            if name not in self.bounds:
                raise UserError(f"{where}.{name}: no member of the simplex; {did_you_mean(name, self.members)}")
        weights = {}
        for name, (low, high) in self.bounds.items():
            if name not in value and low < high:
                raise UserError(f"{where}: {name} is missing; give every member a weight, 0 where it has none")
            weights[name] = _number(value.get(name, low), f"{where}.{name}")
            if not low - 1e-6 <= weights[name] <= high + 1e-6:
                raise UserError(f"{where}.{name}: {weights[name]:g} is not within its bounds, {low:g} to {high:g}")
        total = sum(weights.values())
        if abs(total - 1) > 1e-3:
            raise UserError(f"{where}: weights of a simplex add up to 1, and these to {total:g}")
        return self._whole(project(np.array([weights[name] for name in self.free]), *self._box()))

    # Of independent uniforms -log(u) are exponentials, and those over their sum uniform on the simplex. High bounds are
    # met by projection.

    def axes(self, path: str) -> dict[str, Axis]:
        return {f"{path}.{name}": Axis("float") for name in self.free}

    def from_axes(self, path: str, values: Mapping[str, Any]) -> Any:
        low, high, mass = self._box()
        waits = -np.log(np.clip([values[f"{path}.{name}"] for name in self.free], _SMALLEST, 1.0))
        shares = waits / waits.sum() if waits.sum() > 0 else np.full(len(waits), 1 / len(waits))
        return self._whole(project(low + (mass - low.sum()) * shares, low, high, mass))

    def to_axes(self, path: str, value: Any) -> dict[str, Any]:
        low, _, mass = self._box()
        weights = np.array([value[name] for name in self.free])
        shares = np.clip((weights - low) / (mass - low.sum()), 0.0, 1.0)
        # As many exponentials add up to their number in the mean.
        uniforms = np.exp(-len(low) * shares)
        return {f"{path}.{name}": float(u) for name, u in zip(self.free, uniforms, strict=True)}

    def equal(self, without: str | None = None) -> dict[str, float]:
        """Free weights as equal as the bounds let them be, that of `without` at its lowest."""
        low, high, mass = self._box()
        top = np.where([name == without for name in self.free], low, high)
        return self._whole(project(np.zeros(len(low)), low, top, mass))

    def alone(self, name: str) -> dict[str, float]:
        """All weight on one member, whatever the bounds."""
        return {member: float(member == name) for member in self.members}

    def _box(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Lows, highs and the sum of the free weights."""
        fixed = sum(low for low, high in self.bounds.values() if low == high)
        low, high = np.array([self.bounds[name] for name in self.free]).T
        return low, high, 1 - fixed

    def _whole(self, free: np.ndarray) -> dict[str, float]:
        weights = dict(zip(self.free, free.tolist(), strict=True))
        return {name: weights.get(name, low) for name, (low, _) in self.bounds.items()}


def project(weights: np.ndarray, low: np.ndarray, high: np.ndarray, mass: float) -> np.ndarray:
    """The nearest [K] to `weights` within bounds that adds up to `mass`: all are shifted alike, then clipped.

    `mass` is between the sums of the bounds. What is there already is left as it is.
    """
    if abs(weights.sum() - mass) <= _ROUNDING and (weights >= low).all() and (weights <= high).all():
        return weights
    # Between the shifts at which a weight comes to a bound, the sum is a straight line.
    bends = np.sort(np.concatenate([low - weights, high - weights]))
    sums = np.clip(weights + bends[:, None], low, high).sum(axis=1)
    k = int(np.clip(np.searchsorted(sums, mass), 1, len(bends) - 1))
    span = sums[k] - sums[k - 1]
    shift = bends[k - 1] if span <= 0 else bends[k - 1] + (mass - sums[k - 1]) * (bends[k] - bends[k - 1]) / span
    return np.clip(weights + shift, low, high)


def is_number(value: Any) -> bool:
    """Whether it is a number that a float can be, finite, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _number(value: Any, where: str) -> float:
    if not is_number(value):
        raise UserError(f"{where}: a number is needed, not {value!r}")
    return float(value)
