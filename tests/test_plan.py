"""From a search file to its course: first points, controls, and what does not go together."""

from typing import Any

import pytest
from fake_trials import SIMPLEX, course_of, make_search

from rl_llm.errors import UserError
from rl_llm.search.config import run_of
from rl_llm.search.course import Entry
from rl_llm.search.ledger import Ledger
from rl_llm.search.plan import evaluation_every, first_points, make_course, make_space, soups
from rl_llm.search.wording import policy_of, title_of

W = "rewards.weights"
LR = {"learner.lr": {"loguniform": [1e-5, 1e-3]}}
GRID = {"learner.lr": {"grid": [1e-4, 1e-3]}, "learner.epochs": {"choice": [1, 2]}}


def weights(*values: float) -> dict[str, Any]:
    return {W: pytest.approx(dict(zip(("chrf", "length", "vocab"), values, strict=True)))}


def test_the_first_points_hold_the_users_equal_weights_the_forecasts_and_each_face() -> None:
    mine = {W: {"chrf": 0.8, "length": 0.1, "vocab": 0.1}, "learner.lr": 1e-4}
    search = make_search(space={**SIMPLEX, **LR}, trials=12, first=[mine])
    guessed = [{W: {"chrf": 0.5, "length": 0.5, "vocab": 0.0}}, {W: {"chrf": 0.6, "length": 0.4, "vocab": 0.0}}]
    points = first_points(search, make_space(search), guessed)
    assert [source for source, _ in points] == [
        "first", "equal", "forecast", "forecast", "without chrf", "without length",
    ]  # fmt: skip
    assert points[0][1] == {**weights(0.8, 0.1, 0.1), "learner.lr": 1e-4}
    assert points[1][1] == {**weights(1 / 3, 1 / 3, 1 / 3), "learner.lr": 1e-5}
    # The face without vocab is what the forecast proposed first, and is tried once.
    assert points[4][1] == {**weights(0, 0.5, 0.5), "learner.lr": 1e-5}
    assert len(first_points(make_search(trials=2), make_space(search), guessed)) == 2
    sources = [entry.source for entry in make_course(search, make_space(search), guessed, Ledger()).of("trial")]
    assert sources == [source for source, _ in points] + ["random"] * 6


def test_first_points_are_of_the_space_in_what_they_do_not_name() -> None:
    varied = {
        **SIMPLEX,
        "learner.lr": {"loguniform": [1e-4, 1e-3]},
        "learner.epochs": {"int": [1, 3]},
        "learner.minibatches": {"choice": [2, 4]},
    }
    search = make_search(space=varied, run={"learner": {"lr": 5e-5, "epochs": 2}}, first=[{"learner.epochs": 3}])
    space = make_space(search)
    points = [point for _, point in first_points(search, space, [])]
    assert [space.read(point, "first") for point in points] == points
    # The run's own epochs, the rate nearest to its own, and any number of minibatches, of which its own is none.
    assert [point["learner.epochs"] for point in points] == [3, 2, 2, 2, 2]
    assert {point["learner.lr"] for point in points} == {1e-4}
    assert {point["learner.minibatches"] for point in points} == {2, 4}


def test_first_members_of_a_population_differ_in_what_they_do_not_name() -> None:
    varied = {**SIMPLEX, **LR, "algorithm.kl.coef": {"loguniform": [1e-3, 1e-1]}}
    search = make_search(space=varied, scheduler="pbt", trials=8, first=[{"learner.lr": 2e-4}])
    space = make_space(search)
    points = [point for _, point in first_points(search, space, [])]
    assert [space.read(point, "first") for point in points] == points
    assert points[0]["learner.lr"] == 2e-4
    assert len({point["learner.lr"] for point in points}) == len({point["algorithm.kl.coef"] for point in points}) == 5


def test_a_forecasts_point_is_put_into_the_space() -> None:
    search = make_search(space={W: {"simplex": {"chrf": [0, 0.6], "length": [0, 1]}}})
    guessed = [{W: {"chrf": 2.0, "length": 0.0, "vocab": 1.0}}, {W: {"chrf": 0.0, "length": 0.0, "vocab": 1.0}}]
    points = first_points(search, make_space(search), guessed)
    assert points[1] == ("forecast", {W: pytest.approx({"chrf": 0.6, "length": 0.4})})
    assert [source for source, _ in points].count("forecast") == 1


