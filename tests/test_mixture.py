"""The mixture: known answers and invariants."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from rl_llm.algorithms import advantages
from rl_llm.algorithms.advantages import SCALE
from rl_llm.config import Ramp, RewardsConfig
from rl_llm.errors import UserError
from rl_llm.mixture import Mixture

NAN = np.nan
COMBINE = ["sum_then_normalize", "normalize_then_sum"]

# Inputs and answers worked out in float64 from the formulas of arXiv 2601.05242.
GOLDEN = {"a": np.array([1.0, 0.0, 1.0, 0.0]), "b": np.array([0.0, 1.0, 0.5, 0.5])}
GOLDEN_GROUPS = np.array([0, 0, 1, 1])
GOLDEN_WEIGHTS = {"a": 0.7, "b": 0.3}


def mixture(components, weights=None, **settings):
    """`components`: names, or settings by name."""
    items = components.items() if isinstance(components, dict) else ((name, {}) for name in components)
    return Mixture(
        RewardsConfig(
            components={name: {"use": "x", **spec} for name, spec in items}, weights=weights or {}, **settings
        )
    )


def mix(values, groups, weights=None, components=None, scale=SCALE["grpo"], step=0, **settings):
    made = mixture(components or list(values), weights, **settings)
    groups = None if groups is None else np.asarray(groups)
    return made.mix({k: np.asarray(v, float) for k, v in values.items()}, groups, step, scale)


def batch(seed=0, groups=6, samples=8, missing=0.0, scales=(1.0, 5.0, 0.2)):
    rng = np.random.default_rng(seed)
    n = groups * samples
    values = {name: rng.normal(size=n) * scale + 3 for name, scale in zip("abc", scales, strict=True)}
    for column in values.values():
        column[rng.random(n) < missing] = NAN
    return values, np.repeat(np.arange(groups), samples)


# ---- known answers


def test_gdpo_whitened_over_sequences():
    mixed = mix(GOLDEN, GOLDEN_GROUPS, GOLDEN_WEIGHTS, combine="normalize_then_sum", std_floor=0)
    expected = [0.6076436202501998, -0.6076436202501998, 1.0633763354378498, -1.0633763354378498]
    np.testing.assert_allclose(mixed.advantages, expected, rtol=3e-8)  # 1e-8 is added to the batch's std


def test_gdpo_before_whitening():
    mixed = mix(GOLDEN, GOLDEN_GROUPS, GOLDEN_WEIGHTS, combine="normalize_then_sum", std_floor=0)
    expected = np.array([0.2828423124751846, -0.2828423124751846, 0.4949740468315731, -0.4949740468315731])
    np.testing.assert_allclose(mixed.advantages / mixed.advantages[0], expected / expected[0], rtol=1e-12)


def test_weighted_sum_then_grpo():
    mixed = mix(GOLDEN, GOLDEN_GROUPS, GOLDEN_WEIGHTS, std_floor=0)
    a, b = 0.7071042811953865, 0.7071053526180051
    np.testing.assert_allclose(mixed.advantages, [a, -a, b, -b], rtol=1e-12)
    np.testing.assert_allclose(mixed.reward, [0.7, 0.3, 0.85, 0.15])


# ---- invariants


@pytest.mark.parametrize("combine", COMBINE)
def test_scaling_all_weights_changes_no_advantage(combine):
    values, groups = batch()
    base = mix(values, groups, {"a": 1, "b": 0.3, "c": -2}, combine=combine, std_floor=0.8)
    scaled = mix(values, groups, {"a": 100, "b": 30, "c": -200}, combine=combine, std_floor=0.8)
    np.testing.assert_allclose(scaled.advantages, base.advantages, rtol=1e-4)


@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("scale", sorted(SCALE))
@pytest.mark.parametrize("combine", COMBINE)
def test_contributions_add_up_to_the_advantage(combine, scale, missing):
    values, groups = batch(missing=missing)
    mixed = mix(values, groups, {"a": 1, "b": -0.3, "c": 2}, combine=combine, scale=SCALE[scale])
    np.testing.assert_allclose(sum(mixed.contributions.values()), mixed.advantages, rtol=1e-9, atol=1e-12)
    shares = [mixed.diagnostics[f"share/{name}"] for name in "abc"]
    assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("combine", COMBINE)
def test_a_missing_value_contributes_exactly_nothing(combine):
    values, groups = batch(missing=0.3)
    mixed = mix(values, groups, combine=combine)
    for name, column in values.items():
        assert (mixed.contributions[name][np.isnan(column)] == 0).all()
        for group in range(6):
            assert mixed.contributions[name][groups == group].sum() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("combine", COMBINE)
def test_having_a_component_is_no_advantage_by_itself(combine):
    # b is high for whom it applies to; a sum with zeros would prefer those rows to the others.
    values, groups = {"a": [0, 1, 0, 1], "b": [9, 9, NAN, NAN]}, [0] * 4
    mixed = mix(values, groups, combine=combine)
    np.testing.assert_allclose(mixed.advantages[:2], mixed.advantages[2:], atol=1e-12)
    np.testing.assert_array_equal(mixed.reward, [9, 10, 0, 1])


@pytest.mark.parametrize("combine", COMBINE)
def test_rows_without_any_value_leave_everything(combine):
    values, groups = batch()
    kept = np.arange(len(groups)) % 3 > 0
    holes = {name: np.where(kept, column, NAN) for name, column in values.items()}
    mixed = mix(holes, groups, combine=combine)
    alone = mix({name: column[kept] for name, column in values.items()}, groups[kept], combine=combine)
    np.testing.assert_array_equal(mixed.valid, kept)
    np.testing.assert_allclose(mixed.advantages[kept], alone.advantages, rtol=1e-12)
    assert (mixed.advantages[~kept] == 0).all()
    assert np.isnan(mixed.reward[~kept]).all()
    assert {k: pytest.approx(v) for k, v in mixed.diagnostics.items()} == alone.diagnostics


@pytest.mark.parametrize("combine", COMBINE)
def test_without_groups_the_batch_is_one(combine):
    values, groups = batch(missing=0.2)
    mixed, one = (mix(values, given, combine=combine, scale=SCALE["dr_grpo"]) for given in (None, 0 * groups))
    np.testing.assert_array_equal(mixed.advantages, one.advantages)
    np.testing.assert_array_equal(mixed.outcome, one.outcome)
    assert mixed.diagnostics == one.diagnostics


@pytest.mark.parametrize("scale", sorted(SCALE))
def test_advantage_of_the_sum_is_that_of_the_algorithm_alone(scale):
    values, groups = batch()
    mixed = mix(values, groups, {"a": 1, "b": -0.3, "c": 2}, scale=SCALE[scale], std_floor=0)
    tensors = map(torch.from_numpy, (mixed.reward, groups, mixed.valid))
    np.testing.assert_allclose(mixed.advantages, getattr(advantages, scale)(*tensors), rtol=1e-10, atol=1e-12)


def test_order_of_groups_and_rows_does_not_matter():
    values, groups = batch(missing=0.2)
    order = np.random.default_rng(1).permutation(len(groups))
    mixed = mix(values, groups)
    shuffled = mix({k: v[order] for k, v in values.items()}, 100 - groups[order])
    np.testing.assert_allclose(shuffled.advantages, mixed.advantages[order], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("combine", COMBINE)
def test_a_constant_component_has_no_share_and_a_lone_one_has_all(combine):
    values, groups = batch()
    mixed = mix({"a": values["a"], "b": np.full(len(groups), 0.1)}, groups, combine=combine)
    assert mixed.diagnostics["share/b"] == 0
    assert (mixed.contributions["b"] == 0).all()
    assert mixed.diagnostics["share/a"] == pytest.approx(1)
    assert mix({"a": values["a"]}, groups, combine=combine).diagnostics["share/a"] == pytest.approx(1)


@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("combine", COMBINE)
def test_a_constant_reward_gives_no_advantage(combine, floor):
    mixed = mix({"a": np.full(24, 0.1)}, np.repeat(np.arange(3), 8), combine=combine, std_floor=floor)
    np.testing.assert_allclose(mixed.advantages, 0, atol=1e-9)
    assert mixed.diagnostics["groups/without_signal"] == 1
    assert mixed.diagnostics["share/a"] == 0


@pytest.mark.parametrize("combine", COMBINE)
def test_the_floor_keeps_noise_from_becoming_signal(combine):
    values, groups = batch()
    values = {"a": values["a"].copy()}
    values["a"][groups == 0] = 3 + 1e-3 * (values["a"][groups == 0] - 3)
    free, floored = (mix(values, groups, combine=combine, std_floor=floor) for floor in (0.0, 0.5))
    assert np.abs(free.advantages[groups == 0]).max() > 0.5
    assert np.abs(floored.advantages[groups == 0]).max() < 0.01
    # The other groups spread about as the baseline does and are as they were, but for the batch's own scale.
    ratio = floored.advantages[groups > 0] / free.advantages[groups > 0]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)


def test_the_baseline_is_the_first_batch():
    values, groups = batch()
    made = mixture("abc", std_floor=1.0, combine="normalize_then_sum")
    made.mix(values, groups, 0, SCALE["grpo"])
    baseline = made.state_dict()["baseline"]
    inner = np.concatenate([values["a"][groups == g] - values["a"][groups == g].mean() for g in range(6)])
    assert baseline["a"]["a"] == pytest.approx((inner**2).sum() / (len(groups) - 6))
    made.mix({name: column * 100 for name, column in values.items()}, groups, 1, SCALE["grpo"])
    assert made.state_dict()["baseline"] == baseline


def test_the_floor_of_a_sum_uses_live_weights_and_covariance():
    values, groups = batch()
    weights = {"a": 1.0, "b": -0.5, "c": 0.0}
    seen = {}

    def scale(count, std, floor):
        seen["floor"] = floor
        return SCALE["grpo"](count, std, floor)

    mix(values, groups, weights, scale=scale, std_floor=0.5)
    total = values["a"] - 0.5 * values["b"]
    inner = np.concatenate([total[groups == g] - total[groups == g].mean() for g in range(6)])
    np.testing.assert_allclose(seen["floor"], 0.5 * np.sqrt((inner**2).sum() / (len(groups) - 6)))


# ---- gate, clip, scale


def test_a_gate_looks_at_raw_values_and_is_shut_without_one():
    components = {"a": {"clip": [0, 0.1]}, "b": {"gate": {"component": "a", "above": 0.5, "else": -7}}}
    mixed = mix({"a": [0.4, 0.5, NAN, 0.9], "b": [1, 2, 3, NAN]}, [0] * 4, components=components)
    np.testing.assert_allclose(mixed.reward, [0.1 - 7, 0.1 + 2, -7, 0.1])
    below = {"a": {}, "b": {"gate": {"component": "a", "above": 0, "below": 1, "else": 0}}}
    mixed = mix({"a": [-1, 0, 1, 2], "b": [10, 10, 10, 10]}, [0] * 4, components=below)
    np.testing.assert_allclose(mixed.reward, [-1, 10, 11, 2])


def test_clip_comes_after_the_gate_and_before_scale_and_weight():
    spec = {"gate": {"component": "b", "above": 1, "else": -9}, "clip": [-2, 2], "scale": 10}
    mixed = mix({"a": [5, 1, 5], "b": [1, 1, 0]}, [0] * 3, {"a": 0.5, "b": 0}, components={"a": spec, "b": {}})
    np.testing.assert_allclose(mixed.reward, [10, 5, -10])
    assert mixed.diagnostics["reward/a/mean"] == pytest.approx(11 / 3)


# ---- weights and state


def test_weights_follow_schedules_and_can_be_set():
    made = mixture("ab", {"a": Ramp(start=0, end=1, steps=10)})
    assert made.weights_at(5) == {"a": 0.5, "b": 1.0}
    made.set_weight("b", 3)
    assert made.weights_at(20) == {"a": 1.0, "b": 3}
    with pytest.raises(UserError, match="'length'"):
        mixture(["chrf", "length"]).set_weight("lenght", 1.0)
    with pytest.raises(UserError, match="finite"):
        made.set_weight("b", NAN)


@pytest.mark.parametrize("combine", COMBINE)
def test_state_survives_json(combine):
    values, groups = batch()
    ramp = {"a": Ramp(start=0, end=1, steps=10)}
    made = mixture("abc", ramp, combine=combine, std_floor=0.9)
    made.mix(values, groups, 0, SCALE["grpo"])
    made.set_weight("c", 0.25)
    again = mixture("cab", ramp, combine=combine, std_floor=0.9)
    again.load_state_dict(json.loads(json.dumps(made.state_dict())))
    later, groups = batch(seed=1)
    first, second = (m.mix(later, groups, 4, SCALE["grpo"]) for m in (made, again))
    np.testing.assert_allclose(second.advantages, first.advantages, rtol=1e-12)
    fresh = mixture("abc")
    fresh.load_state_dict(json.loads(json.dumps(mixture("abc").state_dict())))
    assert fresh.state_dict()["baseline"] is None
    with pytest.raises(UserError, match="components"):
        mixture("ab").load_state_dict(made.state_dict())


# ---- diagnostics


def test_diagnostics():
    values = {"a": [1, 2, 3, 5, 5, 5], "b": [-1, -2, NAN, 5, 5, 5]}
    mixed = mix(values, [0, 0, 0, 1, 1, 1], {"a": 2, "b": 1})
    expected = {
        "reward/mean": mixed.reward.mean(),
        "reward/std": mixed.reward.std(),
        "reward/a/mean": 3.5,
        "reward/a/std": np.std([1, 2, 3, 5, 5, 5]),
        "reward/b/mean": 2.4,
        "reward/b/std": np.std([-1, -2, 5, 5, 5]),
        "correlation/a~b": -1.0,
        "weights/a": 2,
        "weights/b": 1,
        "groups/without_signal": 0.5,
    }
    assert {key: mixed.diagnostics[key] for key in expected} == pytest.approx(expected)
    assert set(mixed.diagnostics) == {*expected, "share/a", "share/b"}
    assert all(type(number) in (int, float) for number in mixed.diagnostics.values())


def test_a_component_without_any_value_has_no_mean():
    mixed = mix({"a": [1, 2], "b": [NAN, NAN]}, [0, 0])
    assert "reward/b/mean" not in mixed.diagnostics
    assert mixed.diagnostics["correlation/a~b"] == 0
    assert mixed.diagnostics["share/b"] == 0


def test_the_mixture_needs_no_torch():
    code = "import sys, rl_llm.mixture; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
