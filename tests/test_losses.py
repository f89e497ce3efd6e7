"""Losses, KL, correction and aggregation: known answers, gradients and invariants."""

import pytest
import torch
from known import ALL, DIVISOR, ENGINE, GROUPS, MASK, NEW, OLD, REF, REWARDS, VALUES, close, f64

from rl_llm.algorithms import advantages, losses
from rl_llm.algorithms.correction import BOUNDS, correction
from rl_llm.algorithms.kl import KLCoefficient, kl
from rl_llm.algorithms.losses import LossInputs

GRPO = advantages.grpo(REWARDS, GROUPS, ALL)[:, None]


def inputs(logprobs=NEW, ratio=losses.token_ratio, advantage=GRPO, low=0.2, high=0.2, dual=None):
    return LossInputs(logprobs, OLD, ratio(logprobs, OLD, MASK), advantage, MASK, low, high, dual)


def token_mean(loss):
    return losses.aggregate(loss, MASK, "token_mean", DIVISOR)


def gradient(loss):
    """By the log-probs, of the mean over sequences of the mean over tokens."""
    logprobs = NEW.clone().requires_grad_()
    losses.aggregate(loss(logprobs), MASK, "seq_mean_token_mean", DIVISOR).backward()
    return logprobs.grad


# ---- policy losses


def test_dual_clip_bounds_the_loss_of_a_bad_sample_however_far_the_ratio_rises():
    far = inputs(logprobs=OLD + 9)
    loss, bounded = losses.clipped(far), losses.clipped(inputs(logprobs=OLD + 9, dual=3.0))
    bad = (GRPO < 0).expand(MASK.shape)
    assert (loss[bad] > 1000).all()
    close(bounded[bad], (-3 * GRPO).expand(MASK.shape)[bad])
    close(bounded[~bad], loss[~bad])


def test_sequence_ratio_is_the_geometric_mean():
    expected = [1.0, 0.9801986733067553, 1.5683121854901687, 0.9631944177208217]
    close(losses.sequence_ratio(NEW, OLD, MASK), f64(expected)[:, None].expand(MASK.shape))


def test_sequence_ratio_ignores_what_was_not_chosen():
    hidden = [torch.where(MASK, table, 7.0 + k) for k, table in enumerate((NEW, OLD))]
    close(losses.sequence_ratio(*hidden, MASK), losses.sequence_ratio(NEW, OLD, MASK))


@pytest.mark.parametrize("bounds", [(3e-4, 4e-4), (0.2, 0.2), (0.5, 0.9)])
def test_token_form_of_the_sequence_ratio_has_the_gradient_of_the_sequence_form(bounds):
    low, high = bounds

    def sequence_form(logprobs):
        s = (torch.where(MASK, logprobs - OLD, 0.0).sum(dim=1) / MASK.sum(dim=1)).exp()[:, None]
        return -torch.minimum(s * GRPO, s.clamp(1 - low, 1 + high) * GRPO).expand(MASK.shape)

    def token_form(logprobs):
        return losses.clipped(inputs(logprobs, losses.sequence_ratio, low=low, high=high))

    close(token_form(NEW), sequence_form(NEW))
    close(gradient(token_form), gradient(sequence_form))
    assert gradient(token_form).abs().sum() > 0


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0.2, 0.28, 0.04033778106555224), (1.0, 4.0, -0.1335414512106646)]
)
def test_cispo(low, high, expected):
    close(token_mean(losses.cispo(inputs(low=low, high=high))), expected)


def test_cispo_counts_its_upper_bound_from_one():
    logprobs = OLD + f64(7.0).log()  # a ratio of 7 everywhere
    found = losses.cispo(inputs(logprobs, low=1.0, high=4.0))
    close(found, -5.0 * GRPO * logprobs)


@pytest.mark.parametrize("bounds", [(0.2, 0.28), (1.0, 4.0)])
def test_gradient_of_cispo_is_that_of_the_log_prob_times_the_clipped_ratio(bounds):
    low, high = bounds
    found = gradient(lambda logprobs: losses.cispo(inputs(logprobs, low=low, high=high)))
    weight = torch.where(MASK, f64(1) / MASK.sum(dim=1, keepdim=True) / len(MASK), 0.0)
    close(found, -(NEW - OLD).exp().clamp(1 - low, 1 + high) * GRPO * weight)
    assert (found[MASK] != 0).all()  # a token outside the bounds is still learned from


def test_clipped_tokens_teach_nothing_where_they_went_the_right_way_too_far():
    found = gradient(lambda logprobs: losses.clipped(inputs(logprobs)))
    ratio = (NEW - OLD).exp()
    too_far = MASK & ((GRPO > 0) & (ratio > 1.2) | (GRPO < 0) & (ratio < 0.8))
    assert too_far.any()
    assert torch.equal(found != 0, MASK & ~too_far)


def test_all_losses_have_the_gradient_of_reinforce_where_the_policy_has_not_moved():
    def reinforce(logprobs):
        return -GRPO * logprobs

    def moved_to_old(loss, ratio=losses.token_ratio):
        logprobs = OLD.clone().requires_grad_()
        losses.aggregate(loss(logprobs, ratio), MASK, "seq_mean_token_mean", DIVISOR).backward()
        return logprobs.grad

    expected = moved_to_old(lambda logprobs, _: reinforce(logprobs))
    for loss in losses.LOSSES.values():
        for ratio in (losses.token_ratio, losses.sequence_ratio):
            close(moved_to_old(lambda lp, r, loss=loss: loss(inputs(lp, r, dual=3.0)), ratio), expected)


def test_policy_gradient_has_no_ratio():
    close(losses.policy_gradient(inputs()), -GRPO * NEW)


