"""Who proposes points: keyed draws, grids, and optuna told what trials became."""

from typing import Any

import numpy as np
import pytest
from fake_trials import SIMPLEX, make_search, quality

from rl_llm.errors import UserError
from rl_llm.search.plan import make_space
from rl_llm.search.searchers import STARTUP, Grid, Optuna, Outcome, Random, make_searcher
from rl_llm.search.space import Point, Space

W = "rewards.weights"
MIXED = {
    **SIMPLEX,
    "learner.lr": {"loguniform": [1e-5, 1e-3]},
    "learner.epochs": {"int": [1, 3]},
    "rewards.combine": {"choice": ["sum_then_normalize", "normalize_then_sum"]},
}


def space(spec: dict[str, Any] = SIMPLEX) -> Space:
    return make_space(make_search(space=spec))


def optuna(of: Space, objectives: dict[str, str] | None = None, seed: int = 0) -> Optuna:
    return Optuna(of, objectives or {"utility": "max"}, seed)


def done(point: Point, utility: float | None, state: str = "done", step: int = 9, **metrics: float | None) -> Outcome:
    return Outcome(state, point, metrics, utility, step)


def test_a_random_point_follows_from_seed_and_number_alone() -> None:
    of = space(MIXED)
    searcher = Random(of, seed=3)
    backwards = {number: searcher.ask(number, None) for number in reversed(range(5))}
    assert [Random(of, seed=3).ask(number, None) for number in range(5)] == [backwards[number] for number in range(5)]
    assert len({str(point) for point in backwards.values()}) == 5
    assert Random(of, seed=4).ask(0, None) != backwards[0]


def test_a_given_point_is_the_point() -> None:
    of, given = space(MIXED), {"learner.epochs": 2}
    grid = Grid(space({"learner.epochs": {"grid": [1, 2]}}))
    assert [searcher.ask(0, given) for searcher in (Random(of, 0), optuna(of), grid)] == [given] * 3


def test_a_grid_gives_every_combination_in_order() -> None:
    grid = Grid(space({"learner.epochs": {"grid": [1, 2]}, "learner.warmup_steps": {"choice": [0, 5]}}))
    points = [grid.ask(number, None) for number in range(4)]
    assert [tuple(point.values()) for point in points] == [(1, 0), (1, 5), (2, 0), (2, 5)]


@pytest.mark.parametrize("spec", [SIMPLEX, {"learner.lr": {"uniform": [0.1, 1]}}, {"learner.epochs": {"int": [1, 3]}}])
def test_a_grid_of_what_has_no_end_is_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match=r"space\.[a-z.]+: searcher: grid tries listed values.*\{grid: .*searcher: random"
    ):
        Grid(space(spec))


def feed(searcher: Optuna, until: int, objective: str = "utility") -> list[Point]:
    """Ask and tell in brackets, with stopped and failed trials among them."""
    points = []
    for start in range(0, until, STARTUP):
        bracket = []
        for number in range(start, start + STARTUP):
            point = searcher.ask(number, None)
            searcher.asked(number, point)
            bracket.append((number, point))
        for number, point in bracket:
            state = ("done", "stopped", "stopped", "failed")[number % 4]
            value = quality(point)
            metrics = {} if objective == "utility" else {"chrf": value, "tokens": -value}
            searcher.tell(number, done(point, value, state, step=3 + number % 4, **metrics))
        points += [point for _, point in bracket]
    return points


@pytest.mark.parametrize("objectives", [{"utility": "max"}, {"chrf": "max", "tokens": "min"}])
def test_a_searcher_told_the_past_goes_on_as_it_would_have(objectives: dict[str, str]) -> None:
    of = space(MIXED)
    unbroken = optuna(of, objectives)
    points = feed(unbroken, 16, next(iter(objectives)))
    again = optuna(of, objectives)
    for number, point in enumerate(points[:14]):  # the last two of these are under way
        again.asked(number, point)
    for number in (3, 1, 11, 10, 0, 2, *range(4, 10)):
        again.tell(number, unbroken._outcomes[number])
    assert again.ask(14, None) == points[14]
    assert again.ask(14, None) == points[14]  # asking changes nothing
    again.asked(14, points[14])
    assert again.ask(15, None) == points[15]
    assert optuna(of, objectives, seed=1).ask(0, None) != points[0]


def test_optuna_is_told_what_trials_became() -> None:
    from optuna.trial import TrialState

    of = space()
    searcher = optuna(of)
    outcomes = [
        done(of.equal(), 1.0),
        done(of.equal(), 0.5, "stopped", step=3),
        done(of.equal(), 0.7, "failed"),
        done(of.equal(), float("nan")),
        done(of.equal(), None),
    ]
    for number, outcome in enumerate(outcomes):
        searcher.asked(number, outcome.point)
        searcher.tell(number, outcome)
    searcher.asked(5, of.equal())
    trials = searcher._study(6).trials
    complete, pruned, fail = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL
    assert [trial.state for trial in trials] == [complete, pruned, fail, fail, fail, TrialState.RUNNING]
    assert trials[0].value == 1.0
    assert trials[1].intermediate_values == {3: 0.5}
    assert [trial.state for trial in trials if trial.values] == [complete]


def test_optuna_is_told_of_several_objectives() -> None:
    from optuna.trial import TrialState

    of = space()
    searcher = optuna(of, {"chrf": "max", "tokens": "min"})
    metrics: list[dict[str, float | None]] = [{"chrf": 1.0, "tokens": 5.0}, {"chrf": 1.0, "tokens": None}]
    for number, (state, told) in enumerate([("done", metrics[0]), ("stopped", metrics[0]), ("done", metrics[1])]):
        searcher.asked(number, of.equal())
        searcher.tell(number, done(of.equal(), 1.0, state, **told))
    trials = searcher._study(3).trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
    assert trials[0].values == [1.0, 5.0]
    assert trials[1].intermediate_values == {}


def test_given_points_enter_the_study_and_those_it_cannot_have_do_not() -> None:
    of = space({"learner.lr": {"loguniform": [1e-5, 1e-3]}, "learner.epochs": {"choice": [2, 3]}})
    searcher = optuna(of)
    searcher.asked(0, {"learner.lr": 1e-4, "learner.epochs": 3})
    searcher.asked(1, {"learner.lr": 1e-4})  # the run's own epochs are not of the space
    assert [trial.params for trial in searcher._study(2).trials] == [{"learner.lr": 1e-4, "learner.epochs": 1}]


def test_optuna_comes_nearer_to_the_best_weights_than_chance() -> None:
    of = space()
    found = []
    for seed in range(3):
        searcher = optuna(of, seed=seed)
        for number in range(30):
            point = searcher.ask(number, None)
            searcher.asked(number, point)
            searcher.tell(number, done(point, quality(point)))
            found.append((number, abs(point[W]["chrf"] - 0.6)))
    early, late = (np.mean([miss for n, miss in found if (n >= 15) == after]) for after in (False, True))
    assert late < 0.6 * early


def test_a_file_names_its_searcher() -> None:
    names = {}
    for name, spec in (("random", SIMPLEX), ("optuna", SIMPLEX), ("grid", {"learner.epochs": {"grid": [1, 2]}})):
        search = make_search(searcher=name, space=spec)
        names[name] = make_searcher(search, make_space(search)).name
    assert names == {name: name for name in names}