def test_evaluations_fall_on_the_levels() -> None:
    few = {"trainer": {"steps": 4}}
    for settings, every in (
        ({}, 1),
        ({"run": {"trainer": {"steps": 60}}}, 7),
        ({"run": few, "scheduler": "none"}, 1),
        ({"tokens": 100}, 20),
        ({"tokens": 100, "run": few}, 20),
        ({"tokens": 100, "run": {"evaluation": {"every": 3}}, "scheduler": "asha"}, 3),
    ):
        search = make_search(**settings)
        assert evaluation_every(search, run_of(search)) == every


def test_without_a_simplex_there_are_no_points_to_begin_with() -> None:
    search = make_search(space=LR)
    assert first_points(search, make_space(search), []) == []
    course = course_of(search)
    assert [(entry.name, entry.point, entry.seed) for entry in course.of("control")] == [("recipe-s1", {}, 1)]


def test_controls_are_equal_weights_on_the_finalists_seeds_and_singles_on_one() -> None:
    course = course_of(make_search(finalists=2, seeds=3, run={"trainer": {"steps": 9, "seed": 4}}))
    names = [(entry.name, entry.seed) for entry in course.of("control")]
    equal, singles = names[:3], names[3:]
    assert equal == [("equal-s5", 5), ("equal-s6", 6), ("equal-s7", 7)]
    assert singles == [("single-chrf", 5), ("single-length", 5), ("single-vocab", 5)]
    assert course.entries["single-length"].point == weights(0, 1, 0)
    assert course_of(make_search(controls=False)).of("control") == []
    alone = course_of(make_search(finalists=0, seeds=3))
    assert [entry.name for entry in alone.of("control")][:2] == ["equal-s1", "single-chrf"]


def test_controls_are_called_what_they_are() -> None:
    def titles(simplex: Any, **weighed: float) -> list[str]:
        rewards = {"components": ["chrf", "length", "vocab"], "weights": weighed}
        course = course_of(make_search(space={W: {"simplex": simplex}}, run={"rewards": rewards}))
        assert course.of("trial")[0].source == course.of("control")[0].source
        return [title_of(policy_of(entry)) for entry in course.of("control")]

    two = ["chrf", "length"]
    assert titles([*two, "vocab"])[:2] == ["equal weights", "chrf alone"]
    assert titles(two, vocab=0) == ["equal weights", "chrf alone", "length alone"]
    assert titles(two, vocab=2) == ["the evenest mixture", "only chrf of the simplex", "only length of the simplex"]
    assert titles(two, vocab=0.5) == ["equal weights", "only chrf of the simplex", "only length of the simplex"]
    # All weight on one member goes beyond the bounds.
    assert titles({"chrf": [0, 1], "length": [0, 1], "vocab": 0.2})[::3] == ["the evenest mixture", "vocab alone"]
    course = course_of(make_search(space={W: {"simplex": two}}))
    assert course.plan.soups(course.of("control"))[0].point.keys() == {"only-chrf", "only-length"}
    bounded = make_search(space={W: {"simplex": {"chrf": [0.2, 1], "length": [0, 1]}}})
    assert [source for source, _ in first_points(bounded, make_space(bounded), [])][1:] == [
        "least chrf", "without length",
    ]  # fmt: skip


def test_soups_are_a_lattice_without_its_corners() -> None:
    def count(members: int) -> int:
        return len(soups([Entry(f"single-{i}", "control", {}) for i in range(members)]))

    assert [count(members) for members in range(6)] == [0, 0, 3, 7, 6, 10]
    for soup in soups([Entry(f"single-{name}", "control", {}) for name in "abc"]):
        assert sum(soup.point.values()) == pytest.approx(1)
    assert soups([Entry("equal-s1", "control", {}), Entry("single-a", "control", {})]) == []


def test_a_grid_has_its_own_number_of_trials() -> None:
    course = course_of(make_search(space=GRID, searcher="grid", trials=4))
    assert len(course.of("trial")) == 4
    raw = make_search(space=GRID, searcher="grid").model_dump(exclude={"trials"}, exclude_unset=True)
    unsaid = type(make_search()).model_validate(raw)
    assert course_of(unsaid).plan.trials == 4