# ---- values


def test_value_loss_takes_the_worse_of_the_value_and_the_clipped_value():
    old = f64([1.0, 1.0, 1.0, 1.0])
    values = f64([1.1, 1.5, 1.5, 0.0])
    returns = f64([2.0, 2.0, 0.0, 2.0])
    # In the second the clipped value, 1.2, is further off than the value; in the third and fourth the value itself.
    close(losses.value_loss(values, old, returns, 0.2), f64([0.9**2, 0.8**2, 1.5**2, 2.0**2]) / 2)
    close(losses.value_loss(values, old, returns, None), (values - returns) ** 2 / 2)
    close(losses.value_loss(VALUES, VALUES, REF, 0.2), losses.value_loss(VALUES, VALUES, REF, None))


def test_value_that_moved_as_far_as_it_may_is_not_moved_further():
    values = f64([1.3, 0.7]).requires_grad_()
    losses.value_loss(values, f64([1.0, 1.0]), f64([2.0, 2.0]), 0.2).sum().backward()
    close(values.grad, [0.0, 0.7 - 2.0])  # towards the return it stops, away from it it is called back


# ---- KL


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("k1", -0.0035714285714285904), ("k2", 0.15562499999999996), ("k3", 0.14215210488232424)],
)
def test_kl_estimators(estimator, expected):
    close(token_mean(kl(NEW, REF, estimator)), expected)


def test_gradient_of_kl_estimators_as_losses():
    """Expected over the policy itself: that of the KL for k2, of the reverse KL for k3 and none for k1."""
    reference = f64([0.3, -0.2, 0.9, 0.1]).log_softmax(dim=0)

    def gradient(loss):
        logits = f64([0.5, 1.0, -0.3, 0.0]).requires_grad_()
        loss(logits.log_softmax(dim=0)).backward()
        return logits.grad

    def expected(estimator):
        return gradient(lambda lp: (lp.exp().detach() * kl(lp, reference, estimator)).sum())

    torch.testing.assert_close(expected("k1"), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(expected("k2"), gradient(lambda lp: (lp.exp() * (lp - reference)).sum()))
    torch.testing.assert_close(expected("k3"), gradient(lambda lp: (reference.exp() * (reference - lp)).sum()))


def test_kl_coefficient_moves_towards_its_target():
    coefficient, seen = KLCoefficient(0.2, target=0.1, horizon=10_000), []
    for measured in (0.05, 0.1, 0.13, 0.5):
        coefficient.update(measured, samples=256)
        seen.append(coefficient.value)
    close(seen, [0.198976, 0.198976, 0.19999475712, 0.20101873027645442])


def test_kl_that_is_not_finite_moves_no_coefficient():
    coefficient = KLCoefficient(0.2, target=0.1, horizon=100)
    for measured in (float("nan"), float("inf")):
        coefficient.update(measured, 64)
    assert coefficient.value == 0.2


def test_kl_coefficient_without_a_target_stays():
    coefficient = KLCoefficient(0.2, target=None, horizon=1)
    coefficient.update(5.0, samples=100)
    assert coefficient.value == 0.2


# ---- correction of the engine's log-probs


def corrected(kind, low, high):
    return token_mean(losses.clipped(inputs()) * correction(OLD, ENGINE, MASK, kind, low, high))


def test_truncated_importance_sampling():
    weight = correction(OLD, ENGINE, MASK, "tis", *BOUNDS["tis"])[MASK]
    close([weight.max(), weight.min()], [2.0, 0.44932896411722156])
    close(corrected("tis", *BOUNDS["tis"]), 0.1172182922716374)


def test_icepop_drops_the_weights_that_tis_clamps():
    close(corrected("icepop", 0.5, 2.0), 0.21129801515758634)


def test_icepop_keeps_weights_from_a_half_to_five():
    weights = f64([[0.499, 0.5, 1.0, 2.0, 5.0, 5.001]])
    kept = correction(weights.log(), torch.zeros_like(weights), weights > 0, "icepop", *BOUNDS["icepop"])
    close(kept[0, [0, 2, 3, 5]], [0.0, 1.0, 2.0, 0.0])
    assert BOUNDS["icepop"] == (0.5, 5.0)


def test_sequence_mask_goes_by_the_geometric_mean():
    means = [1.3543658444895976, 1.0020020013340003, 1.0202013400267558, 0.8331846439283305]
    for row, mean in enumerate(means):  # a pair of bounds close around it, and one on either side of it
        for low, high, kept in ((mean - 1e-9, mean + 1e-9, 1), (mean + 1e-9, 9, 0), (0, mean - 1e-9, 0)):
            weight = correction(OLD, ENGINE, MASK, "sequence_mask", low, high)
            assert weight[row].tolist() == [kept] * MASK.shape[1]
    assert correction(OLD, ENGINE, MASK, "sequence_mask", *BOUNDS["sequence_mask"])[:, 0].tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("kind", sorted(BOUNDS))
def test_correction_is_one_where_engine_and_learner_agree(kind):
    hidden = torch.where(MASK, OLD, OLD + 5)  # what was not chosen plays no part
    assert (correction(OLD, hidden, MASK, kind, *BOUNDS[kind]) == 1).all()


# ---- aggregation


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


def test_divisor_of_dr_grpo_is_the_longest_allowed_length_whatever_the_batch():
    """Neither the longest sample of the batch nor the width of the table it is padded to."""
    ones = torch.ones(MASK.shape, dtype=torch.float64)
    longer = losses.Divisor(tokens=14, sequences=4, max_length=100)
    close(losses.aggregate(ones, MASK, "seq_mean_token_sum_norm", longer), 14 / 400)
