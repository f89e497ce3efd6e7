"""Who proposes the next point."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from rl_llm.config import UTILITY
from rl_llm.rng import Purpose, stream
from rl_llm.search.config import SearchConfig
from rl_llm.search.dimensions import Axis
from rl_llm.search.space import Point, Space

STARTUP = 4
"""Trials that optuna draws at random before it learns from them: a bracket of a search."""


@dataclass(frozen=True)
class Outcome:
    """What became of a trial.

    Attributes:
        state: "done", "stopped" (early) or "failed".
        point: that it ended with.
        metrics: means on the tune split at its best evaluation; None for a metric without a value.
        utility: mean there, None without one.
        step: steps done in all.
    """

    state: str
    point: Point
    metrics: dict[str, float | None]
    utility: float | None
    step: int


class Searcher(Protocol):
    """Proposes points by number of the trial, and may learn from what became of them.

    What it answers depends on its settings and on what it has been told, not on how often it was asked: a searcher that
    is told the past of a killed search again goes on as that one would have.
    """

    name: str

    def ask(self, number: int, given: Point | None) -> Point:
        """The point of a trial: the given one, else its own."""

    def asked(self, number: int, point: Point) -> None:
        """The trial has this point, and is under way."""

    def tell(self, number: int, outcome: Outcome) -> None:
        """The trial is over."""


class _Deaf:
    """Learns nothing."""

    def asked(self, number: int, point: Point) -> None:
        pass

    def tell(self, number: int, outcome: Outcome) -> None:
        pass


class Random(_Deaf):
    """Uniform on the space, a stream a trial: how many trials there are changes none of them."""

    name = "random"

    def __init__(self, space: Space, seed: int) -> None:
        self.space, self.seed = space, seed

    def ask(self, number: int, given: Point | None) -> Point:
        return self.space.draw(stream(self.seed, Purpose.POINT, number)) if given is None else given


class Grid(_Deaf):
    """Every combination of listed values, in order: as many trials as there are of them.

    Raises:
        UserError: see `Space.grid`.
    """

    name = "grid"

    def __init__(self, space: Space) -> None:
        self.points = space.grid()

    def ask(self, number: int, given: Point | None) -> Point:
        return self.points[number] if given is None else given


class Optuna:
    """The tree-structured Parzen estimator of optuna, over all parameters together (multivariate).

    It serves several objectives too (Ozaki et al., Multiobjective tree-structured Parzen estimator, JAIR 2022). Unlike
    NSGA-II, whose first generation of 50 trials is a random search, it learns from a few trials, and keeps nothing
    beside them. So each point is asked of a study made anew of all trials so far, by a sampler with a seed of its own,
    and a search that goes on after a kill gets the points that it would have got.

    Args:
        objectives: "max" or "min" by metric.
    """

    name = "optuna"

    def __init__(self, space: Space, objectives: dict[str, str], seed: int) -> None:
        self.space, self.objectives, self.seed = space, objectives, seed
        self._points: dict[int, Point] = {}
        self._outcomes: dict[int, Outcome] = {}

    def ask(self, number: int, given: Point | None) -> Point:
        if given is not None:
            return given
        with _quiet():
            study = self._study(number)
            names = {name: _distribution(axis) for name, axis in self.space.axes().items()}
            return self.space.at(study.ask(names).params)

    def asked(self, number: int, point: Point) -> None:
        self._points[number] = point

    def tell(self, number: int, outcome: Outcome) -> None:
        self._outcomes[number] = outcome

    def _study(self, number: int) -> Any:
        import optuna

        seed = int(stream(self.seed, Purpose.POINT, number).integers(2**32))
        sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP, multivariate=True, constant_liar=True, seed=seed)
        directions = ["maximize" if direction == "max" else "minimize" for direction in self.objectives.values()]
        study = optuna.create_study(sampler=sampler, directions=directions)
        for past in sorted(self._points):
            trial = self._trial(self._points[past], self._outcomes.get(past))
            if trial is not None:
                study.add_trial(trial)
        return study

    def _trial(self, point: Point, outcome: Outcome | None) -> Any:
        """A trial as optuna has it; None for one at a point that its parameters cannot stand for.

        A stopped one is pruned, with its value so far where there is one objective; one without a value of an objective
        has failed.
        """
        from optuna.trial import TrialState, create_trial

        params = self.space.parameters(point)
        if params is None:
            return None
        state, told = TrialState.RUNNING, dict[str, Any]()
        if outcome is not None:
            found = [outcome.utility if name == UTILITY else outcome.metrics.get(name) for name in self.objectives]
            values = [value for value in found if value is not None and value == value]
            if outcome.state == "failed" or len(values) < len(found):
                state = TrialState.FAIL
            elif outcome.state == "stopped":
                state = TrialState.PRUNED
                told = {"intermediate_values": {outcome.step: values[0]}} if len(values) == 1 else {}
            else:
                state, told = TrialState.COMPLETE, {"values": values}
        distributions = {name: _distribution(axis) for name, axis in self.space.axes().items()}
        return create_trial(state=state, params=params, distributions=distributions, **told)


@contextmanager
def _quiet() -> Iterator[None]:
    """Within, optuna reports nothing of its own: each study is one of many."""
    from optuna import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _distribution(axis: Axis) -> Any:
    from optuna import distributions

    if axis.kind == "choice":
        return distributions.CategoricalDistribution(list(range(axis.count)))
    if axis.kind == "int":
        return distributions.IntDistribution(int(axis.low), int(axis.high))
    return distributions.FloatDistribution(axis.low, axis.high, log=axis.kind == "log")


MAKERS: dict[str, Callable[[SearchConfig, Space], Searcher]] = {
    "random": lambda search, space: Random(space, search.seed),
    "grid": lambda search, space: Grid(space),
    "optuna": lambda search, space: Optuna(space, dict(search.objectives) or {UTILITY: "max"}, search.seed),
}


def make_searcher(search: SearchConfig, space: Space) -> Searcher:
    """The searcher that a search file names. Raises `UserError` where it cannot serve the space."""
    return MAKERS[search.searcher](search, space)
