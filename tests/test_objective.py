"""What the learner makes of an algorithm: its losses, values, entropy, correction and reference, on a tiny policy."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import Tiny
from updates import (
    COUNT,
    PLAIN,
    SAMPLES,
    TEMPERATURE,
    Spy,
    columns,
    distance,
    gradients_of,
    make_shard,
    moved,
    packed,
    replace,
    snapshot,
    spied,
    train,
)

from rl_llm.algorithms import advantages as made
from rl_llm.config import PolicyConfig, RunConfig
from rl_llm.learner.batch import make_batch
from rl_llm.learner.learner import Learner
from rl_llm.policies import CausalLM
from rl_llm.table import ragged


@pytest.fixture(scope="module")
def policy(tiny_run: Tiny) -> CausalLM:
    return CausalLM(tiny_run.policy, PolicyConfig(precision="fp32"))


@pytest.fixture(scope="module")
def shard(policy: CausalLM) -> pa.Table:
    return make_shard(policy)


# ---- one update, however its rows are laid out


@pytest.mark.parametrize("name", ["grpo", "ppo"])  # one with all that is made of groups, one with all that is of tokens
def test_gradient_does_not_depend_on_split_padding_or_order(tiny_run: Tiny, shard: pa.Table, name: str) -> None:
    algorithm = {"name": name, "kl": {"coef": 0.1}, "correction": {"kind": "tis"}, "entropy_coef": 0.01}

    def of(tokens: int, *shards: pa.Table) -> tuple[dict, dict]:
        learner = {**PLAIN, "tokens_per_microbatch": tokens}
        return spied(tiny_run, *shards, learner=learner, algorithm=algorithm)

    whole, expected = of(100_000, shard)
    assert expected["kl"] > 1e-3
    shuffled = shard.take(pa.array(np.random.default_rng(0).permutation(COUNT)))
    for tokens, shards in (
        (1, [shard]),
        (60, [shard]),
        (60, [shuffled]),
        (100_000, [shard.slice(0, 7), shard.slice(7)]),
    ):
        found, metrics = of(tokens, *shards)
        assert distance(found, whole) < 1e-5
        assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_gradient_of_gspo_goes_by_the_sequence(tiny_run: Tiny, shard: pa.Table) -> None:
    """-(1/N) sum_i A_i grad s_i, from each sample alone."""
    found, _ = spied(tiny_run, shard, away=1.0, algorithm={"name": "gspo"}, learner=PLAIN)
    policy = CausalLM(tiny_run.policy, PolicyConfig(precision="fp32"))
    loss = torch.zeros(())
    advantages = columns(shard)["advantage"].to_pylist()
    for row, advantage in zip(shard.to_pylist(), advantages, strict=True):
        ids = torch.tensor(row["prompt_ids"] + row["completion_ids"])
        start = len(row["prompt_ids"])
        logp = (policy.unwrapped(input_ids=ids[None]).logits[0, start - 1 : -1] / row["temperature"]).log_softmax(dim=1)
        chosen = logp.gather(1, ids[start:, None])
        loss = loss - advantage * (chosen - chosen.detach()).mean().exp() / COUNT
    loss.backward()
    assert distance(found, gradients_of(policy.trainable)) < 1e-5


@pytest.mark.parametrize("name", ["dr_grpo", "rloo"])
def test_kl_in_the_reward_is_the_advantage_of_the_reward_less_the_kl(
    tiny_run: Tiny, shard: pa.Table, name: str
) -> None:
    """Handed in with the reward or taken from it in the learner, a sequence's KL comes to the same."""
    learner = moved(Spy(tiny_run.config(algorithm={"name": name, "kl": {"coef": 0.5, "placement": "reward"}}),
                        str(tiny_run.policy)))  # fmt: skip
    estimator = learner.objective.algorithm.estimator
    rewards = torch.sin(torch.arange(COUNT, dtype=torch.float64))
    groups, valid = torch.from_numpy(shard["group"].to_numpy().copy()), torch.ones(COUNT, dtype=torch.bool)
    table = shard.append_column("advantage", pa.array(estimator(rewards, groups, valid).numpy()))
    batch = make_batch(table, learner.config, 0, learner.policy.pack)
    learner.objective.prepare(batch, 1)
    gap = batch.tokens["old_logprobs"] - batch.tokens["ref_logprobs"]
    lost = torch.where(batch.mask, gap, 0.0).sum(dim=1).double()
    assert lost.abs().max() > 0.01
    expected = estimator(rewards - 0.5 * lost, groups, valid)[:, None].expand(batch.mask.shape)
    torch.testing.assert_close(batch.tokens["advantages"].double(), expected, rtol=1e-4, atol=1e-5)


