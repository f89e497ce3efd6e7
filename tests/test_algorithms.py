"""Presets, and what the config puts over them."""

import pytest
import torch
from known import ALL, DIVISOR, GROUPS, MASK, NEW, OLD, REF, REWARDS, VALUES, close

from rl_llm.algorithms import PRESETS, Algorithm, advantages, build_algorithm, losses
from rl_llm.algorithms.kl import kl
from rl_llm.config import AlgorithmConfig, build_config
from rl_llm.errors import RunFailed, UserError
from rl_llm.launch.preflight import check_algorithm


def built(name="grpo", **settings) -> Algorithm:
    return build_algorithm(AlgorithmConfig(name=name, **settings))


def loss_of(algorithm: Algorithm, advantage=None, extra=0.0):
    """The batch's loss, with a group's advantages if none are given."""
    if advantage is None:
        advantage = algorithm.estimator(REWARDS, GROUPS, ALL)[:, None]
    token_loss, _ = algorithm.loss(NEW, OLD, advantage, MASK)
    return losses.aggregate(token_loss + extra, MASK, algorithm.aggregation, DIVISOR)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("grpo", 0.1941468673334035),
        ("dr_grpo", 0.059734568439528776),
        ("rloo", 0.1706701955415109),
        ("dapo", 0.10607910075876344),
        ("gspo", 0.10691758546508767),
        ("cispo", -0.1335414512106646),
    ],
)
def test_loss_of_a_group_preset(preset, expected):
    close(loss_of(built(preset)), expected)


def test_grpo_with_a_kl():
    algorithm = built(kl={"coef": 0.04})
    close(loss_of(algorithm, extra=0.04 * kl(NEW, REF, algorithm.kl_estimator)), 0.20142261732371952)


def test_dual_clip():
    algorithm = built("ppo", advantage="grpo", dual_clip=3.0)
    close(loss_of(algorithm), 0.09799198063220453)


def test_ppo():
    algorithm = built("ppo", gamma=0.99)
    assert algorithm.whiten
    raw = advantages.gae(advantages.token_rewards(REWARDS, MASK), VALUES, MASK, algorithm.gamma, algorithm.lam)
    close(loss_of(algorithm, advantages.whiten(raw, MASK)), 0.09789711767887728)


def test_reinforce_pp():
    algorithm = built("reinforce_pp", kl={"coef": 0.01})
    assert algorithm.whiten
    penalty = 0.01 * torch.where(MASK, kl(OLD, REF, algorithm.kl_estimator), 0.0)
    rewards = advantages.token_rewards(REWARDS, MASK) - penalty
    returns = advantages.discounted_returns(rewards, MASK, algorithm.gamma)
    close(loss_of(algorithm, advantages.whiten(returns, MASK)), 0.07724390005251999)


def test_reinforce_is_minus_advantage_times_log_prob():
    advantage = advantages.whiten(REWARDS[:, None].expand(MASK.shape), MASK)
    close(loss_of(built("reinforce"), advantage), -(advantage * NEW)[MASK].mean())


def test_share_of_clipped_is_where_the_ratio_left_its_bounds():
    advantage = advantages.grpo(REWARDS, GROUPS, ALL)[:, None]
    _, outside = built("dapo").loss(NEW, OLD, advantage, MASK)
    ratio = (NEW - OLD).exp()
    assert torch.equal(outside, (ratio < 0.8) | (ratio > 1.28))
    _, outside = built("gspo").loss(NEW, OLD, advantage, MASK)
    assert outside.all(dim=1).tolist() == outside.any(dim=1).tolist() == [False, True, True, True]


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_mixture_multiplies_by_the_groups_factor_or_for_token_advantages_by_one(preset):
    algorithm = built(preset)
    assert algorithm.per_token == (preset in ("ppo", "reinforce", "reinforce_pp"))
    assert algorithm.scale is advantages.SCALE["dr_grpo" if algorithm.per_token else algorithm.advantage]


# ---- settings


def test_settings_go_over_the_preset():
    algorithm = built("grpo", advantage="rloo", ratio="sequence", clip_high=0.5, loss="cispo", aggregation="token_sum")
    assert (algorithm.advantage, algorithm.ratio, algorithm.aggregation) == ("rloo", "sequence", "token_sum")
    assert (algorithm.clip_low, algorithm.clip_high, algorithm.policy_loss) == (0.2, 0.5, losses.cispo)
    assert built("dapo", resample=0).resample == 0
    assert built("ppo", whiten=False).whiten is False
    assert built("ppo", lam=0.0).lam == 0


