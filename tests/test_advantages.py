"""Advantages of groups and of tokens: known answers and invariants."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from known import ALL, GROUPS, MASK, OLD, REF, REWARDS, VALUES, close, f64

from rl_llm.algorithms import advantages
from rl_llm.algorithms.kl import kl

# ---- of groups


def test_grpo_divides_by_the_unbiased_spread():
    a, b = 0.7071057811879616, 0.7071061145205095
    close(advantages.grpo(REWARDS, GROUPS, ALL), [a, -a, -b, b], rel=1e-12)


def test_dr_grpo_divides_by_nothing():
    close(advantages.dr_grpo(REWARDS, GROUPS, ALL), [0.5, -0.5, -0.75, 0.75], rel=1e-12)


def test_rloo_leaves_the_sample_itself_out_of_its_baseline():
    close(advantages.rloo(REWARDS, GROUPS, ALL), [1, -1, -1.5, 1.5], rel=1e-12)


def test_rloo_is_dr_grpo_times_n_over_n_minus_one():
    rewards, groups = torch.randn(9, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 2])
    valid = torch.ones(9, dtype=torch.bool)
    factor = f64([2, 2, *[4 / 3] * 4, *[3 / 2] * 3])
    close(advantages.rloo(rewards, groups, valid), factor * advantages.dr_grpo(rewards, groups, valid))


@pytest.mark.parametrize("name", sorted(advantages.SCALE))
def test_rows_without_a_reward_change_nothing_for_the_others(name):
    estimator = getattr(advantages, name)
    rewards = torch.cat([REWARDS, f64([torch.nan, torch.nan])])
    groups = torch.cat([GROUPS, torch.tensor([0, 7])])
    valid = torch.cat([ALL, torch.tensor([False, False])])
    result = estimator(rewards, groups, valid)
    close(result[:4], estimator(REWARDS, GROUPS, ALL), rel=1e-12)
    assert result[4:].tolist() == [0, 0]


@pytest.mark.parametrize("name", sorted(advantages.SCALE))
def test_equal_rewards_and_lone_rows_give_no_advantage(name):
    result = getattr(advantages, name)(f64([3, 3, 3, 8]), torch.tensor([0, 0, 0, 1]), ALL)
    assert result.tolist() == [0, 0, 0, 0]


def test_size_of_rewards_counts_for_dr_grpo_and_rloo_but_not_for_grpo():
    for factor in (0.1, 30.0):
        close(advantages.grpo(factor * REWARDS, GROUPS, ALL), advantages.grpo(REWARDS, GROUPS, ALL), rel=2e-5)
        for estimator in (advantages.dr_grpo, advantages.rloo):
            close(estimator(factor * REWARDS, GROUPS, ALL), factor * estimator(REWARDS, GROUPS, ALL))


def test_std_floor_bounds_what_noise_is_blown_up_to():
    rewards = f64([1.0, 1.0 + 1e-3, 0, 2])
    free = advantages.grpo(rewards, GROUPS, ALL)
    floored = advantages.grpo(rewards, GROUPS, ALL, std_floor=0.5)
    assert free[1] > 0.7
    assert floored[1] == pytest.approx(1e-3 / 2 / 0.5, rel=1e-5)
    assert floored[3] == free[3]


# ---- of tokens


# Text an environment put in at the start, in between and at the end, and a row where nothing was chosen.
CHOSEN = torch.tensor([[0, 1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)


def test_outcome_is_the_reward_of_the_last_chosen_token():
    outcomes = f64([2, 3, 5])
    expected = torch.zeros(CHOSEN.shape, dtype=torch.float64)
    expected[0, 5], expected[1, 6] = 2, 3
    assert torch.equal(advantages.token_rewards(outcomes, CHOSEN), expected)


def test_gae_without_discount():
    raw = advantages.gae(advantages.token_rewards(REWARDS, MASK), VALUES, MASK, gamma=1.0, lam=1.0)
    close(raw, [[0.8, 0.6, 0.4, 0, 0], [-0.1, -0.1, -0.2, 0, 0.1], [0.2, 0, 0, 0, 0], [1.1, 0.9, 0.7, 0.4, 0]])


def test_gae_with_discount():
    expected = [
        [0.7322731, 0.5702, 0.4, 0, 0],
        [-0.08985701, -0.09447847, -0.20465548, -0.00495, 0.1],
        [0.195, 0, 0, 0, 0],
        [0.94884697, 0.8079181, 0.6602, 0.4, 0],
    ]
    raw = advantages.gae(advantages.token_rewards(REWARDS, MASK), VALUES, MASK, gamma=0.99, lam=0.95)
    close(raw, expected, rel=1e-8)


def test_reinforce_pp_takes_the_kl_from_token_rewards_and_whitens_returns():
    rewards = advantages.token_rewards(REWARDS, MASK) - 0.01 * torch.where(MASK, kl(OLD, REF, "k1"), 0.0)
    expected = [
        [0.17056847, 0.17116249, 0.16997445, 0, 0],
        [-1.01628258, -1.01628258, -1.01806464, -1.0168766, -1.01747062],
        [-0.42760921, -0.42998529, 0, 0, 0],
        [1.35801354, 1.3568255, 1.3568255, 1.35920158, 0],
    ]
    close(advantages.whiten(advantages.discounted_returns(rewards, MASK, 1.0), MASK), expected, rel=1e-8)


def test_returns_are_discounted_by_the_token():
    returns = advantages.discounted_returns(f64([[1, 2, 4]]), torch.ones(1, 3, dtype=torch.bool), gamma=0.5)
    assert returns.tolist() == [[3, 4, 4]]


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_lambda_one_is_return_less_value_and_zero_is_the_td_error(gamma):
    rewards = torch.where(MASK, torch.randn(MASK.shape, dtype=torch.float64), 0.0)
    returns = advantages.discounted_returns(rewards, MASK, gamma)
    monte_carlo = advantages.gae(rewards, VALUES, MASK, gamma, lam=1.0)
    close(monte_carlo, torch.where(MASK, returns - VALUES, 0.0))
    after = torch.cat([VALUES[:, 1:], torch.zeros(4, 1)], dim=1)  # values behind a row's end are 0 already
    td = advantages.gae(rewards, VALUES, MASK, gamma, lam=0.0)
    close(td, torch.where(MASK, rewards + gamma * after - VALUES, 0.0))


def test_tokens_the_policy_did_not_choose_are_stepped_over():
    rewards, values = (torch.randn(CHOSEN.shape, dtype=torch.float64) for _ in range(2))

    def packed(table):
        """Each row's chosen tokens next to each other at its start."""
        out = torch.zeros_like(table)
        for row, chosen in enumerate(CHOSEN):
            out[row, : int(chosen.sum())] = table[row, chosen]
        return out

    close_up = packed(CHOSEN.double()).bool()
    for gamma, lam in ((1.0, 1.0), (0.9, 0.8)):
        found = advantages.gae(rewards, values, CHOSEN, gamma, lam)
        close(packed(found), advantages.gae(packed(rewards), packed(values), close_up, gamma, lam))
        assert (found[~CHOSEN] == 0).all()
        found = advantages.discounted_returns(rewards, CHOSEN, gamma)
        close(packed(found), advantages.discounted_returns(packed(rewards), close_up, gamma))
        assert (found[~CHOSEN] == 0).all()