# ---- tokens the policy did not choose


def test_tokens_of_an_environment_are_no_part_of_the_loss(tiny_run: Tiny, shard: pa.Table) -> None:
    """Their log-probs, the engine's at that, make no difference; neither do they count as tokens."""
    chosen = [np.arange(len(ids)) != 1 for ids in ragged(shard["completion_ids"])]
    masked = replace(shard, "action_mask", chosen)
    engine = [np.where(here, values, -50.0) for here, values in zip(chosen, ragged(shard["logprobs"]), strict=True)]
    for name in ("grpo", "gspo", "ppo"):
        algorithm = {"name": name, "kl": {"coef": 0.1}, "correction": {"kind": "tis"}, "entropy_coef": 0.01}
        expected, metrics = spied(tiny_run, masked, algorithm=algorithm, learner=PLAIN)
        assert metrics["tokens/trained"] == sum(int(here.sum()) for here in chosen)
        found, _ = spied(tiny_run, replace(masked, "logprobs", engine), algorithm=algorithm, learner=PLAIN)
        assert distance(found, expected) == 0
        whole, _ = spied(tiny_run, shard, algorithm=algorithm, learner=PLAIN)
        assert distance(whole, expected) > 1e-3


# ---- values


def value_gradients(tiny_run: Tiny, shard: pa.Table, model: str, coef: float) -> dict[str, torch.Tensor]:
    algorithm = {"name": "ppo", "value": {"model": model, "coef": coef}}
    return spied(tiny_run, shard, away=1.0, algorithm=algorithm, learner=PLAIN)[0]


def test_value_loss_reaches_a_shared_trunk_and_not_one_that_is_the_policys_alone(
    tiny_run: Tiny, shard: pa.Table
) -> None:
    def of_policy(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: g for name, g in gradients.items() if not name.startswith("value.")}

    def of_values(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: g for name, g in gradients.items() if name.startswith("value.")}

    shared, strong = (value_gradients(tiny_run, shard, "shared", coef) for coef in (0.1, 1.0))
    own, own_strong = (value_gradients(tiny_run, shard, "own", coef) for coef in (0.1, 1.0))
    assert distance(of_policy(strong), of_policy(shared)) > 0.1
    assert all(torch.equal(g, of_policy(own)[name]) for name, g in of_policy(own_strong).items())
    assert sorted(of_values(shared)) == ["value.head.bias", "value.head.weight"]
    assert any(name.startswith("value.trunk.") for name in own)
    # It is linear in its weight.
    assert distance(of_values(own_strong), {n: 10 * g for n, g in of_values(own).items()}) < 1e-4


def test_values_start_at_zero_and_token_advantages_are_those_of_the_formula(tiny_run: Tiny, shard: pa.Table) -> None:
    config = tiny_run.config(algorithm={"name": "ppo", "gamma": 0.9, "lam": 0.8, "kl": {"coef": 0.5}})
    table = shard
    for name in ("advantage", "outcome"):
        table = table.append_column(name, columns(shard)[name])
    learner = Spy(config, str(tiny_run.policy))
    fresh, later = (make_batch(table, config, 0, learner.policy.pack) for _ in range(2))
    learner.objective.prepare(fresh, 1)
    assert not fresh.tokens["values"].any()
    moved(learner).objective.prepare(later, 1)
    tokens, mask = later.tokens, later.mask
    assert tokens["values"][mask].std() > 0.05
    penalty = 0.5 * torch.where(mask, tokens["old_logprobs"] - tokens["ref_logprobs"], 0.0)
    rewards = made.token_rewards(later.outcomes.float(), mask) - penalty
    expected = made.gae(rewards, tokens["values"], mask, 0.9, 0.8)
    torch.testing.assert_close(tokens["returns"], expected + tokens["values"])
    torch.testing.assert_close(tokens["advantages"], made.whiten(expected, mask))
    assert penalty.abs().max() > 0.01


@pytest.mark.learning
@pytest.mark.parametrize("model", ["shared", "own"])
def test_values_learn(tiny_run: Tiny, shard: pa.Table, model: str, seed: int) -> None:
    """What a prompt is worth is found out on a fixed batch; who knows it has no advantages left to move the policy."""
    values = np.repeat(np.random.default_rng(seed).permutation([0.0, 1.0, -1.0, 0.5, 2.0, -0.5]), SAMPLES)
    algorithm = {"name": "ppo", "whiten": False, "value": {"model": model, "clip": None, "coef": 10.0}}
    config = tiny_run.config(learner={"lr": 3e-3}, algorithm=algorithm)
    learner = Learner(config, str(tiny_run.policy))
    explained = [train(learner, shard, step, values)["value/explained"] for step in range(60)]
    assert explained[0] < 0.1
    # The policy moves the trunk meanwhile, so single steps vary.
    assert np.median(explained[-20:]) > 0.75


