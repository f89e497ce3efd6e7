"""The forecast's numbers: worked out by hand, and what has to hold whatever the samples are."""

import math
from typing import Any

import numpy as np
import pytest

from rl_llm.config import RunConfig, build_config
from rl_llm.errors import UserError
from rl_llm.search.dominance import DOMINATED, FRONT, OUT_OF_REACH, UNDECIDED, bootstrap, verdicts
from rl_llm.search.forecast import default_kl, forecast
from rl_llm.search.samples import Samples
from rl_llm.search.tilt import reach, tilt

PROMPTS, N = 24, 32


def config(*components: str, metrics: tuple[str, ...] = (), **rewards: Any) -> RunConfig:
    specs = {name: {"use": "length", **rewards.pop(name, {})} for name in components}
    return build_config(
        {
            "policy": {"model": "a/model"},
            "rewards": {"components": specs, **rewards},
            "evaluation": {"metrics": dict.fromkeys(metrics, "length")},
        }
    )


def samples(**columns: np.ndarray) -> Samples:
    """Columns are [P, n]; base statistics are 0 and 1, so utilities are sums of raw values."""
    prompts, n = next(iter(columns.values())).shape
    values = {name: column.astype(np.float64).ravel() for name, column in columns.items()}
    return Samples(values, np.repeat(np.arange(prompts), n), dict.fromkeys(columns, (0.0, 1.0)))


def noise(seed: int, prompts: int = PROMPTS, n: int = N) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(prompts, n))


def test_two_samples_are_tilted_as_by_hand() -> None:
    # Three to one: sum q log(2 q) = 0.75 log 1.5 + 0.25 log 0.5, exp(1 / tau) = 3, 1 / (9/16 + 1/16) samples.
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    found = tilt(np.array([[[1.0, 0.0], [5.0, 6.0]]]), kl)
    assert found.q[0] == pytest.approx(np.array([[0.75, 0.25], [0.25, 0.75]]), abs=1e-9)
    assert found.tau[0] == pytest.approx(1 / math.log(3))
    assert found.kl[0] == pytest.approx(kl)
    assert found.ess[0] == pytest.approx(1.6)


def test_groups_that_differ_more_move_more_at_one_tau() -> None:
    found = tilt(np.array([[[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]]]), 0.1)
    odds = found.q[0, :, 0] / found.q[0, :, 1]
    assert odds == pytest.approx(np.exp(np.array([2.0, 1.0, 0.0]) / found.tau[0]))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("kl", [0.01, 0.7, 2.0])
def test_the_mean_kl_is_the_one_asked_for(scale: float, kl: float) -> None:
    advantages = np.stack([noise(1, n=64), noise(2, n=64) ** 3]) * scale
    found = tilt(advantages, kl)
    by_hand = (found.q * np.log(np.maximum(found.q * 64, 1e-300))).sum(axis=2).mean(axis=1)
    assert by_hand == pytest.approx([kl, kl], rel=1e-8)


def test_ties_bound_the_kl_and_a_constant_has_none() -> None:
    right = np.zeros((1, 4, 8))
    right[0, :, :2] = 1.0  # two of eight: log 4 at most
    assert reach(right) == pytest.approx([0.95 * math.log(4)])
    assert tilt(right, 5.0).kl == pytest.approx([0.95 * math.log(4)])
    flat = tilt(np.full((1, 4, 8), 0.3), 1.0)
    assert (flat.q == 1 / 8).all()
    assert flat.kl[0] == 0
    assert flat.ess[0] == pytest.approx(8)
    assert np.isinf(flat.tau[0])


