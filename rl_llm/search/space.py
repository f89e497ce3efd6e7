"""What varies in a search: points, and where they come from."""

import copy
import math
import sys
from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np

from rl_llm.config import ComponentConfig, RunConfig, build_config, value_at
from rl_llm.config.overrides import put as put_at
from rl_llm.config.rewards import OF_THE_MIXTURE
from rl_llm.errors import UserError, did_you_mean
from rl_llm.rewards import Component
from rl_llm.rng import Purpose, stream
from rl_llm.search.config import MOST_TRIALS
from rl_llm.search.dimensions import Axis, Choice, Dimension, Number, Simplex, is_number
from rl_llm.values import to_json

Point = dict[str, Any]
"""A value by dotted path of a run's setting; of a simplex the weights of its members, by name."""

WEIGHTS, COMPONENTS, CONTROLLER = "rewards.weights", "rewards.components", "rewards.controller"
KINDS = ("simplex", "uniform", "loguniform", "int", "choice", "grid")
LARGEST = 2**53
"""Of whole numbers: above it a float is not each of them."""
COMBINATIONS = 256
"""Corners of a space that are tried in all their combinations; of more, each is tried by itself."""
DRAWS = 4
"""Points drawn that are checked beside the corners: between two bounds that will do are values that may not."""

# Settings that all trials share, and why.
_YARDSTICK = "trials would be measured by different yardsticks"
_ONE_BASE = "all trials begin from one base policy"
SHARED = {
    "task": "all trials answer the same prompts",
    "policy.type": _ONE_BASE,
    "policy.model": _ONE_BASE,
    "policy.scratch": _ONE_BASE,
    "policy.dropout": "it is of the warm start, which all trials share",
    "warm_start": _ONE_BASE,
    "rollout.max_new_tokens": f"evaluations sample by it too, and {_YARDSTICK}",
    "rollout.min_new_tokens": f"evaluations sample by it too, and {_YARDSTICK}",
    "rollout.stop": f"evaluations sample by it too, and {_YARDSTICK}",
    "evaluation": _YARDSTICK,
    "checkpoint": "the search decides when trials are saved",
    "logging": "no result follows from it",
    "trainer": "steps are the budget and the seed gives all trials the same prompts and random numbers",
    "resources": "no result follows from it",
}
# What a trainer takes anew when it restores a checkpoint.
LIVE = (WEIGHTS, "learner.lr", "algorithm.kl.coef", CONTROLLER)