# ---- entropy


def exact_entropy(policy: CausalLM, shard: pa.Table) -> float:
    """The mean over tokens of the entropy of the distribution each was drawn from, from all logits of each sample."""
    entropies = []
    for row in shard.to_pylist():
        ids = torch.tensor(row["prompt_ids"] + row["completion_ids"])
        with torch.no_grad():
            logits = policy.unwrapped(input_ids=ids[None]).logits[0, len(row["prompt_ids"]) - 1 : -1]
        entropies.append(torch.distributions.Categorical(logits=logits / row["temperature"]).entropy())
    return float(torch.cat(entropies).mean())


def test_entropy_is_the_whole_distributions_with_a_bonus_and_an_estimate_without(
    tiny_run: Tiny, policy: CausalLM, shard: pa.Table
) -> None:
    def entropy(coef: float) -> float:
        config = tiny_run.config(algorithm={"entropy_coef": coef})
        return train(Learner(config, str(tiny_run.policy)), shard)["entropy"]

    assert entropy(0.1) == pytest.approx(exact_entropy(policy, shard), rel=1e-5)
    learned = np.concatenate(ragged(shard["logprobs"]))
    assert entropy(0.0) == pytest.approx(-learned.mean(), rel=1e-4)


def test_gradient_of_the_entropy_bonus_is_that_of_the_entropy(tiny_run: Tiny, shard: pa.Table) -> None:
    """Beside that of the policy loss: the difference it makes, against autograd through all logits."""
    plain, _ = spied(tiny_run, shard, away=1.0, algorithm={"name": "rloo"}, learner=PLAIN)
    with_bonus, _ = spied(tiny_run, shard, away=1.0, algorithm={"name": "rloo", "entropy_coef": 2.0}, learner=PLAIN)
    policy = CausalLM(tiny_run.policy, PolicyConfig(precision="fp32"))
    total, tokens = torch.zeros(()), 0
    for row in shard.to_pylist():
        ids = torch.tensor(row["prompt_ids"] + row["completion_ids"])
        logits = policy.unwrapped(input_ids=ids[None]).logits[0, len(row["prompt_ids"]) - 1 : -1] / row["temperature"]
        total = total + torch.distributions.Categorical(logits=logits).entropy().sum()
        tokens += len(row["completion_ids"])
    (-2.0 * total / tokens).backward()
    expected = gradients_of(policy.trainable)
    assert distance({name: with_bonus[name] - plain[name] for name in plain}, expected) < 1e-4


# ---- correction


def shifted(shard: pa.Table, by: dict[int, float]) -> pa.Table:
    """The engine's log-probs moved by so much in some rows: their tokens' weights are exp(-by)."""
    rows = [values + by.get(row, 0.0) for row, values in enumerate(ragged(shard["logprobs"]))]
    return replace(shard, "logprobs", [row.astype(np.float32) for row in rows])


def without(shard: pa.Table, rows: list[int], tiny_run: Tiny) -> dict[str, torch.Tensor]:
    """The gradient with the advantages of some rows at 0: they leave the loss, not its divisor."""
    learner = Spy(tiny_run.config(learner=PLAIN), str(tiny_run.policy))
    values = columns(shard)["advantage"].to_numpy().copy()
    values[rows] = 0
    train(learner, shard, values=values)
    return learner.gradients


@pytest.mark.parametrize("kind", ["icepop", "sequence_mask"])
@pytest.mark.parametrize("by", [-2.0, 2.0])
def test_rows_far_from_the_engine_are_dropped(tiny_run: Tiny, shard: pa.Table, kind: str, by: float) -> None:
    far = [2, 9, 20]
    found, metrics = spied(
        tiny_run, shifted(shard, dict.fromkeys(far, by)), away=1.0, learner=PLAIN,
        algorithm={"correction": {"kind": kind}},
    )  # fmt: skip
    assert distance(found, without(shard, far, tiny_run)) < 1e-4
    lengths = np.array(list(map(len, ragged(shard["completion_ids"]))))
    assert metrics["correction/kept"] == pytest.approx(1 - lengths[far].sum() / lengths.sum())
    assert metrics["mismatch/max"] == pytest.approx(2, abs=1e-4)


