"""What varies in a search: uniform draws, bounds, corners, moves, and paths that cannot vary."""

from typing import Any

import numpy as np
import pytest
from fake_trials import RUN

from rl_llm.config import build_config
from rl_llm.errors import UserError
from rl_llm.search.dimensions import Choice, Number, Simplex, project
from rl_llm.search.space import COMBINATIONS, Space, put

W = "rewards.weights"
LR = {"learner.lr": {"loguniform": [1e-5, 1e-3]}}
BOUNDED = {W: {"simplex": {"chrf": [0.2, 1], "length": [0, 0.5], "vocab": 0.3}}}


def run(**sections: Any) -> dict[str, Any]:
    return {**RUN, **sections}


def space(spec: dict[str, Any], **sections: Any) -> Space:
    return Space(spec, run(**sections), {"chrf": 1})


def draws(of: Space, count: int = 4000) -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    return [of.draw(generator) for _ in range(count)]


def weights_of(points: list[dict[str, Any]]) -> np.ndarray:
    return np.array([list(point[W].values()) for point in points])


def test_a_simplex_is_drawn_uniformly() -> None:
    found = weights_of(draws(space({W: {"simplex": ["chrf", "length", "vocab"]}})))
    assert np.allclose(found.sum(axis=1), 1)
    # Moments of a Dirichlet distribution with three ones: mean 1/3, variance 1/18, covariance -1/36.
    covariance = np.full((3, 3), -1 / 36) + np.eye(3) * (1 / 18 + 1 / 36)
    assert np.abs(found.mean(axis=0) - 1 / 3).max() < 4 * np.sqrt(1 / 18 / 4000)
    assert np.abs(np.cov(found.T) - covariance).max() < 0.004
    assert abs((found > 0.5).mean() - 1 / 4) < 0.02  # a corner's quarter of each of three equal parts: 3 x (1/2)^2 / 3


def test_a_simplex_is_drawn_uniformly_within_its_bounds() -> None:
    found = weights_of(draws(space(BOUNDED)))
    assert np.allclose(found.sum(axis=1), 1)
    assert np.allclose(found[:, 2], 0.3)
    # chrf and length share 0.7, so chrf is uniform from 0.2 to 0.7.
    assert found[:, 0].min() >= 0.2
    assert found[:, 0].max() <= 0.7
    assert found[:, 1].max() <= 0.5
    quantiles = np.quantile(found[:, 0], [0.1, 0.5, 0.9])
    assert np.allclose(quantiles, [0.25, 0.45, 0.65], atol=0.02)


def test_a_region_at_the_far_side_of_the_simplex_is_drawn_from() -> None:
    tight = Simplex(dict.fromkeys("abcd", (0.0, 0.26)))
    generator = np.random.default_rng(0)
    found = np.array([list(tight.draw(generator).values()) for _ in range(500)])
    assert np.allclose(found.sum(axis=1), 1)
    assert found.max() <= 0.26
    assert np.allclose(found.mean(axis=0), 0.25, atol=0.002)


def test_numbers_are_drawn_uniformly_and_whole_ones_reach_both_ends() -> None:
    spec = {**LR, "learner.epochs": {"int": [1, 3]}, "learner.weight_decay": {"uniform": [0, 0.1]}}
    points = draws(space(spec))
    rates = np.log10([point["learner.lr"] for point in points])
    assert rates.min() >= -5
    assert rates.max() <= -3
    assert abs(rates.mean() + 4) < 0.03
    assert abs(np.mean([point["learner.weight_decay"] for point in points]) - 0.05) < 0.002
    epochs = [point["learner.epochs"] for point in points]
    assert {type(count) for count in epochs} == {int}
    assert [abs(epochs.count(n) / len(epochs) - 1 / 3) < 0.03 for n in (1, 2, 3)] == [True] * 3


def test_the_corners_of_a_simplex_are_its_vertices() -> None:
    def vertices(simplex: Simplex) -> set[tuple[float, ...]]:
        return {tuple(np.round(list(corner.values()), 9)) for corner in simplex.corners()}

    assert vertices(Simplex(dict.fromkeys("abc", (0.0, 1.0)))) == {(1, 0, 0), (0, 1, 0), (0, 0, 1)}
    assert vertices(Simplex({"a": (0.2, 0.7), "b": (0.0, 0.5), "c": (0.3, 0.3)})) == {(0.2, 0.5, 0.3), (0.7, 0, 0.3)}
    cut = Simplex({"a": (0.0, 0.5), "b": (0.0, 1.0), "c": (0.0, 1.0)})
    assert vertices(cut) == {(0, 1, 0), (0, 0, 1), (0.5, 0.5, 0), (0.5, 0, 0.5)}