def test_a_metric_under_a_weighting_is_the_weighted_mean_of_the_samples() -> None:
    a, held_out = noise(3), noise(4)
    held_out[0, :5] = np.nan  # what has no value leaves the mean
    found = forecast(samples(a=a, held_out=held_out), config("a", metrics=("held_out",)), kl=0.5)
    advantages = (a - a.mean(axis=1, keepdims=True)) / (a.std(axis=1, ddof=1, keepdims=True) + 1e-6)
    point = found.named("only a")
    assert point is not None
    assert point.tau is not None
    q = np.exp(advantages / point.tau)
    q /= q.sum(axis=1, keepdims=True)
    assert (q * np.log(q * N)).sum(axis=1).mean() == pytest.approx(0.5)
    assert point.metrics["a"]["mean"] == pytest.approx((q * a).sum(axis=1).mean())
    there = ~np.isnan(held_out)
    assert point.metrics["held_out"]["mean"] == pytest.approx(
        ((q * np.nan_to_num(held_out)).sum(axis=1) / (q * there).sum(axis=1)).mean()
    )
    base = found.base["held_out"]["mean"]
    gain = point.gains["held_out"]["mean"]
    assert base is not None
    assert gain is not None
    assert base + gain == pytest.approx(point.metrics["held_out"]["mean"])


def conflict(**changes: Any) -> tuple[Samples, RunConfig]:
    """Two components that pull against each other, a third of their own, and a metric that wants a bit of both."""
    a, b = noise(5), noise(6)
    b -= a
    found = samples(a=a, b=b, c=noise(7), both=np.minimum(a, b))
    return found, config("a", "b", "c", metrics=("both",), **changes)


def test_all_weightings_come_to_one_kl() -> None:
    found = forecast(*conflict())
    assert found.kl == found.asked == pytest.approx(default_kl(N))
    assert [point.kl for point in found.points] == pytest.approx([found.kl] * len(found.points))
    assert len(found.points) == 91 + 1  # a grid in twelfths has the corners and equal weights; and the configured ones
    assert all(sum(point.weights.values()) == pytest.approx(1) for point in found.points if point.name != "configured")


@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
def test_the_scale_of_all_weights_changes_nothing(combine: str) -> None:
    one, hundred = ({"a": 2.0 * k, "b": 1.0 * k, "c": 0.5 * k} for k in (1, 100))
    scored, settings = conflict(combine=combine)
    points = (
        forecast(scored, settings, weightings=[one]).points + forecast(scored, settings, weightings=[hundred]).points
    )
    first, other = (point for point in points if point.name == "")
    for metric in first.metrics:
        assert first.metrics[metric]["mean"] == pytest.approx(other.metrics[metric]["mean"], abs=1e-6)


def test_weights_that_differ_in_scale_alone_do_not_dominate_each_other() -> None:
    for weight in (1e-3, 1e3):
        scored, settings = conflict(weights=dict.fromkeys("abc", weight))
        found = forecast(scored, settings)
        verdict = {point.name: point.verdict for point in found.points}
        assert verdict["equal"] == verdict["configured"] == FRONT


def test_the_exponents_are_the_mixtures_own() -> None:
    a = noise(8)
    gated = {"gate": {"component": "a", "above": 99.0, "else": 0.0}}
    for settings in ({"b": {"clip": [50, 60]}}, {"b": gated}):
        found = forecast(samples(a=a, b=noise(9)), config("a", "b", **settings))
        assert found.silent == ["b"]  # its raw values differ, and what the mixture makes of them does not
    turned = forecast(samples(a=a, b=noise(9)), config("a", "b", a={"scale": -1.0}))
    point = turned.named("only a")
    assert point is not None
    assert (point.gains["a"]["high"] or 0) < 0
    assert turned.metrics == {"a": -1, "b": 1}


def test_a_constant_component_is_silent_and_its_corner_is_compared_with_none() -> None:
    found = forecast(samples(a=noise(10), b=np.ones((PROMPTS, N))), config("a", "b"), utility={"a": 1.0})
    assert found.silent == ["b"]
    assert found.signal == {"a": 1.0, "b": 0.0}
    corner = found.named("only b")
    assert corner is not None
    assert (corner.verdict, corner.kl, corner.tau, corner.ess) == (OUT_OF_REACH, 0.0, None, N)
    assert found.kl == found.asked
    assert found.fights == []