def test_truncated_weights_multiply_the_loss(tiny_run: Tiny, shard: pa.Table) -> None:
    by = {1: 1.0, 5: -0.3, 12: -3.0}
    found, metrics = spied(
        tiny_run, shifted(shard, by), away=1.0, learner=PLAIN, algorithm={"correction": {"kind": "tis"}}
    )
    weight = np.ones(COUNT)
    weight[list(by)] = [np.exp(-1), np.exp(0.3), 2.0]
    learner = Spy(tiny_run.config(learner=PLAIN), str(tiny_run.policy))
    train(learner, shard, values=columns(shard)["advantage"].to_numpy() * weight)
    assert distance(found, learner.gradients) < 1e-4
    lengths = np.array(list(map(len, ragged(shard["completion_ids"]))))
    assert metrics["correction/weight"] == pytest.approx((weight * lengths).sum() / lengths.sum(), rel=1e-4)
    assert metrics["correction/kept"] == 1


# ---- reference


@pytest.mark.parametrize("placement", ["loss", "reward"])
@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_kl_is_zero_at_the_start_and_again_after_a_refresh(
    tiny_run: Tiny, shard: pa.Table, trainable: str, placement: str
) -> None:
    config = tiny_run.config(
        policy={"trainable": trainable},
        algorithm={
            "name": "rloo", "kl": {"coef": 0.1, "placement": placement, "estimator": "k3"},
            "reference": {"refresh_every": 3},
        },
    )  # fmt: skip
    learner = Learner(config, str(tiny_run.policy))
    kls = [train(learner, shard, step)["kl"] for step in range(7)]
    for step, found in enumerate(kls):
        assert (found < 1e-6) == (step % 3 == 0), kls


def test_reference_of_an_adapter_is_the_policy_without_it(tiny_run: Tiny, policy: CausalLM, shard: pa.Table) -> None:
    config = tiny_run.config(policy={"trainable": "lora"}, algorithm={"kl": {"coef": 0.1}})
    learner = Learner(config, str(tiny_run.policy))
    for step in range(3):
        train(learner, shard, step)
    batch = packed(shard)
    reference = learner.objective.reference
    assert reference is not None
    found = reference.logprobs(batch, TEMPERATURE)
    with torch.no_grad():
        torch.testing.assert_close(found, policy.forward(batch, TEMPERATURE).logprobs, atol=1e-5, rtol=0)
        assert (
            learner.policy.forward(batch, TEMPERATURE).logprobs - found
        ).abs().max() > 0.01  # the adapter is on again


def test_coefficient_of_the_kl_follows_its_target(tiny_run: Tiny, shard: pa.Table) -> None:
    algorithm = {"kl": {"coef": 0.5, "target": 1e-4, "horizon": COUNT}}
    learner = Learner(tiny_run.config(algorithm=algorithm), str(tiny_run.policy))
    coefs = [train(learner, shard, step)["kl/coef"] for step in range(4)]
    # The first KL is 0, so the weight falls by the most it may; then the policy is far away.
    assert coefs == pytest.approx([0.5, 0.5 * 0.8, 0.5 * 0.8 * 1.2, 0.5 * 0.8 * 1.2**2])


# ---- state


def full(tiny_run: Tiny, trainable: str) -> RunConfig:
    """Everything a learner may have to remember."""
    return tiny_run.config(
        policy={"trainable": trainable, "last_layers": 1},
        learner={"lr": 1e-2, "epochs": 2, "minibatches": 2},
        algorithm={
            "name": "ppo", "value": {"model": "own"}, "entropy_coef": 0.01,
            "kl": {"coef": 0.1, "target": 0.05, "horizon": 100}, "reference": {"refresh_every": 2},
        },
    )  # fmt: skip


@pytest.mark.parametrize("trainable", ["all", "last_layers", "lora"])
def test_saved_state_goes_on_with_the_same_updates_bit_for_bit(
    tiny_run: Tiny, shard: pa.Table, tmp_path: Path, trainable: str
) -> None:
    config = full(tiny_run, trainable)
    learner = Learner(config, str(tiny_run.policy))
    for step in range(3):  # the reference was refreshed after the second
        train(learner, shard, step)
    learner.save(tmp_path)
    restored = Learner(config, str(tiny_run.policy))
    restored.load(tmp_path)
    for step in range(3, 6):
        expected = train(learner, shard, step)
        assert train(restored, shard, step) == expected
        found = snapshot(restored)
        assert [name for name, p in snapshot(learner).items() if not torch.equal(p, found[name])] == []
    references = [side.objective.reference.named_weights() for side in (restored, learner)]
    assert references[0].keys() == references[1].keys() != set()
    assert all(torch.equal(references[0][name], references[1][name]) for name in references[1])
    assert expected["kl/coef"] != 0.1