def test_every_corner_is_tried_and_many_of_them_one_by_one() -> None:
    few = space({**LR, "learner.epochs": {"choice": [1, 2, 3]}, W: {"simplex": ["chrf", "length"]}})
    assert len(few.corners()) == 2 * 3 * 2
    many = space({**LR, **{f"learner.{key}": {"choice": list(range(1, 20))} for key in ("epochs", "warmup_steps")}})
    assert COMBINATIONS < 2 * 19 * 19
    assert len(many.corners()) == 2 + 19 + 19 + 2
    assert {"learner.lr": 1e-3, "learner.epochs": 19, "learner.warmup_steps": 19} in many.corners()


def test_a_point_goes_over_the_settings_and_leaves_the_rest() -> None:
    gate_path = "rewards.components.length.gate"
    of = space({**BOUNDED, gate_path: {"choice": [None, {"component": "chrf", "above": 0.5, "else": 0}]}})
    settings = run(rewards={"components": ["chrf", "length", "vocab", "exact"], "weights": {"exact": 2.0, "chrf": 5.0}})
    config = build_config(put(build_config(settings).to_dict(), of.corners()[-1]))
    gate = config.rewards.components["length"].gate
    assert gate is not None
    assert gate.above == 0.5
    assert gate.otherwise == 0
    assert config.rewards.weights == pytest.approx({"chrf": 0.2, "length": 0.5, "vocab": 0.3, "exact": 2.0})
    assert settings["rewards"]["weights"] == {"exact": 2.0, "chrf": 5.0}
    assert put(of.settings, {}) == of.settings


def test_known_points_of_the_simplex() -> None:
    of = space(BOUNDED)
    assert of.equal() == {W: pytest.approx({"chrf": 0.35, "length": 0.35, "vocab": 0.3})}
    assert of.faces() == {
        "chrf": {W: pytest.approx({"chrf": 0.2, "length": 0.5, "vocab": 0.3})},
        "length": {W: pytest.approx({"chrf": 0.7, "length": 0.0, "vocab": 0.3})},
    }
    assert of.singles()["vocab"] == {W: {"chrf": 0.0, "length": 0.0, "vocab": 1.0}}
    ruled = {**RUN["rewards"], "controller": {"kind": "variation"}}
    assert space(BOUNDED, rewards=ruled).singles()["chrf"] == {
        W: {"chrf": 1.0, "length": 0.0, "vocab": 0.0},
        "rewards.controller": None,
    }
    assert space(LR).equal() == {}
    assert space(LR).faces() == {}
    assert space(LR).singles() == {}
    # Where the others cannot take its weight, a member is at its lowest.
    tight = space({W: {"simplex": {"chrf": [0, 1], "length": [0, 0.3], "vocab": [0, 0.3]}}})
    assert tight.faces()["chrf"] == {W: pytest.approx({"chrf": 0.4, "length": 0.3, "vocab": 0.3})}


def test_a_projection_is_the_nearest_point_within_bounds() -> None:
    low, high = np.zeros(3), np.array([1.0, 1.0, 0.2])
    assert project(np.array([0.2, 0.1, 0.7]), low, high, 1.0) == pytest.approx([0.45, 0.35, 0.2])
    assert project(np.array([2.0, 0.0, 0.0]), low, high, 1.0) == pytest.approx([1, 0, 0])
    generator = np.random.default_rng(1)
    for _ in range(50):
        wanted, inside = generator.normal(size=3), generator.dirichlet(np.ones(3)) * [1, 1, 0.2]
        inside[0] += 1 - inside.sum()
        found = project(wanted, low, high, 1.0)
        assert found.sum() == pytest.approx(1)
        assert (found >= low).all()
        assert (found <= high).all()
        assert np.linalg.norm(found - wanted) <= np.linalg.norm(inside - wanted) + 1e-9