def test_the_runs_own_settings_go_over_the_recipes() -> None:
    search = make_search(recipe="quickstart", run={"rewards": {"weights": {"facts": 5}}, "policy": {"model": None}})
    config = run_of(search)
    assert config.rewards.weights == {"facts": 5, "sentence": 2, "brevity": 1}
    assert config.trainer.steps == 9


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"utility": {"crf": 1}}, "utility.crf: no such metric; did you mean 'chrf'?"),
    ({"utility": {"chrf": 0}}, "utility weighs nothing"),
    ({"utility": {}}, "utility weighs nothing"),
    ({"utility": {"reward": 1}}, "ranked by the weighted reward, each weighting would be judged by its own yardstick"),
    ({"utility": None}, "scheduler: halving: without a utility nothing ranks trials: give utility: {metric: weight}"),
    ({"utility": None, "scheduler": "asha"}, "scheduler: asha: without a utility"),
    ({"utility": None, "scheduler": "pbt"}, "scheduler: pbt: without a utility"),
    ({"utility": None, "scheduler": "none"}, "finalists: 1: without a utility nothing ranks trials"),
    (
        {"utility": None, "scheduler": "none", "finalists": 0, "searcher": "optuna"},
        "searcher: optuna: without a utility nothing ranks trials",
    ),
    ({"searcher": "optuna", "objectives": {"chrff": "max"}}, "objectives.chrff: no such metric; did you mean 'chrf'?"),
    ({"objectives": {"chrf": "max"}}, "objectives are for searcher: optuna"),
    ({"searcher": "grid"}, f"space.{W}: searcher: grid tries listed values"),
    ({"searcher": "grid", "space": LR}, "space.learner.lr: searcher: grid tries listed values, and {loguniform"),
    ({"searcher": "grid", "space": GRID, "trials": 5}, "trials: 5, and the grid has 4 points: write trials: 4"),
    ({"searcher": "grid", "space": GRID, "trials": 3}, "trials: 3, and the grid has 4 points: write trials: 4"),
    (
        {"searcher": "grid", "space": {f"learner.{key}": {"grid": list(range(1, 60))} for key in ("lr", "epochs")}},
        "space: the grid has 3481 points, and a search has 1000 trials at most",
    ),
    ({"trials": 10**8}, "trials: Input should be less than or equal to 1000 (given: 100000000)"),
    ({"searcher": "grid", "space": GRID, "trials": 4, "first": [{}]}, "first: searcher: grid tries all of its points"),
    ({"space": {"learner.lr": {"grid": [0.1, 0.2]}}}, "space.learner.lr.grid: only searcher: grid goes through it"),
    ({"first": [{}] * 7}, "first: 7 points, and there are 6 trials"),
    ({"finalists": 7}, "finalists: 7 of 6 trials; take finalists: 6 or fewer"),
    ({"trials": True}, "trials: a number is needed, not true or false (given: True)"),
    ({"tokens": False}, "tokens: a number is needed, not true or false"),
    ({"first": [{}, {"learner.lr": 1}]}, f"first[1].learner.lr: not of the space; known: {W}"),
    (
        {"scheduler": "pbt", "space": {"learner.epochs": {"int": [1, 3]}}},
        "space.learner.epochs: scheduler: pbt changes",
    ),
    ({"scheduler": "pbt", "searcher": "optuna"}, "scheduler: pbt moves the points itself"),
    ({"scheduler": "pbt", "trials": 1}, "scheduler: pbt needs others to learn from"),
    ({"run": {"trainer": {"steps": 8}}}, "trainer.steps 8: scheduler: halving decides at ninths of a trial"),
    ({"space": {}}, "space names no setting that varies"),
    ({"run": {"learner": {"lr": -1}}}, "run: learner.lr: Input should be greater than 0"),
    ({"schedule": "asha"}, "unknown key 'schedule'; did you mean 'scheduler'?"),
    (
        {"space": {"learner.lr": [1, 2]}},
        "space.learner.lr: this is written as space: {learner.lr: {loguniform: [1.0e-5, 1.0e-3]}}",
    ),
    ({"space": ["learner.lr"]}, "space: this is written as space: {learner.lr: "),
    ({"space": {3: {"uniform": [1, 2]}}}, "space: its keys are names (given: 3)"),
    ({"utility": ["chrf"]}, "utility: this is written as utility: {chrf: 1.0}"),
    ({"searcher": "optuna", "objectives": ["chrf"]}, "objectives: this is written as objectives: {chrf: max, tokens"),
    ({"first": {W: {"chrf": 1}}}, "first: this is written as first: [{learner.lr: 1.0e-4}]"),
    ({"utility": None, "run": {"evaluation": {"utility": {"reward": 1}}}}, "ranked by the weighted reward, each"),
    ({"run": {"evaluation": 3}}, "run: evaluation: a section is needed here"),
]


@pytest.mark.parametrize(("settings", "said"), REFUSED)
def test_what_does_not_go_together_is_refused_in_a_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as refused:
        course_of(make_search(**settings))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