class Space:
    """The points that trials may be at.

    Args:
        spec: {kind: arguments} by path, see `SearchConfig.space`.
        settings: of a run, plain; a point's values go over them.
        measured: components that trials are compared by; None: by all.

    Attributes:
        dimensions: what varies, by path.
        base: the config without a point.

    Raises:
        UserError: a path that is no knob or has to be the same for all trials, an impossible range, a value that the
            config refuses.
    """

    def __init__(
        self, spec: Mapping[str, Any], settings: Mapping[str, Any], measured: Mapping[str, Any] | None = None
    ) -> None:
        self.base = build_config(copy.deepcopy(dict(settings)), where="run")
        self.settings = self.base.to_dict()
        for path, kind in spec.items():
            _check_whole_path(path, kind, self._own(path))
            _check_path(path, list(spec), self.base, measured)
        self.dimensions = {path: _dimension(path, kind, self.base) for path, kind in spec.items()}
        for point in self.corners():
            self.check(point)
        for number in range(DRAWS):
            self._check_drawn(self.draw(stream(0, Purpose.POINT, number)))

    # Points.

    def draw(self, generator: np.random.Generator) -> Point:
        """A point with a value for every path, uniform on the space."""
        return {path: dimension.draw(generator) for path, dimension in self.dimensions.items()}

    def moved(self, point: Point, generator: np.random.Generator) -> Point:
        """A point near another one, for population-based training (arXiv 1711.09846).

        Numbers and weights of the simplex are multiplied by 0.8 or 1.2, and stay in the space; a choice goes to a
        neighbour; each is drawn anew with probability 0.25.
        """
        out = {}
        for path, value in self.nearest(point).items():
            dimension = self.dimensions[path]
            out[path] = dimension.draw(generator) if value is None else dimension.moved(value, generator)
        return out

    def nearest(self, point: Point) -> Point:
        """The point with a value for every path: the run's own where it has none; None where none of the space is near.

        Numbers outside their bounds become the bound.
        """
        return {path: dim.nearest(point.get(path, self._own(path))) for path, dim in self.dimensions.items()}

    def read(self, point: Mapping[str, Any], where: str) -> Point:
        """A point that somebody gives, as far as it goes.

        Raises:
            UserError: a path or a value that is not of the space.
        """
        for path in point:
            if path not in self.dimensions:
                raise UserError(f"{where}.{path}: not of the space; {did_you_mean(path, self.dimensions)}")
        return {path: self.dimensions[path].read(value, f"{where}.{path}") for path, value in point.items()}

    def corners(self) -> list[Point]:
        """Every combination of extreme values and choices; where these are too many each by itself, and the first and
        the last of all together."""
        corners = {path: dimension.corners() for path, dimension in self.dimensions.items()}
        if np.prod([float(len(values)) for values in corners.values()]) <= COMBINATIONS:
            return self._combinations()
        alone = [{path: value} for path, values in corners.items() for value in values]
        return [*alone, *({path: values[end] for path, values in corners.items()} for end in (0, -1))]

    def grid(self) -> list[Point]:
        """Every combination of the values of grids and choices, the last path varying fastest.

        Raises:
            UserError: a dimension has no list of values, or together they are too many.
        """
        for path, dimension in self.dimensions.items():
            if isinstance(dimension, Simplex):
                values = [dimension.alone(name) for name in dimension.members]
                raise UserError(
                    f"space.{path}: searcher: grid tries listed values; list weightings, such as "
                    f"{{grid: {to_json(values)}}}, or take searcher: random"
                )
            if isinstance(dimension, Number):
                raise UserError(
                    f"space.{path}: searcher: grid tries listed values, and {dimension} lists none; write {{grid: "
                    f"[{dimension.low:g}, {dimension.high:g}]}} with those between, or take searcher: random"
                )
        points = math.prod(len(dimension.corners()) for dimension in self.dimensions.values())
        if points > MOST_TRIALS:
            raise UserError(f"space: the grid has {points} points, and a search has {MOST_TRIALS} trials at most")
        return self._combinations()

    def _combinations(self) -> list[Point]:
        values = [dimension.corners() for dimension in self.dimensions.values()]
        return [dict(zip(self.dimensions, combination, strict=True)) for combination in product(*values)]

    # Weights of the simplex; other paths are not named.

    @property
    def simplex(self) -> Simplex | None:
        found = self.dimensions.get(WEIGHTS)
        return found if isinstance(found, Simplex) else None

    def equal(self) -> Point:
        """Weights as equal as the bounds let them be; without a simplex the run's own point."""
        return {} if self.simplex is None else {WEIGHTS: self.simplex.equal()}

    def faces(self) -> dict[str, Point]:
        """By free member: it is left out, or at its lowest, and the others are equal."""
        if self.simplex is None:
            return {}
        return {name: {WEIGHTS: self.simplex.equal(without=name)} for name in self.simplex.free}

    def singles(self) -> dict[str, Point]:
        """By member: all weight is on it, whatever the bounds, and no controller moves it."""
        if self.simplex is None:
            return {}
        still = {CONTROLLER: None} if self.base.rewards.controller else {}
        return {name: {WEIGHTS: self.simplex.alone(name), **still} for name in self.simplex.members}

    # Independent parameters, for optimisers of hyperparameters.

    def axes(self) -> dict[str, Axis]:
        return {name: axis for path, dim in self.dimensions.items() for name, axis in dim.axes(path).items()}

    def at(self, values: Mapping[str, Any]) -> Point:
        """The point that parameters stand for."""
        return {path: dimension.from_axes(path, values) for path, dimension in self.dimensions.items()}

    def parameters(self, point: Point) -> dict[str, Any] | None:
        """Parameters that stand for a point, or for the nearest one of the space; None where none is near."""
        nearest = self.nearest(point)
        if any(value is None for value in nearest.values()):
            return None
        return {
            name: parameter
            for path, value in nearest.items()
            for name, parameter in self.dimensions[path].to_axes(path, value).items()
        }

    # Checks.

    def check_live(self) -> None:
        """Raise `UserError` where a path cannot change while a run goes on."""
        for path, dimension in self.dimensions.items():
            if not any(f"{path}.".startswith(f"{live}.") for live in LIVE):
                raise UserError(
                    f"space.{path}: scheduler: pbt changes settings while a run goes on, and this one stays; it can "
                    f"change {', '.join(LIVE)}. Take it out, or take scheduler: halving"
                )
            if path == "algorithm.kl.coef" and 0 in dimension.corners():
                raise UserError(
                    f"space.{path}: a run that begins with 0 keeps no reference policy and cannot change it later; "
                    "for scheduler: pbt take values above 0"
                )

    def check(self, point: Point, what: str = "space") -> None:
        """Raise `UserError` where the config refuses a point, naming what of it alone is refused."""
        try:
            self._build(point, what)
        except UserError:
            for path, value in point.items():
                self._build({path: value}, what)
            raise

    def _check_drawn(self, point: Point) -> None:
        """As `check`, and says where a number that was drawn should have been a whole one, as its bounds are."""
        try:
            self.check(point)
        except UserError:
            for path, value in point.items():
                number = self.dimensions[path]
                if not isinstance(number, Number) or number.low % 1 or number.high % 1 or not value % 1:
                    continue
                if not self._takes({path: value}):
                    raise UserError(
                        f"space.{path}: {number} draws numbers such as {value:.3g}, and the setting takes whole ones; "
                        f"write {{int: [{number.low:g}, {number.high:g}]}}"
                    ) from None
            raise

    def _takes(self, point: Point) -> bool:
        try:
            self._build(point, "space")
        except UserError:
            return False
        return True

    def _build(self, point: Point, what: str) -> None:
        from rl_llm.launch.preflight import (  # with torch, which reading a search does not need
            FUNCTION,
            check_algorithm,
        )

        where = f"{what}: " + ", ".join(f"{path}={to_json(value)}" for path, value in point.items())
        settings = put(self.settings, point, where)
        try:
            config = build_config(settings, where=where)
        except UserError as error:
            controller = settings["rewards"].get("controller")
            held = isinstance(controller, dict) and controller.get("kind") == "constraint"
            if held and self.simplex and 0 in point.get(WEIGHTS, {}).values():
                bounded = ", ".join(f"{name}: [0.05, 1]" for name in self.simplex.members)
                raise UserError(f"{error}; keep the simplex away from 0, such as {{{bounded}}}") from None
            raise
        weights = [value_at(weight, step) for weight in config.rewards.weights.values() for step in (0, 10**9)]
        if not any(weights):
            raise UserError(f"{where}: all reward weights are 0, and nothing would be learned; keep one above 0")
        try:
            check_algorithm(config)
            for name, component in _varied(point, config).items():
                if not component.use.startswith(FUNCTION):
                    Component(name, component)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def _own(self, path: str) -> Any:
        """The run's own value of a path."""
        value: Any = self.settings
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value