@pytest.mark.parametrize(
    "spec",
    [
        BOUNDED,
        {W: {"simplex": ["chrf", "length"]}},
        {W: {"simplex": {"chrf": [0, 0.5], "length": [0, 0.6], "vocab": [0.1, 0.4]}}},
    ],
)
def test_parameters_stand_for_a_point_and_a_point_for_them(spec: dict[str, Any]) -> None:
    of = space(
        {
            **spec,
            **LR,
            "learner.epochs": {"int": [1, 4]},
            "rewards.combine": {"choice": ["sum_then_normalize", "normalize_then_sum"]},
        }
    )
    for point in [*draws(of, 50), *of.corners()]:
        parameters = of.parameters(point)
        assert parameters is not None
        assert set(parameters) == set(of.axes())
        again = of.at(parameters)
        assert again.pop(W) == pytest.approx(point[W], abs=1e-9)
        assert again == {path: value for path, value in point.items() if path != W}


def test_independent_uniforms_are_uniform_on_the_simplex() -> None:
    of = space({W: {"simplex": ["chrf", "length", "vocab"]}})
    generator = np.random.default_rng(0)
    found = weights_of([of.at({name: generator.random() for name in of.axes()}) for _ in range(4000)])
    assert np.abs(found.mean(axis=0) - 1 / 3).max() < 4 * np.sqrt(1 / 18 / 4000)
    assert np.abs(found.var(axis=0) - 1 / 18).max() < 0.004
    for extreme in (0.0, 1.0):
        assert list(of.at(dict.fromkeys(of.axes(), extreme))[W].values()) == pytest.approx([1 / 3] * 3)


def test_a_point_without_a_value_has_the_runs_own_and_one_outside_the_bound() -> None:
    of = space({**LR, "learner.epochs": {"choice": [2, 3]}}, learner={"lr": 0.1, "epochs": 2})
    assert of.nearest({}) == {"learner.lr": 1e-3, "learner.epochs": 2}
    assert of.parameters({}) == {"learner.lr": 1e-3, "learner.epochs": 0}
    far = space({"learner.epochs": {"choice": [2, 3]}})
    assert far.nearest({}) == {"learner.epochs": None}
    assert far.parameters({}) is None
    # The run's weights, at whatever scale, are a point of the simplex.
    weighed = space(
        {W: {"simplex": ["chrf", "length"]}}, rewards={"components": ["chrf", "length"], "weights": {"chrf": 3}}
    )
    assert weighed.nearest({}) == {W: pytest.approx({"chrf": 0.75, "length": 0.25})}


def test_a_move_stays_in_the_space_and_is_one() -> None:
    spec = {
        **BOUNDED,
        **LR,
        "learner.epochs": {"int": [1, 3]},
        "learner.schedule": {"choice": ["constant", "linear", "cosine"]},
    }
    of = space(spec)
    generator, point = np.random.default_rng(0), of.equal()
    kept = []
    for _ in range(300):
        before, point = of.nearest(point), of.moved(point, generator)
        assert of.read(point, "moved") == point
        assert sum(point[W].values()) == pytest.approx(1)
        assert point[W]["vocab"] == 0.3
        assert point[W] != before[W]
        kept.append(point["learner.lr"] / before["learner.lr"])
    # Most rates are 0.8 or 1.2 times what they were; others are at a bound, or drawn anew.
    assert np.mean([any(abs(ratio - factor) < 1e-9 for factor in (0.8, 1.2)) for ratio in kept]) > 0.5
    assert {of.moved(point, generator)["learner.schedule"] for _ in range(50)} == {"constant", "linear", "cosine"}
    lonely = space({W: {"simplex": ["chrf", "length"]}})
    assert {lonely.moved({W: {"chrf": 1.0, "length": 0.0}}, generator)[W]["length"] > 0 for _ in range(20)} == {True}


def test_a_grid_is_every_combination_in_order() -> None:
    of = space(
        {"learner.lr": {"grid": [1e-4, 1e-3]}, W: {"grid": [{"chrf": 1, "length": 0}, {"chrf": 0, "length": 1}]}}
    )
    assert [(point["learner.lr"], point[W]["chrf"]) for point in of.grid()] == [
        (1e-4, 1),
        (1e-4, 0),
        (1e-3, 1),
        (1e-3, 0),
    ]
    assert {point["learner.lr"] for point in draws(of, 20)} == {1e-4, 1e-3}