def test_rare_signal_lowers_the_kl_of_all() -> None:
    half = np.tile([0.0, 1.0], (PROMPTS, N // 2))
    found = forecast(samples(a=half, b=half), config("a", "b"), kl=1.5)
    assert found.kl == pytest.approx(0.95 * math.log(2))
    assert [point.kl for point in found.points] == pytest.approx([found.kl] * len(found.points))


def test_a_few_that_cannot_come_so_far_do_not_hold_up_the_others() -> None:
    half = np.tile([0.0, 1.0], (PROMPTS, N // 2))
    found = forecast(samples(a=noise(11), b=half), config("a", "b"), kl=1.5)
    assert found.kl == 1.5
    short = [point for point in found.points if point.verdict == OUT_OF_REACH]
    assert [point.name for point in short] == ["only b"]
    assert short[0].kl == pytest.approx(0.95 * math.log(2))


def test_opposed_components_fight_and_strangers_do_not() -> None:
    a = noise(12)
    found = forecast(samples(a=a, b=-a, c=noise(13)), config("a", "b", "c"))
    assert {(fight.component, fight.metric) for fight in found.fights} >= {("a", "b"), ("b", "a")}
    assert all("c" not in (fight.component, fight.metric) for fight in found.fights)
    fight = found.fights[0]
    assert (fight.change["high"] or 0) < 0


def test_dominated_is_said_only_beyond_the_interval() -> None:
    base = np.random.default_rng(0).normal(size=(2, 40))
    shaky = np.random.default_rng(1).normal(size=(2, 40))
    shaky -= shaky.mean(axis=1, keepdims=True)
    values = np.stack([base, base - 0.5, base + shaky - 0.05, base + np.array([[-9.0], [0.01]])])
    compared = np.ones(4, dtype=bool)
    assert verdicts(values, values, [1, 1], compared) == [FRONT, DOMINATED, UNDECIDED, FRONT]
    assert verdicts(values, values, [-1, -1], compared)[:2] == [DOMINATED, FRONT]
    alone = np.array([False, True, True, True])
    assert verdicts(values, values, [1, 1], alone) == [OUT_OF_REACH, DOMINATED, FRONT, FRONT]
    two = values[:2]
    # A metric that no weighting moves is none to be better in; one in which these two are alike keeps both in front.
    assert verdicts(two * [[1.0], [0.0]], two * [[1.0], [0.0]], [1, 1], compared[:2]) == [FRONT, DOMINATED]
    alike = values[[0, 1, 3]].copy()
    alike[1, 1] = alike[0, 1]
    assert verdicts(alike, alike, [1, 1], compared[:3])[:2] == [FRONT, FRONT]


def test_a_weight_on_noise_is_dominated() -> None:
    found = forecast(samples(a=noise(14), idle=noise(15)), config("a", "idle"), utility={"a": 1.0})
    verdict = {point.name: point.verdict for point in found.points if point.name}
    assert verdict == {"only a": FRONT, "equal": DOMINATED, "configured": DOMINATED, "only idle": DOMINATED}


def test_weights_are_chosen_on_one_half_and_read_on_the_other() -> None:
    scored, settings = conflict()
    utility = {"both": 1.0, "c": 0.3}
    found = forecast(scored, settings, utility=utility)
    assert found.best is not None
    first, second = found.best.halves
    # Each half by itself, at the KL of both: its own choice is the other's to read.
    read = []
    for number, other in ((0, second), (1, first)):
        part = forecast(scored.half(number), settings, utility=utility, weightings=[other], kl=found.kl)
        point = next(p for p in part.points if all(p.weights[k] == pytest.approx(other[k]) for k in other))
        read.append(point.metrics["utility"]["mean"])
    assert found.best.utility["mean"] == pytest.approx(np.mean(read))
    # What happens on the other half changes nothing about the choice.
    values = {name: column.copy() for name, column in scored.values.items()}
    values["both"][scored.groups % 2 == 1] *= -1
    changed = forecast(Samples(values, scored.groups, scored.base), settings, utility=utility)
    assert changed.best is not None
    assert changed.best.halves[0] == first
    assert changed.best.halves[1] != second


def test_a_choice_by_chance_promises_nothing() -> None:
    # Nothing that is rewarded has to do with the utility; a choice read where it was made would look like a gain.
    made, read = [], []
    for seed in range(8):
        columns = {name: noise(100 * seed + k, prompts=16, n=8) for k, name in enumerate(("a", "b", "c", "wanted"))}
        settings = config("a", "b", "c", metrics=("wanted",))
        found = forecast(samples(**columns), settings, utility={"wanted": 1.0})
        assert found.best is not None
        made.append(max(point.gains["utility"]["mean"] or 0.0 for point in found.points))
        read.append(found.best.over["base"]["mean"] or 0.0)
    assert np.mean(made) > 0.05
    assert abs(np.mean(read)) < np.mean(made) / 3


def test_first_points_begin_with_the_best_and_lie_apart() -> None:
    scored, settings = conflict()
    found = forecast(scored, settings, utility={"both": 1.0})
    assert found.best is not None
    points = found.best_points(4)
    assert points[0] == pytest.approx(found.best.weights)
    for i, point in enumerate(points):
        assert sum(point.values()) == pytest.approx(1)
        assert all(sum(abs(point[k] - other[k]) for k in point) / 2 >= 0.2 - 1e-9 for other in points[:i])
    unranked = forecast(scored, settings)
    assert unranked.best is None
    assert len(unranked.best_points(3)) == 3
    assert unranked.best_points(0) == []


def test_members_share_the_simplex_and_the_others_keep_their_weights() -> None:
    scored, settings = conflict(weights={"a": 1.0, "b": 1.0, "c": 0.0})
    found = forecast(scored, settings, members=["a", "b"])
    assert all(set(point.weights) == {"a", "b"} for point in found.points)
    only = found.named("only a")
    whole = forecast(scored, settings).named("only a")
    assert only is not None
    assert whole is not None
    assert only.metrics == whole.metrics


def test_a_large_simplex_is_drawn_and_the_same_each_time() -> None:
    columns = {name: noise(20 + k, prompts=8, n=8) for k, name in enumerate("abcde")}
    first, second = (forecast(samples(**columns), config(*"abcde")) for _ in range(2))
    assert len(first.points) == 256 + 5 + 2  # beside the corners, equal and configured weights
    assert first == second


def test_a_component_with_a_negative_weight_is_wanted_low() -> None:
    found = forecast(samples(a=noise(30), b=noise(31)), config("a", "b", weights={"b": -0.5}))
    assert found.metrics == {"a": 1, "b": -1}
    only = found.named("only b")
    assert only is not None
    assert only.weights == {"a": 0.0, "b": -1.0}
    assert (only.gains["b"]["high"] or 0) < 0


def test_intervals_leave_out_what_has_no_value() -> None:
    found = bootstrap(np.array([[1.0, np.nan, 3.0, 2.0], [np.nan] * 4, [5.0] * 4]))
    assert found.at(0)["mean"] == 2.0
    assert found.at(1) == {"mean": None, "low": None, "high": None}
    assert found.at(2) == {"mean": 5.0, "low": 5.0, "high": 5.0}


def test_what_cannot_be_told_is_refused() -> None:
    scored, settings = conflict()
    for bad, said in (
        (samples(a=noise(1, n=7)), "samples 7"),
        (samples(a=noise(1, prompts=7)), "7 tune prompts"),
    ):
        with pytest.raises(UserError, match=said):
            forecast(bad, config("a"))
    with pytest.raises(UserError, match=r"log\(32 / 4\) = 2.08"):
        forecast(scored, settings, kl=2.2)
    with pytest.raises(UserError, match="did you mean 'both'"):
        forecast(scored, settings, utility={"bot": 1.0})
    with pytest.raises(UserError, match="members"):
        forecast(scored, settings, members=["z"])
    with pytest.raises(ValueError, match="one size"):
        Samples({"a": np.zeros(3)}, np.array([0, 0, 1]), {})
