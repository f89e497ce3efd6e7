"""Advantages and losses against known answers, worked out in float64 from the formulas of each paper."""

import pytest
import torch

from rl_llm.algorithms import PRESETS, advantages, build_algorithm, losses
from rl_llm.algorithms.losses import Divisor
from rl_llm.config import AlgorithmConfig

MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.bool)


def f64(rows):
    return torch.tensor(rows, dtype=torch.float64)


OLD = f64(
    [[-1.0, -0.5, -2.0, 0, 0], [-0.7, -1.2, -0.3, -0.9, -1.5], [-0.4, -2.5, 0, 0, 0], [-1.1, -0.6, -0.8, -1.9, 0]]
)
NEW = OLD + f64(
    [[0.1, 0.3, -0.4, 0, 0], [0.05, -0.25, 0, 0.2, -0.1], [-0.3, 1.2, 0, 0, 0], [0.15, -0.05, 0.35, -0.6, 0]]
)
REF = OLD + f64([[-0.05, 0.1, 0.2, 0, 0], [0, 0.15, -0.1, 0.05, 0.25], [0.2, -0.3, 0, 0, 0], [0.1, 0, -0.2, 0.3, 0]])
REWARDS = f64([1, 0, 0.5, 2])
GROUPS = torch.tensor([0, 0, 1, 1])
ALL = torch.ones(4, dtype=torch.bool)
DIVISOR = Divisor(tokens=int(MASK.sum()), sequences=4, max_length=5)


def close(actual, expected, rel=1e-12):
    torch.testing.assert_close(torch.as_tensor(actual), f64(expected), rtol=rel, atol=0)


def test_grpo_advantages():
    a, b = 0.7071057811879616, 0.7071061145205095
    close(advantages.grpo(REWARDS, GROUPS, ALL), [a, -a, -b, b])


def test_dr_grpo_advantages():
    close(advantages.dr_grpo(REWARDS, GROUPS, ALL), [0.5, -0.5, -0.75, 0.75])


def test_rloo_advantages():
    close(advantages.rloo(REWARDS, GROUPS, ALL), [1, -1, -1.5, 1.5])


@pytest.mark.parametrize(
    ("preset", "kl", "expected"),
    [
        ("grpo", {}, 0.1941468673334035),
        ("grpo", {"coef": 0.04, "estimator": "k3"}, 0.20142261732371952),
        ("dr_grpo", {}, 0.059734568439528776),
        ("rloo", {}, 0.1706701955415109),
    ],
)
def test_losses(preset, kl, expected):
    algorithm = build_algorithm(AlgorithmConfig(name=preset, kl=kl))
    advantage = algorithm.advantage(REWARDS, GROUPS, ALL)[:, None]
    loss = losses.clipped(NEW, OLD, advantage, algorithm.clip_low, algorithm.clip_high)
    if algorithm.kl.coef:
        loss = loss + algorithm.kl.coef * losses.kl(NEW, REF, algorithm.kl.estimator)
    close(losses.aggregate(loss, MASK, algorithm.aggregation, DIVISOR), expected)


def test_unequal_clip_bounds():
    advantage = advantages.grpo(REWARDS, GROUPS, ALL)[:, None]
    loss = losses.clipped(NEW, OLD, advantage, low=0.2, high=0.28)
    close(losses.aggregate(loss, MASK, "token_mean", DIVISOR), 0.10607910075876344)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("k1", -0.0035714285714285904), ("k2", 0.15562499999999996), ("k3", 0.14215210488232424)],
)
def test_kl_estimators(estimator, expected):
    close(losses.aggregate(losses.kl(NEW, REF, estimator), MASK, "token_mean", DIVISOR), expected, rel=1e-10)


def test_gradient_of_kl_estimators_as_losses():
    """Expected over the policy itself: that of the KL for k2, of the reverse KL for k3 and none for k1."""
    reference = f64([0.3, -0.2, 0.9, 0.1]).log_softmax(dim=0)

    def gradient(loss):
        logits = f64([0.5, 1.0, -0.3, 0.0]).requires_grad_()
        loss(logits.log_softmax(dim=0)).backward()
        return logits.grad

    def expected(estimator):
        return gradient(lambda lp: (lp.exp().detach() * losses.kl(lp, reference, estimator)).sum())

    torch.testing.assert_close(expected("k1"), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(expected("k2"), gradient(lambda lp: (lp.exp() * (lp - reference)).sum()))
    torch.testing.assert_close(expected("k3"), gradient(lambda lp: (reference.exp() * (reference - lp)).sum()))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("token_mean", 45 / 14),
        ("token_sum", 45),
        ("seq_mean_token_sum", 45 / 4),
        ("seq_mean_token_sum_norm", 45 / 20),
        ("seq_mean_token_mean", (2 + 3 + 1.5 + 5.25) / 4),
    ],
)
def test_aggregations_and_their_independence_of_split_and_padding(how, expected):
    token_loss = f64([[1, 2, 3, 9, 9], [1, 2, 3, 4, 5], [1, 2, 9, 9, 9], [3, 4, 6, 8, 9]])
    whole = losses.aggregate(token_loss, MASK, how, DIVISOR)
    close(whole, expected)
    parts = [losses.aggregate(token_loss[i : i + 1], MASK[i : i + 1], how, DIVISOR) for i in (2, 0, 3, 1)]
    close(sum(parts), expected)
    padded = losses.aggregate(
        torch.nn.functional.pad(token_loss, (0, 3), value=torch.nan),
        torch.nn.functional.pad(MASK, (0, 3)),
        how,
        DIVISOR,
    )
    close(padded, expected)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_rows_without_a_reward_change_nothing_for_the_others(name):
    estimator = PRESETS[name].advantage
    rewards = torch.cat([REWARDS, f64([torch.nan, torch.nan])])
    groups = torch.cat([GROUPS, torch.tensor([0, 7])])
    valid = torch.cat([ALL, torch.tensor([False, False])])
    result = estimator(rewards, groups, valid)
    close(result[:4], estimator(REWARDS, GROUPS, ALL).tolist())
    assert result[4:].tolist() == [0, 0]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_equal_rewards_and_lone_rows_give_no_advantage(name):
    result = PRESETS[name].advantage(f64([3, 3, 3, 8]), torch.tensor([0, 0, 0, 1]), ALL)
    assert result.tolist() == [0, 0, 0, 0]


def test_std_floor_bounds_what_noise_is_blown_up_to():
    rewards = f64([1.0, 1.0 + 1e-3, 0, 2])
    free = advantages.grpo(rewards, GROUPS, ALL)
    floored = advantages.grpo(rewards, GROUPS, ALL, std_floor=0.5)
    assert free[1] > 0.7
    assert floored[1] == pytest.approx(1e-3 / 2 / 0.5, rel=1e-5)
    assert floored[3] == free[3]


def test_rloo_is_dr_grpo_scaled():
    close(advantages.rloo(REWARDS, GROUPS, ALL), (2 * advantages.dr_grpo(REWARDS, GROUPS, ALL)).tolist())