def put(settings: Mapping[str, Any], point: Point, where: str = "point") -> dict[str, Any]:
    """Plain settings of a run with a point's values in them; weights that the point does not name stay.

    Raises `UserError` where a path leads through a value.
    """
    out = copy.deepcopy(dict(settings))
    for path, value in point.items():
        if path == WEIGHTS:
            for name, weight in value.items():
                put_at(out, f"{WEIGHTS}.{name}", copy.deepcopy(weight), where)
        else:
            put_at(out, path, copy.deepcopy(value), where)
    return out


def _varied(point: Point, config: RunConfig) -> dict[str, ComponentConfig]:
    """Components with a setting that the point sets."""
    names = {path.split(".")[2] for path in point if path.startswith(f"{COMPONENTS}.")}
    return {name: config.rewards.components[name] for name in names}


def _check_whole_path(path: str, kind: Any, own: Any) -> None:
    """Raise `UserError` where a path goes on below itself, as the keys of a run's file do."""
    below, part = path, kind
    while isinstance(own, dict) and isinstance(part, dict) and (key := next((k for k in part if k in own), None)):
        below, part, own = f"{below}.{key}", part[key], own[key]
    if below != path:
        raise UserError(
            f"space.{path}: paths are written in one piece, {below}: {{{'|'.join(KINDS)}: ...}}; as an argument "
            f"space={{{below}: ...}}"
        )


def _check_path(path: str, paths: list[str], base: RunConfig, measured: Mapping[str, Any] | None) -> None:
    """Raise `UserError` where trials cannot differ in a path. That there is such a key shows when a value is put."""
    where = f"space.{path}"
    first = path.split(".")[0]
    if first not in RunConfig.model_fields:
        raise UserError(f"{where}: no setting of a run; {did_you_mean(first, RunConfig.model_fields)}")
    for shared, why in SHARED.items():
        if f"{path}.".startswith(f"{shared}."):
            raise UserError(f"{where}: {why}; set run.{path} for all trials instead")
    if path in ("policy", "rollout", "rewards", COMPONENTS):
        raise UserError(f"{where}: a section that trials share in part; name the settings in it that vary")
    for other in paths:
        if other != path and f"{other}.".startswith(f"{path}."):
            raise UserError(f"{where} holds {other}, which varies by itself; take one of them out")
    if path in ("rollout.top_p", "rollout.top_k") and base.evaluation.temperature > 0:
        raise UserError(f"{where}: {SHARED['rollout.stop']}; set run.{path} for all trials instead")
    if path.startswith(f"{COMPONENTS}."):
        _, _, name, *rest = path.split(".")
        if name not in base.rewards.components:
            raise UserError(f"{where}: no component {name!r}; {did_you_mean(name, base.rewards.components)}")
        if (measured is None or name in measured) and (not rest or rest[0] not in OF_THE_MIXTURE):
            raise UserError(
                f"{where}: trials are compared by {name!r}, and {_YARDSTICK}; put a copy with settings of its own "
                "under evaluation.metrics and rank by that"
            )