def doubled(x: losses.LossInputs) -> torch.Tensor:
    return 2 * losses.clipped(x)


def test_loss_can_be_a_function_of_ones_own():
    close(loss_of(built(loss=f"{__name__}:doubled")), 2 * 0.1941468673334035)


def averaged(x: losses.LossInputs) -> torch.Tensor:
    return losses.clipped(x).mean()


def test_loss_that_is_no_loss_a_token_is_refused():
    with pytest.raises(RunFailed, match=r"a loss a token, \[4, 5\] here, not \[\]"):
        loss_of(built(loss=f"{__name__}:averaged"))


def test_unknown_loss_is_refused():
    with pytest.raises(UserError, match="did you mean 'clipped'"):
        built(loss="cliped")


@pytest.mark.parametrize(("preset", "estimator"), [("grpo", "k3"), ("gspo", "k3"), ("rloo", "k1"), ("ppo", "k1")])
def test_estimator_of_the_kl_goes_by_its_place(preset, estimator):
    assert built(preset, kl={"coef": 0.1}).kl_estimator == estimator


@pytest.mark.parametrize("preset", ["grpo", "dapo", "gspo", "cispo"])
def test_kl_in_the_reward_is_refused_where_it_would_miss_the_division(preset):
    with pytest.raises(UserError, match=r"kl\.placement=reward: the advantage grpo"):
        built(preset, kl={"coef": 0.1, "placement": "reward"})
    built(preset, kl={"placement": "reward"})  # without a KL there is nothing to place
    built(preset, kl={"coef": 0.1, "placement": "reward"}, advantage="dr_grpo")


def test_k1_in_the_loss_is_refused():
    with pytest.raises(UserError, match=r"k1 teaches nothing in the loss"):
        built(kl={"coef": 0.1, "estimator": "k1"})
    assert built(kl={"coef": 0.1, "estimator": "k2"}).kl_estimator == "k2"


def test_bounds_of_the_correction_are_the_kinds_own_unless_given():
    assert built(correction={"kind": "icepop"}).correction_bounds == (0.5, 5.0)
    assert built(correction={"kind": "tis", "high": 5.0}).correction_bounds == (0.0, 5.0)
    assert built(correction={"kind": "sequence_mask", "low": 0.9}).correction_bounds == (0.9, 1.01)


@pytest.mark.parametrize(
    "correction", [{"kind": "icepop", "high": 0.4}, {"kind": "tis", "low": 3}, {"kind": "tis", "low": 1, "high": 1}]
)
def test_bounds_of_the_correction_that_leave_nothing_between_them_are_refused(correction):
    with pytest.raises(UserError, match=r"algorithm\.correction: low .* must be below high"):
        built(correction=correction)


@pytest.mark.parametrize(
    ("preset", "setting"),
    [
        ("grpo", {"gamma": 0.9}),
        ("rloo", {"lam": 0.9}),
        ("reinforce", {"lam": 0.9}),
        ("reinforce", {"clip_high": 0.3}),
        ("reinforce", {"ratio": "sequence"}),
        ("cispo", {"dual_clip": 3.0}),
    ],
)
def test_setting_that_would_do_nothing_is_refused(preset, setting):
    [name] = setting
    with pytest.raises(UserError, match=rf"algorithm\.{name} would do nothing with algorithm\.name={preset}"):
        built(preset, **setting)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rollout": {"samples_per_prompt": 1}}, "the advantage grpo compares the samples of a prompt"),
        (
            {"algorithm": {"name": "ppo", "resample": 1}, "rollout": {"samples_per_prompt": 1}},
            "algorithm.resample looks",
        ),
        (
            {"algorithm": {"name": "rloo"}, "rewards": {"combine": "normalize_then_sum"}},
            "which the advantage rloo does",
        ),
        ({"learner": {"minibatches": 9}}, "learner.minibatches 9: a minibatch takes whole groups"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_before_anything_starts(sections, message):
    base = {"policy": {"model": "x"}, "rewards": {"components": ["length"]}}
    config = build_config({name: base.get(name, {}) | sections.get(name, {}) for name in {**base, **sections}})
    with pytest.raises(UserError, match=message):
        check_algorithm(config)


def test_one_sample_a_prompt_is_enough_for_advantages_of_tokens():
    sections = {"policy": {"model": "x"}, "rewards": {"components": ["length"], "combine": "normalize_then_sum"}}
    check_algorithm(build_config(sections | {"algorithm": {"name": "ppo"}, "rollout": {"samples_per_prompt": 1}}))