def test_whitened_numbers_have_mean_zero_and_unbiased_variance_one():
    found = advantages.whiten(5 + 3 * torch.randn(CHOSEN.shape, dtype=torch.float64), CHOSEN)
    close(found[CHOSEN].mean(), 0.0)
    close(found[CHOSEN].var(), 1.0, rel=1e-7)
    assert (found[~CHOSEN] == 0).all()


@pytest.mark.parametrize("chosen", [0, 1])
def test_a_single_token_is_whitened_to_zero(chosen):
    mask = torch.arange(10).reshape(2, 5) < chosen
    assert (advantages.whiten(torch.full((2, 5), 7.0), mask) == 0).all()


def test_whitening_ignores_what_stands_where_nothing_was_chosen():
    x = torch.where(MASK, VALUES, torch.nan)
    close(advantages.whiten(x, MASK), advantages.whiten(VALUES, MASK), rel=1e-15)


def test_whitening_of_parts_with_shared_sums_is_that_of_the_whole():
    """Two learners with half of the rows each, in step by a barrier."""
    barrier, sums = Barrier(2), [None, None]

    def whiten(rank):
        def total(mine):
            barrier.wait()
            sums[rank] = mine
            barrier.wait()
            return sums[0] + sums[1]

        rows = slice(2 * rank, 2 * rank + 2)
        return advantages.whiten(VALUES[rows], MASK[rows], total)

    with ThreadPoolExecutor(2) as pool:
        close(torch.cat(list(pool.map(whiten, range(2)))), advantages.whiten(VALUES, MASK))