def _dimension(path: str, spec: Any, base: RunConfig) -> Dimension:
    where = f"space.{path}"
    if not isinstance(spec, dict) or len(spec) != 1:
        raise UserError(f"{where}: write one of {', '.join(f'{{{kind}: ...}}' for kind in KINDS)}, not {to_json(spec)}")
    [(kind, given)] = spec.items()
    if kind not in KINDS:
        raise UserError(f"{where}: there is no {kind!r}; {did_you_mean(kind, KINDS)}")
    if kind == "simplex":
        return _simplex(path, given, base)
    if kind in ("choice", "grid"):
        if not isinstance(given, list) or not given:
            raise UserError(f"{where}.{kind}: a list of values is needed, not {to_json(given)}")
        if path == WEIGHTS and not all(isinstance(value, dict) for value in given):
            raise UserError(f"{where}.{kind}: write weights by component, [{{chrf: 1, length: 0.5}}, ...]")
        if kind == "choice" and len(set(map(to_json, given))) < 2:
            raise UserError(
                f"{where}.choice: {to_json(given[0])} is the only value, and nothing varies; set it under run instead"
            )
        return Choice(tuple(given))
    if path == WEIGHTS:
        raise UserError(f"{where}: weights of several components are a simplex or a choice; {kind} is of {path}.<name>")
    low, high = _bounds(given, f"{where}.{kind}")
    if kind == "loguniform" and low <= 0:
        raise UserError(f"{where}.loguniform: the logarithm of {low:g} is none; both bounds have to be above 0")
    if kind == "int" and (low != int(low) or high != int(high) or max(-low, high) > LARGEST):
        raise UserError(f"{where}.int: bounds are whole numbers up to 2^53, not [{low:g}, {high:g}]")
    return Number(low, high, log=kind == "loguniform", whole=kind == "int")


def _bounds(given: Any, where: str) -> tuple[float, float]:
    if not isinstance(given, list) or len(given) != 2 or not all(map(is_number, given)):
        raise UserError(f"{where}: write two numbers, [low, high], not {given}")
    low, high = map(float, given)
    if low > high:
        raise UserError(f"{where}: the bounds are the wrong way round; write [{high:g}, {low:g}]")
    if high - low > sys.float_info.max:
        raise UserError(f"{where}: {low:g} and {high:g} are too far apart to draw between them")
    if low == high:
        raise UserError(f"{where}: low and high are both {low:g}, and nothing varies; set it under run instead")
    return low, high


def _simplex(path: str, given: Any, base: RunConfig) -> Simplex:
    where = f"space.{path}.simplex"
    if path != WEIGHTS:
        raise UserError(f"{where}: a simplex is of reward weights; write it at {WEIGHTS}")
    names = list(map(str, given)) if isinstance(given, list) else []
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{where}: {name} stands there {names.count(name)} times; name each component once")
    if given in ([], {}):
        raise UserError(f"{where}: name two components or more, such as {to_json(list(base.rewards.components)[:2])}")
    members = {name: [0, 1] for name in names} if isinstance(given, list) else given
    if not isinstance(members, dict):
        raise UserError(f"{where}: write components, [chrf, length], or bounds of each, not {to_json(given)}")
    for name in members:
        if name not in base.rewards.components:
            raise UserError(f"{where}: no component {name!r}; {did_you_mean(str(name), base.rewards.components)}")
    bounds = {}
    for name, bound in members.items():
        bounds[name] = (float(bound), float(bound)) if is_number(bound) else _bounds(bound, f"{where}.{name}")
        if not 0 <= bounds[name][0] <= bounds[name][1] <= 1:
            raise UserError(f"{where}.{name}: weights of a simplex are from 0 to 1, not {to_json(bound)}")
    lows, highs = (sum(bound[end] for bound in bounds.values()) for end in (0, 1))
    if lows > 1 + 1e-9 or highs < 1 - 1e-9:
        what = f"the lowest weights add up to {lows:g}" if lows > 1 else f"the highest weights add up to {highs:g}"
        raise UserError(f"{where}: {what}, and weights of a simplex add up to 1; change the bounds")
    for name, (low, high) in bounds.items():
        if low < high:  # what the others leave
            low, high = round(max(low, 1 - (highs - high)), 12), round(min(high, 1 - (lows - low)), 12)
            bounds[name] = (low, high)
    if sum(low < high for low, high in bounds.values()) < 2:
        raise UserError(f"{where}: one weighting is all it holds; at least two components have to vary")
    return Simplex(bounds)
