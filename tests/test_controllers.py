"""Weights that move by a rule: numbers worked out by hand, what a rule is for, and going on from a checkpoint."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import Command, Tiny
from test_resume import RESOURCES, stopped
from test_trainer import opened

from rl_llm.algorithms.advantages import SCALE
from rl_llm.config import BoundConfig, ControllerConfig, RewardsConfig, build_config
from rl_llm.controllers import RULES, Statistics
from rl_llm.errors import UserError
from rl_llm.launch.preflight import check_algorithm, make_plan
from rl_llm.mixture import Mixture
from rl_llm.runs.replay import replay
from rl_llm.runs.run import Run
from rl_llm.search.space import Space, put

NAN = np.nan


def seen(names: str, weights: list[float], **given: Any) -> Statistics:
    """What a step offers a rule; what is not given a rule has no use for."""
    unused = np.full(len(names), NAN)
    columns = ("raw_mean", "raw_std", "mean", "std", "lowest", "floor")
    numbers = {key: np.array(given.get(key, unused), float) for key in columns}
    return Statistics(
        list(names), np.array(weights, float), **numbers, group_std=np.array(given.get("group_std", [[]]))
    )


def decide(kind: str, state: dict[str, Any], statistics: Statistics, **settings: Any) -> Any:
    default = {"constraints": {"b": {"at_least": 0.6}}} if kind == "constraint" else {}
    return RULES[kind](ControllerConfig(kind=kind, **{**default, **settings}), state, statistics)


def mixture(*names: str, weights: dict[str, float] | None = None, **settings: Any) -> Mixture:
    components = {name: {"use": "x", **settings.pop(name, {})} for name in names}
    return Mixture(RewardsConfig(components=components, weights=weights or {}, **settings))


def step(made: Mixture, groups: list[int], **values: list[float]) -> dict[str, float]:
    """The diagnostics of a step."""
    columns = {name: np.array(column, float) for name, column in values.items()}
    return made.mix(columns, np.array(groups), 0, SCALE["grpo"]).diagnostics


# ---- constraint


def test_multiplier_rises_by_the_violation_in_spreads_times_the_slope_of_the_logistic() -> None:
    offered = seen("ab", [1.0, 0.5], raw_mean=[9.0, 0.4], raw_std=[9.0, 0.2])
    first = decide("constraint", {}, offered, lr=1.0)
    assert first.weights.tolist() == [1.0, 0.5]
    # s'(0) = 1/4; 0.2 below the bound is one spread.
    assert first.state["multipliers"] == pytest.approx({"b": 0.25})
    assert first.diagnostics == pytest.approx({"controller/multiplier/b": 0.5, "controller/violation/b": 0.2})
    second = decide("constraint", first.state, offered, lr=1.0)
    # s(0.25) = 0.5621765, s'(0.25) = 0.2461341; momentum 0.1 x 0.25 + 0.2461341.
    assert second.weights == pytest.approx([2 * (1 - 0.5621765), 0.5621765], abs=1e-7)
    assert second.state["multipliers"] == pytest.approx({"b": 0.25 + 0.2711341}, abs=1e-7)


def test_multiplier_falls_where_the_bound_is_kept_and_spreads_are_those_of_the_first_step() -> None:
    first = decide("constraint", {}, seen("ab", [1, 1], raw_mean=[0, 0.6], raw_std=[1, 0.2]), lr=1.0)
    assert first.state["multipliers"] == {"b": 0.0}
    second = decide("constraint", first.state, seen("ab", [1, 1], raw_mean=[0, 0.7], raw_std=[1, 5.0]), lr=1.0)
    assert second.state["multipliers"] == pytest.approx({"b": -0.125})
    assert second.diagnostics["controller/violation/b"] == 0


def test_several_constraints_share_the_bound_of_the_gradient() -> None:
    bounds = {"b": {"at_least": 3.0}, "c": {"at_most": -4.0}}
    offered = seen("abc", [1, 1, -1], raw_mean=[0, 0, 0], raw_std=[1, 1, 1])
    first = decide("constraint", {}, offered, lr=1.0, constraints=bounds)
    # Gradients 3/4 and 4/4 have the norm 1.25, which is held to 0.5.
    assert first.state["multipliers"] == pytest.approx({"b": 0.3, "c": 0.4})
    second = decide("constraint", first.state, offered, constraints=bounds)
    b, c = 1 / (1 + np.exp([-0.3, -0.4]))
    assert second.weights == pytest.approx([2 - b - c, 2 * b, -2 * c])


def test_constrained_component_without_any_value_leaves_its_multiplier() -> None:
    offered = seen("ab", [1, 1], raw_mean=[0, 0.4], raw_std=[1, 0.2])
    state = decide("constraint", {}, offered).state
    gone = decide("constraint", state, seen("ab", [1, 1], raw_mean=[0, NAN], raw_std=[1, NAN]))
    assert gone.state == state
    assert "controller/violation/b" not in gone.diagnostics


def test_constraint_drives_its_component_to_the_bound_and_no_further() -> None:
    """A policy over five actions that A and B fight over; A alone would win, and by far."""
    a, b = np.array([1, 0.8, 0.5, 0.2, 0]), np.array([0, 0.3, 0.6, 0.9, 1.0])
    groups = np.repeat(np.arange(16), 8)

    def learned(made: Mixture) -> tuple[float, float]:
        """Mean A and B over the second half of the run."""
        rng, logits, history = np.random.default_rng(0), np.zeros(5), []
        for number in range(400):
            policy = np.exp(logits) / np.exp(logits).sum()
            actions = rng.choice(5, size=128, p=policy)
            mixed = made.mix({"a": a[actions], "b": b[actions]}, groups, number, SCALE["grpo"])
            taken = np.bincount(actions, weights=mixed.advantages, minlength=5) / 128
            drift = np.log(5 * policy) - policy @ np.log(5 * policy)
            logits = logits + 0.05 * (taken - 0.1 * policy * drift)
            history.append((policy @ a, policy @ b))
        return tuple(np.mean(history[200:], axis=0))

    weights = {"a": 1.0, "b": 0.3}
    held = {"kind": "constraint", "constraints": {"b": {"at_least": 0.6}}}
    fixed, moved, only_b = (
        learned(mixture("a", "b", weights=w, controller=controller))
        for w, controller in ((weights, None), (weights, held), ({"a": 0.0, "b": 1.0}, None))
    )
    assert fixed[1] < 0.3
    assert moved[1] == pytest.approx(0.6, abs=0.05)
    assert moved[0] > only_b[0] + 0.1


# ---- variation


def test_variation_is_spread_over_the_distance_from_the_lowest_value() -> None:
    made = mixture("a", "b", weights={"a": 1.0, "b": 0.5}, controller={"kind": "variation"})
    shown = step(made, [0, 0, 1, 1], a=[0, 1, 1, 0], b=[1, 1, 0, 1])
    # 0.57735 / 0.5 and 0.5 / 0.75
    assert shown["controller/variation/a"] == pytest.approx(1.1547005)
    assert shown["controller/variation/b"] == pytest.approx(0.6666667)
    assert shown["weights/a"] == pytest.approx(2 * 1.1547005 / 1.8213672)
    assert shown["weights/b"] == pytest.approx(0.5 * 2 * 0.6666667 / 1.8213672)


def test_lowest_value_is_the_clip_s_or_the_lowest_seen() -> None:
    made = mixture("a", "b", b={"scale": -1.0, "clip": [0, 6]}, controller={"kind": "variation"})
    step(made, [0, 0], a=[-4, -2], b=[0, 1])
    shown = step(made, [0, 0, 0, 0], a=[-2, -2, -1, -1], b=[1, 2, 2, 1])
    assert shown["controller/variation/a"] == pytest.approx(0.5773503 / (4 - 1.5))
    assert shown["controller/variation/b"] == pytest.approx(0.5773503 / (6 - 1.5))


def test_variation_leaves_out_what_has_no_weight_no_value_or_no_spread() -> None:
    made = mixture("a", "b", "c", "d", weights={"c": 0.0}, controller={"kind": "variation"})
    shown = step(made, [0, 0], a=[0, 1], b=[1, 1], c=[0, 9], d=[NAN, NAN])
    assert [shown[f"weights/{name}"] for name in "abcd"] == pytest.approx([2, 0, 0, 1])
    shown = step(made, [0, 0], a=[1, 1], b=[1, 1], c=[0, 9], d=[NAN, NAN])
    assert [shown[f"weights/{name}"] for name in "abcd"] == [1, 1, 0, 1]


# ---- variance


@pytest.mark.parametrize(
    ("weights", "expected"),
    [({"a": 1.0, "b": 1.0}, [1 / 3, 5 / 3]), ({"a": 2.0, "b": -1.0}, [0.75, -2.25])],
)
def test_variance_is_the_mean_over_groups_of_shares_of_the_weighted_spread(
    weights: dict[str, float], expected: list[float]
) -> None:
    made = mixture("a", "b", weights=weights, combine="normalize_then_sum", controller={"kind": "variance"})
    # Shares 1/3 and 2/3, 0 and 1, and a group without any; with the weights 2 and -1: halves, 0 and 1.
    shown = step(made, [0, 0, 1, 1, 2, 2], a=[0, 1, 0, 0, 5, 5], b=[0, 2, 0, 1, 5, 5])
    assert [shown["weights/a"], shown["weights/b"]] == pytest.approx(expected)
    assert shown["controller/spread/a"] == pytest.approx(0.7071068 / 3)
    shown = step(made, [0, 0], a=[1, 1], b=[2, 2])
    assert [shown["weights/a"], shown["weights/b"]] == list(weights.values())


# ---- hypervolume


def test_hypervolume_multiplies_all_weights_by_what_a_step_adds_to_the_front() -> None:
    state: dict[str, Any] = {}
    factors, volumes = [], []
    # In spreads from the first step: the reference, (1, 1), (2, 0.5) and (1, 0.5), which adds nothing.
    for mean in ([1, 2], [2, 4], [3, 3], [2, 3]):
        offered = seen("ab", [0.5, 2], mean=mean, std=[1, 2])
        weights, state, shown = decide("hypervolume", state, offered)
        factors.append(shown["controller/factor"])
        volumes.append(shown["controller/hypervolume"])
        assert weights == pytest.approx([0.5 * factors[-1], 2 * factors[-1]])
    assert factors == pytest.approx([1, 0.5 + 1.5 * 0.7615942, 0.5 + 1.5 * 0.4621172, 0.5])
    assert volumes == pytest.approx([0, 1, 1.5, 1.5])
    assert state["front"] == {"a": [1, 2], "b": [1, 0.5]}
    missing = decide("hypervolume", state, seen("ab", [1, 1], mean=[2, NAN], std=[1, NAN]))
    assert missing.diagnostics["controller/factor"] == 0.5
    assert missing.state == state


def test_hypervolume_counts_less_of_a_component_with_a_negative_weight_and_nothing_of_one_without() -> None:
    state = decide("hypervolume", {}, seen("abc", [1, -1, 0], mean=[0, 0, 0], std=[1, 1, 0])).state
    later = decide("hypervolume", state, seen("abc", [1, -1, 0], mean=[1, -2, -5], std=[1, 1, 0]))
    assert later.diagnostics["controller/hypervolume"] == pytest.approx(2)
    # One that dominates all before takes their place.
    last = decide("hypervolume", later.state, seen("abc", [1, -1, 0], mean=[2, -2, 0], std=[1, 1, 0]))
    assert last.state["front"] == {"a": [2], "b": [-2], "c": [0]}


# ---- state

KINDS: dict[str, dict[str, Any]] = {
    "constraint": {"controller": {"kind": "constraint", "constraints": {"b": {"at_least": 2.0}}}},
    "variation": {"controller": {"kind": "variation"}},
    "variance": {"controller": {"kind": "variance"}, "combine": "normalize_then_sum"},
    "hypervolume": {"controller": {"kind": "hypervolume"}},
}


@pytest.mark.parametrize("kind", RULES)
def test_state_goes_through_json_bit_for_bit(kind: str) -> None:
    rng, groups = np.random.default_rng(0), [0, 0, 0, 1, 1, 1]
    values = [{name: rng.normal(size=6).tolist() for name in "abc"} for _ in range(6)]
    made, again = mixture("a", "b", "c", **KINDS[kind]), mixture("c", "a", "b", **KINDS[kind])
    for number in range(3):
        step(made, groups, **values[number])
    again.load_state_dict(json.loads(json.dumps(made.state_dict())))
    before = json.dumps(made.state_dict())
    signal = {name: np.array(column) for name, column in values[3].items()}
    made.signal(signal, np.array(groups), 3)
    assert json.dumps(made.state_dict()) == before
    for number in range(3, 6):
        one, other = (step(m, groups, **values[number]) for m in (made, again))
        keys = [key for key in one if key.startswith(("weights/", "controller/"))]
        assert {key: other[key] for key in keys} == pytest.approx({key: one[key] for key in keys}, rel=1e-12)
        assert len(keys) > 3
    fresh, other_kind = mixture("a", "b", "c", **KINDS["variation"]), mixture("a", "b", "c")
    fresh.load_state_dict(made.state_dict())
    other_kind.load_state_dict(made.state_dict())
    assert "controller" not in other_kind.state_dict()
    if kind != "variation":
        assert fresh.state_dict()["controller"] == {"kind": "variation", "state": {}}


def held(tiny_run: Tiny, at_least: float = 0.9, **rewards: Any) -> dict[str, Any]:
    """The rewards of the tiny task with a constraint on one of them."""
    components = tiny_run.config().to_dict()["rewards"]["components"]
    controller = {"kind": "constraint", "lr": 5.0, "constraints": {"match": {"at_least": at_least}}}
    return {"components": components, "controller": controller, **rewards}


@pytest.fixture(scope="module")
def whole(tiny_run: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("held") / "run"
    tiny.train(tiny_run.config(rewards=held(tiny_run)), path)
    return path


def test_run_with_a_controller_shows_its_weights_everywhere(tiny_run: Tiny, whole: Path) -> None:
    lines = tiny.metrics(whole)
    assert (lines[0]["weights/match"], lines[0]["weights/length"]) == (1, 1)
    assert lines[-1]["weights/match"] > lines[1]["weights/match"] > 1 > lines[-1]["weights/length"]
    for line in lines:
        assert line["weights/match"] == 2 * line["controller/multiplier/match"]
        assert line["controller/violation/match"] == pytest.approx(0.9 - line["reward/match/mean"])
    again = replay(whole, {})
    assert again.flipped == again.other_best == 0
    assert again.run.weights == {name: lines[-1][f"weights/{name}"] for name in ("match", "length")}
    report = Run(whole).report().read_text()
    assert "constraint" in report
    assert "Violation" in report


def test_resumed_run_has_the_multipliers_it_would_have_had(
    tiny_run: Tiny, whole: Path, ray_session: None, tmp_path: Path
) -> None:
    path = stopped(tiny_run, tmp_path / "run", rewards=held(tiny_run))
    tiny.train(tiny_run.config(rewards=held(tiny_run), resources=RESOURCES), path, resume=True)
    tiny.assert_same_run(path, whole)


def test_threshold_given_anew_holds_from_then_on_and_the_multiplier_goes_on(
    tiny_run: Tiny, whole: Path, tmp_path: Path
) -> None:
    checkpoint = whole / "checkpoints" / "step-000004"
    live = tiny.metrics(whole)[4]
    config = tiny_run.config(rewards=held(tiny_run, at_least=-1.0))
    with opened(config, tmp_path / "other", checkpoint=checkpoint) as trainer:
        anew = [trainer.step(), trainer.step()]
        assert anew[0]["controller/multiplier/match"] == live["controller/multiplier/match"]
        assert anew[0]["controller/violation/match"] == 0
        assert anew[1]["controller/multiplier/match"] < anew[0]["controller/multiplier/match"]
        # Another run on the same workers begins with what it has configured.
        plan = make_plan(config, {})
        trainer.reset(config, tmp_path / "fresh", plan.task, str(tiny_run.policy))
        assert trainer.step()["weights/match"] == 1


def test_resumed_run_may_have_another_controller_but_not_other_components(tiny_run: Tiny, tmp_path: Path) -> None:
    path = stopped(tiny_run, tmp_path / "run", rewards=held(tiny_run), step=2)
    rewards = held(tiny_run, controller={"kind": "variation"})
    run = tiny.train(tiny_run.config(rewards=rewards, trainer={"steps": 3}), path, resume=True)
    assert "controller/variation/match" in run.metrics.columns
    with pytest.raises(UserError, match=r"rewards\.combine"):
        tiny.train(
            tiny_run.config(rewards={**rewards, "combine": "normalize_then_sum"}, trainer={"steps": 3}),
            path,
            resume=True,
        )


def test_run_without_a_controller_keeps_nothing_of_one(tiny_run: Tiny) -> None:
    newest = max((tiny_run.undisturbed / "checkpoints").glob("step-*"))
    assert set(json.loads((newest / "state.json").read_text())["mixture"]) == {"weights", "baseline"}
    assert not any(key.startswith("controller") for line in tiny.metrics(tiny_run.undisturbed) for key in line)


# ---- configuration

BOUND = {"kind": "constraint", "constraints": {"chrf": {"at_least": 0.5}}}


def test_rules_and_their_settings_are_choices_in_a_search() -> None:
    settings = built(controller=BOUND).to_dict()
    rules = [None, {"kind": "variation"}, BOUND]
    spaces = (
        {
            "rewards.controller.constraints.chrf.at_least": {"uniform": [0.3, 0.6]},
            "rewards.controller.lr": {"grid": [1]},
        },
        {"rewards.controller": {"choice": rules}},
    )
    thresholds, kinds = (Space(spec, settings) for spec in spaces)
    point = thresholds.draw(np.random.default_rng(0))
    config = build_config(put(settings, point))
    assert config.rewards.controller.constraints["chrf"].at_least == next(iter(point.values()))
    assert 0.3 <= next(iter(point.values())) <= 0.6
    found = [kinds.draw(np.random.default_rng(seed))["rewards.controller"] for seed in range(20)]
    assert all(rule in found for rule in rules)
    with pytest.raises(UserError, match="no such component"):
        Space({"rewards.controller.constraints.chr.at_least": {"uniform": [0.3, 0.6]}}, settings)


def test_dry_run_names_the_rule(command: Command) -> None:
    said = command("train", "own.yaml", "rewards.controller.kind=variation", "--dry-run")
    assert "(sum_then_normalize, moved by variation)" in said.out


def built(*overrides: str, **rewards: Any) -> Any:
    rewards = {"components": {"chrf": None, "length": {"scale": -1.0}}, **rewards}
    return build_config({"rewards": rewards, "policy": {"model": "m"}}, overrides)


def test_every_setting_is_reached_by_its_path() -> None:
    config = built(
        "rewards.controller.kind=constraint",
        "rewards.controller.constraints.length.at_most=12",
        "rewards.controller.lr=0.5",
    )
    assert config.rewards.controller == ControllerConfig(
        kind="constraint", constraints={"length": BoundConfig(at_most=12)}, lr=0.5
    )
    assert build_config(config.to_dict()) == config


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ({"controller": {"kind": "constraints"}}, "'constraint', 'variation', 'variance' or 'hypervolume'"),
        ({"controller": {"kind": "variation", "rate": 1}}, "unknown key 'rewards.controller.rate'"),
        ({"controller": {**BOUND, "constraints": {"chrff": {"at_least": 0}}}}, "did you mean 'chrf'?"),
        ({"controller": {**BOUND, "constraints": {"chrf": {}}}}, "either 'at_least' or 'at_most'"),
        ({"controller": {**BOUND, "constraints": {"chrf": {"at_least": 0, "at_most": 1}}}}, "either"),
        ({"controller": {"kind": "constraint"}}, "go together"),
        ({"controller": {**BOUND, "kind": "variation"}}, "go together"),
        ({"controller": {**BOUND, "constraints": {"length": {"at_least": 0}}}}, "length.at_least: its weight"),
        ({"controller": {**BOUND, "constraints": {"chrf": {"at_most": 0}}}}, "must be below 0"),
        (
            {"controller": {**BOUND, "constraints": {"chrf": {"at_least": 0}, "length": {"at_most": 9}}}},
            "leave one component unconstrained",
        ),
        ({"controller": BOUND, "weights": {"chrf": 0.0}}, "chrf.at_least: its weight times its scale must be above 0"),
        ({"controller": BOUND, "weights": {"length": 0.0}}, "leave one component unconstrained"),
        ({"controller": BOUND, "components": ["chrf"]}, "two components or more"),
        ({"controller": BOUND, "weights": {"chrf": {"start": 0, "end": 1, "steps": 9}}}, "weights.chrf is moved by"),
        ({"controller": {"kind": "variance"}}, "set combine: normalize_then_sum"),
    ],
)
def test_a_controller_that_makes_no_sense_is_one_line(rewards: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        built(**rewards)
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("algorithm", "refused"),
    [
        ({"name": "grpo"}, True),
        ({"name": "gspo"}, True),
        ({"name": "reinforce"}, True),
        ({"name": "dr_grpo"}, False),
        ({"name": "rloo"}, False),
        ({"name": "reinforce", "kl": {"coef": 0.1}}, False),
    ],
)
def test_a_factor_that_the_advantages_divide_out_is_refused(algorithm: dict[str, Any], refused: bool) -> None:
    config = build_config(
        {
            "policy": {"model": "m"},
            "rewards": {"components": ["chrf", "length"], "controller": {"kind": "hypervolume"}},
            "algorithm": algorithm,
        }
    )
    if refused:
        with pytest.raises(UserError, match="divide out"):
            check_algorithm(config)
    else:
        check_algorithm(config)