def test_only_what_a_live_run_takes_can_change_in_one() -> None:
    space({**BOUNDED, **LR, "algorithm.kl.coef": {"loguniform": [0.001, 0.1]}}).check_live()
    space({f"{W}.chrf": {"uniform": [0.1, 1]}}).check_live()
    held = {**RUN["rewards"], "controller": {"kind": "constraint", "constraints": {"chrf": {"at_least": 0.3}}}}
    space({"rewards.controller.constraints.chrf.at_least": {"uniform": [0.2, 0.5]}}, rewards=held).check_live()
    with pytest.raises(UserError, match=r"space\.learner\.epochs: .* this one stays"):
        space({"learner.epochs": {"int": [1, 2]}}).check_live()
    with pytest.raises(UserError, match="keeps no reference policy"):
        space({"algorithm.kl.coef": {"uniform": [0, 0.1]}}).check_live()


REFUSED: list[tuple[dict[str, Any], str]] = [
    # Paths.
    ({"lerner.lr": {"uniform": [0, 1]}}, "space.lerner.lr: no setting of a run; did you mean 'learner'?"),
    ({"learner.lrr": {"uniform": [0.1, 1]}}, "space: learner.lrr=0.1: unknown key 'learner.lrr'; did you mean 'lr'?"),
    ({"learner.lr.x": {"uniform": [0.1, 1]}}, "learner.lr is 1e-05, not a section"),
    ({"rewards.components.crf.scale": {"choice": [1, 2]}}, "no component 'crf'; did you mean 'chrf'?"),
    ({f"{W}.crf": {"uniform": [0, 1]}}, "weights.crf: no such component; did you mean 'chrf'?"),
    ({"task.shuffle": {"choice": [1]}}, "space.task.shuffle: all trials answer the same prompts; set run.task.shuffle"),
    ({"warm_start.lr": {"uniform": [0.1, 1]}}, "all trials begin from one base policy"),
    ({"policy.model": {"choice": ["a", "b"]}}, "all trials begin from one base policy"),
    ({"policy.scratch.layers": {"int": [1, 4]}}, "all trials begin from one base policy"),
    ({"evaluation.prompts": {"int": [1, 4]}}, "trials would be measured by different yardsticks"),
    ({"rollout.max_new_tokens": {"int": [8, 16]}}, "evaluations sample by it too"),
    ({"checkpoint.every": {"int": [1, 4]}}, "the search decides when trials are saved"),
    ({"logging.rollouts": {"int": [1, 4]}}, "no result follows from it"),
    ({"resources.threads": {"int": [1, 4]}}, "no result follows from it"),
    ({"trainer.steps": {"int": [10, 40]}}, "steps are the budget"),
    ({"trainer.seed": {"int": [0, 4]}}, "the seed gives all trials the same prompts"),
    ({"rewards": {"choice": [{}]}}, "a section that trials share in part"),
    ({"rewards.components.chrf.args.word_order": {"choice": [0, 2]}}, "trials are compared by 'chrf'"),
    (
        {"rewards.components.chrf.use": {"choice": ["chrf", "exact"]}},
        "put a copy with settings of its own under evaluation.metrics",
    ),
    ({"rewards.components.chrf.impute": {"choice": [0, 1]}}, "trials are compared by 'chrf'"),
    (
        {W: {"simplex": ["chrf", "length"]}, f"{W}.chrf": {"uniform": [0, 1]}},
        f"space.{W} holds {W}.chrf, which varies by itself",
    ),
    (
        {"learner": {"lr": {"uniform": [0.1, 1]}}},
        "space.learner: paths are written in one piece, learner.lr: {simplex|uniform|loguniform|int|choice|grid: ...}; "
        "as an argument space={learner.lr: ...}",
    ),
    ({W: {"simplex": ["chrf", "length"]}, "rewards": {"weights": {"simplex": ["chrf"]}}}, f"in one piece, {W}: "),
    ({"algorithm": {"kl": {"coef": 0.1}}}, "in one piece, algorithm.kl.coef: "),
    # Simplexes.
    ({"learner.betas": {"simplex": ["chrf", "length"]}}, f"a simplex is of reward weights; write it at {W}"),
    ({W: {"simplex": ["chrf", "lenght"]}}, "no component 'lenght'; did you mean 'length'?"),
    ({W: {"simplex": ["chrf", "chrf", "length"]}}, "simplex: chrf stands there 2 times; name each component once"),
    ({W: {"simplex": ["chrf"]}}, "one weighting is all it holds; at least two components have to vary"),
    ({W: {"simplex": []}}, 'simplex: name two components or more, such as ["chrf", "length"]'),
    ({W: {"simplex": {"chrf": 0.5, "length": [0, 1]}}}, "one weighting is all it holds"),
    ({W: {"simplex": "chrf"}}, 'write components, [chrf, length], or bounds of each, not "chrf"'),
    ({W: {"simplex": {"chrf": [0.6, 1], "length": [0.6, 1]}}}, "the lowest weights add up to 1.2"),
    ({W: {"simplex": {"chrf": [0, 0.4], "length": [0, 0.4]}}}, "the highest weights add up to 0.8"),
    (
        {W: {"simplex": {"chrf": [1, 0], "length": [0, 1]}}},
        "simplex.chrf: the bounds are the wrong way round; write [0, 1]",
    ),
    ({W: {"simplex": {"chrf": [0, 2], "length": [0, 1]}}}, "weights of a simplex are from 0 to 1, not [0, 2]"),
    ({W: {"simplex": {"chrf": "much", "length": [0, 1]}}}, "simplex.chrf: write two numbers, [low, high], not much"),
    ({W: {"uniform": [0, 1]}}, "weights of several components are a simplex or a choice"),
    ({W: {"choice": [0.5]}}, "write weights by component"),
    # Ranges.
    (
        {"learner.lr": {"uniform": [1e-3, 1e-4]}},
        "space.learner.lr.uniform: the bounds are the wrong way round; write [0.0001, 0.001]",
    ),
    ({"learner.lr": {"uniform": [1e-3, 1e-3]}}, "low and high are both 0.001, and nothing varies"),
    ({"learner.lr": {"loguniform": [0, 1e-3]}}, "both bounds have to be above 0"),
    ({"learner.lr": {"uniform": [1e-3]}}, "write two numbers, [low, high], not [0.001]"),
    ({"learner.lr": {"uniform": [0.1, float("inf")]}}, "write two numbers, [low, high], not [0.1, inf]"),
    ({"learner.lr": {"uniform": [True, 2]}}, "write two numbers, [low, high], not [True, 2]"),
    ({"learner.lr": {"uniform": ["a", "b"]}}, "write two numbers"),
    ({"learner.lr": {"uniform": [0.1, 10**400]}}, "write two numbers, [low, high], not [0.1, 1000"),
    ({"learner.lr": {"uniform": [-1.7e308, 1.7e308]}}, "too far apart to draw between them"),
    ({"learner.epochs": {"int": [0.5, 2]}}, "bounds are whole numbers up to 2^53, not [0.5, 2]"),
    ({"learner.epochs": {"int": [1, 10**19]}}, "bounds are whole numbers up to 2^53, not [1, 1e+19]"),
    (
        {"learner.epochs": {"uniform": [1, 4]}, **LR},
        "space.learner.epochs: {uniform: [1, 4]} draws numbers such as 2.5, and the setting takes whole ones; write "
        "{int: [1, 4]}",
    ),
    ({"learner.epochs": {"loguniform": [1, 8]}}, "write {int: [1, 8]}"),
    # That whole numbers have to divide the requests too is said when they are written.
    ({"rollout.samples_per_prompt": {"uniform": [2, 8]}}, "write {int: [2, 8]}"),
    ({"rollout.samples_per_prompt": {"int": [2, 8]}, "rollout.rows_per_request": {"choice": [16, 32]}}, "a multiple"),
    ({"rewards.components.vocab.args.n": {"uniform": [1, 3]}}, "write {int: [1, 3]}"),
    ({"learner.lr": {"lognormal": [0, 1]}}, "there is no 'lognormal'; did you mean 'loguniform'?"),
    ({"learner.lr": {"uniform": [0, 1], "int": [0, 1]}}, "write one of {simplex: ...}, {uniform: ...}"),
    ({"learner.lr": {"choice": [0.1, 0.1]}}, "choice: 0.1 is the only value, and nothing varies; set it under run"),
    ({"learner.lr": {"choice": []}}, "a list of values is needed, not []"),
    ({"learner.lr": {"grid": 0.1}}, "a list of values is needed, not 0.1"),
    # What the config refuses.
    (
        {"learner.lr": {"uniform": [-1, 1]}},
        "space: learner.lr=-1.0: learner.lr: Input should be greater than 0 (given: -1.0)",
    ),
    ({"algorithm.name": {"choice": ["grpo", "grop"]}}, 'space: algorithm.name="grop": algorithm.name: Input should be'),
    ({"algorithm.loss": {"choice": ["clipped", "cliped"]}}, 'space: algorithm.loss="cliped": '),
    (
        {"learner.minibatches": {"int": [1, 50]}},
        "space: learner.minibatches=50: learner.minibatches 50: a minibatch takes whole",
    ),
    (
        {"rewards.components.length.args.tolerence": {"choice": [1, 2]}},
        "component 'length' has no argument 'tolerence'; did you mean 'tolerance'?",
    ),
    ({"rewards.components.length.clip": {"choice": [[1, 0], None]}}, "clip must be [low, high]"),
    ({f"{W}.{name}": {"choice": [0, 1]} for name in ("chrf", "length", "vocab")}, "all reward weights are 0"),
]


@pytest.mark.parametrize(("spec", "said"), REFUSED)
def test_what_cannot_vary_is_refused_in_a_line(spec: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as refused:
        space(spec)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("varied", [False, True])
def test_a_simplex_under_a_constraint_is_kept_away_from_0(varied: bool) -> None:
    ruled = {"kind": "constraint", "constraints": {"chrf": {"at_least": 0.3}}}
    rewards = {**RUN["rewards"], "controller": None if varied else ruled}
    rules = {"rewards.controller": {"choice": [None, ruled]}} if varied else {}
    said = r"keep the simplex away from 0, such as \{chrf: \[0\.05, 1\], length: \[0\.05, 1\]\}"
    with pytest.raises(UserError, match=said):
        space({W: {"simplex": ["chrf", "length"]}, **rules}, rewards=rewards)
    space({W: {"simplex": {"chrf": [0.05, 1], "length": [0.05, 1]}}, **rules}, rewards=rewards)


def test_without_a_utility_all_components_are_compared() -> None:
    spec = {"rewards.components.vocab.args.n": {"int": [1, 2]}}
    Space(spec, run(), {"chrf": 1})
    with pytest.raises(UserError, match="trials are compared by 'vocab'"):
        Space(spec, run(), None)
    Space({"rewards.components.length.scale": {"choice": [1, 2]}}, run(), None)


FIRST: list[tuple[dict[str, Any], str]] = [
    ({"learner.lrs": 1}, "first.learner.lrs: not of the space; did you mean 'learner.lr'?"),
    ({"learner.lr": 1}, "first.learner.lr: 1 is not of its space, {loguniform: [1e-05, 0.001]}"),
    ({"learner.lr": "high"}, "first.learner.lr: a number is needed, not 'high'"),
    ({"rewards.combine": "sum"}, 'first.rewards.combine: "sum" is none of its values, ["sum_then_normalize", '),
    ({W: {"chrf": 0.7}}, f"first.{W}: length is missing"),
    ({W: {"chrf": 0.6, "length": 0.5}}, f"first.{W}.length: 0.5 is not within its bounds, 0 to 0.4"),
    ({W: {"chrf": 0.6, "length": 0.3}}, "weights of a simplex add up to 1, and these to 0.9"),
    ({W: {"chrf": 0.6, "lenght": 0.3}}, f"first.{W}.lenght: no member of the simplex; did you mean 'length'?"),
    ({W: [0.5, 0.5]}, "write a weight by member, {chrf, length}"),
]


@pytest.mark.parametrize(("point", "said"), FIRST)
def test_a_given_point_is_of_the_space(point: dict[str, Any], said: str) -> None:
    of = space(
        {
            **LR,
            W: {"simplex": {"chrf": [0, 1], "length": [0, 0.4]}},
            "rewards.combine": {"choice": ["sum_then_normalize", "normalize_then_sum"]},
        }
    )
    assert of.read({W: {"chrf": 0.7, "length": 0.3}}, "first") == {W: pytest.approx({"chrf": 0.7, "length": 0.3})}
    with pytest.raises(UserError) as refused:
        of.read(point, "first")
    assert said in str(refused.value)


def test_dimensions_say_what_they_are() -> None:
    assert str(Number(1, 3, whole=True)) == "{int: [1, 3]}"
    assert Choice(("a", {"b": 1})).read({"b": 1}, "x") == {"b": 1}
