"""Several updates a step: minibatches, epochs, the learners' shares, and the log-probs they start from."""

from typing import Any

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
    packed,
    replace,
    snapshot,
    spied,
    train,
)

from rl_llm.config import PolicyConfig
from rl_llm.learner.batch import Batch, make_batch
from rl_llm.learner.learner import Learner
from rl_llm.policies import CausalLM
from rl_llm.policies.packing import pack
from rl_llm.table import ragged


@pytest.fixture(scope="module")
def policy(tiny_run: Tiny) -> CausalLM:
    return CausalLM(tiny_run.policy, PolicyConfig(precision="fp32"))


@pytest.fixture(scope="module")
def shard(policy: CausalLM) -> pa.Table:
    return make_shard(policy)


# ---- several updates


def test_old_log_probs_stay_those_before_the_first_update(
    tiny_run: Tiny, policy: CausalLM, shard: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run.config(
        learner={"epochs": 2, "minibatches": 2, "lr": 1e-2}, algorithm={"clip_low": 0.05, "clip_high": 0.05}
    )
    learner, seen = Learner(config, str(tiny_run.policy)), []
    loss = learner.objective.loss

    def noting(batch: Batch, *rest: Any) -> torch.Tensor:
        seen.append(batch.tokens["old_logprobs"].clone())
        return loss(batch, *rest)

    monkeypatch.setattr(learner.objective, "loss", noting)
    metrics = train(learner, shard)
    assert len(seen) == 4
    assert all(torch.equal(old, seen[0]) for old in seen)
    batch = packed(shard)
    with torch.no_grad():
        first = policy.forward(batch, TEMPERATURE).logprobs
    torch.testing.assert_close(seen[0][batch.rows], first, atol=1e-5, rtol=0)
    assert 0 < metrics["clip_fraction"] < 1


def test_clip_fraction_is_for_steps_of_several_updates(tiny_run: Tiny, shard: pa.Table) -> None:
    def fraction(**settings: int) -> float | None:
        learner = Learner(tiny_run.config(learner={"lr": 1e-9, **settings}), str(tiny_run.policy))
        return train(learner, shard).get("clip_fraction")

    assert fraction() is None
    assert fraction(epochs=2) == 0  # so small a rate moves no ratio out of its bounds
    assert fraction(minibatches=2) == 0


def test_looking_back_changes_no_first_update(tiny_run: Tiny, shard: pa.Table) -> None:
    """Whether old log-probs are this pass's own or were noted before makes no difference to the gradient."""
    for name in ("grpo", "gspo"):  # by the token, by the sequence
        alone, _ = spied(tiny_run, shard, algorithm={"name": name}, learner=PLAIN)
        twice, _ = spied(tiny_run, shard, algorithm={"name": name}, learner={**PLAIN, "epochs": 2})
        assert distance(twice, alone) < 1e-5


def test_ratio_makes_up_for_the_updates_before(tiny_run: Tiny, shard: pa.Table) -> None:
    """The second update of two on the same rows follows r A grad log p with r of the policy that has moved since."""
    config = tiny_run.config(
        learner={**PLAIN, "epochs": 2}, algorithm={"name": "rloo", "clip_low": 0.99, "clip_high": 99.0}
    )
    learner = Learner(config, str(tiny_run.policy))
    states = []
    apply = learner.apply

    def noting(*args: Any) -> None:
        states.append((snapshot(learner), gradients_of(learner.learning)))
        apply(*args)

    learner.apply = noting
    train(learner, shard)
    (weights, _), (later, found) = states
    policy = CausalLM(tiny_run.policy, PolicyConfig(precision="fp32"))
    batch = packed(shard)

    def logprobs(state: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            for name, p in policy.trainable.items():
                p.copy_(state[name])
        return policy.forward(batch, TEMPERATURE).logprobs

    old = logprobs(weights).detach()
    advantage = torch.from_numpy(columns(shard)["advantage"].to_numpy().copy())[batch.rows, None]
    new = logprobs(later)
    assert (new.detach() - old).abs().max() > 0.01
    (-((new - old).exp() * advantage)[batch.mask].sum() / int(batch.mask.sum())).backward()
    assert distance(found, gradients_of(policy.trainable)) < 1e-4


# ---- minibatches and shares


def laid_out(tiny_run: Tiny, shard: pa.Table, rank: int = 0, learners: int = 1, step: int = 0, **learner: int) -> Batch:
    table = shard.append_column("advantage", columns(shard)["advantage"])
    return make_batch(table, tiny_run.config(learner=learner), step, pack, rank, learners)


def rows_of(batch: Batch) -> list[list[int]]:
    """Rows by minibatch, sorted."""
    return [sorted(row for part in m.microbatches for row in part.rows.tolist()) for m in batch.minibatches]


@pytest.mark.parametrize(("count", "tokens"), [(1, 60), (2, 1), (2, 4096), (4, 60)])
def test_minibatches_divide_the_groups(tiny_run: Tiny, shard: pa.Table, count: int, tokens: int) -> None:
    batch = laid_out(tiny_run, shard, minibatches=count, tokens_per_microbatch=tokens)
    rows = rows_of(batch)
    assert len(rows) == count
    assert sorted(row for part in rows for row in part) == list(range(COUNT))
    groups = shard["group"].to_numpy()
    members = [set(groups[part]) for part in rows]
    assert sum(map(len, members)) == len(set(groups))  # no group is in two of them
    assert max(map(len, members)) - min(map(len, members)) <= 1
    for part, minibatch in zip(rows, batch.minibatches, strict=True):
        assert minibatch.divisor.sequences == len(part)
        assert minibatch.divisor.tokens == int(batch.mask[part].sum())
        assert minibatch.divisor.max_length == 5
    assert batch.mine.all()


def test_more_minibatches_than_groups_are_one_a_group(tiny_run: Tiny, shard: pa.Table) -> None:
    assert sorted(map(len, rows_of(laid_out(tiny_run, shard, minibatches=50)))) == [SAMPLES] * (COUNT // SAMPLES)


def test_minibatches_are_drawn_anew_each_step(tiny_run: Tiny, shard: pa.Table) -> None:
    first, again, later = (rows_of(laid_out(tiny_run, shard, step=step, minibatches=3)) for step in (0, 0, 1))
    assert first == again
    assert first != later


def test_every_row_is_trained_on_once_an_epoch(tiny_run: Tiny, shard: pa.Table) -> None:
    learner = Learner(tiny_run.config(learner={"epochs": 3, "minibatches": 2}), str(tiny_run.policy))
    seen: list[int] = []
    loss = learner.objective.loss

    def noting(batch: Batch, part: Any, *rest: Any) -> torch.Tensor:
        seen.extend(part.rows.tolist())
        return loss(batch, part, *rest)

    learner.objective.loss = noting
    assert train(learner, shard)["tokens/trained"] == sum(map(len, ragged(shard["completion_ids"])))
    for epoch in range(3):
        assert sorted(seen[epoch * COUNT : (epoch + 1) * COUNT]) == list(range(COUNT))


@pytest.mark.parametrize(("learners", "minibatches"), [(2, 1), (3, 3), (5, 1), (5, 3)])
def test_learners_share_the_rows_evenly(tiny_run: Tiny, shard: pa.Table, learners: int, minibatches: int) -> None:
    alone = laid_out(tiny_run, shard, minibatches=minibatches)
    batches = [laid_out(tiny_run, shard, rank, learners, minibatches=minibatches) for rank in range(learners)]
    for number, expected in enumerate(rows_of(alone)):
        assert sorted(row for batch in batches for row in rows_of(batch)[number]) == expected
        assert {batch.minibatches[number].divisor for batch in batches} == {alone.minibatches[number].divisor}
        # Tokens that are read, prompts too: no one has more than another by over one packed group.
        read = [
            [int((ids >= 0).sum()) for part in b.minibatches[number].microbatches for ids in part.segments]
            for b in batches
        ]
        load = [sum(sizes) for sizes in read]
        assert max(load) - min(load) <= max(max(sizes, default=0) for sizes in read)
    assert torch.equal(torch.stack([batch.mine for batch in batches]).sum(dim=0), torch.ones(COUNT, dtype=torch.int64))


def test_learners_cut_no_group_where_each_can_have_whole_ones(tiny_run: Tiny, shard: pa.Table) -> None:
    prompts = [np.arange(60) % 50 for _ in range(COUNT)]  # so long that to read one again costs most
    long = replace(shard, "prompt_ids", prompts)
    alone = laid_out(tiny_run, long)
    batches = [laid_out(tiny_run, long, rank, 3) for rank in range(3)]

    def read(batch: Batch) -> int:
        return sum(int((part.segments >= 0).sum()) for part in batch.microbatches())

    assert sum(map(read, batches)) == read(alone)
    # Also where each update has as many groups as there are learners.
    alone = laid_out(tiny_run, long, minibatches=2)
    assert sum(read(laid_out(tiny_run, long, rank, 3, minibatches=2)) for rank in range(3)) == read(alone)
    # More learners than groups: some are cut, so that nobody is without.
    assert all(read(laid_out(tiny_run, long, rank, 9)) > 0 for rank in range(9))


def test_learners_make_up_the_gradient_of_one(tiny_run: Tiny, shard: pa.Table) -> None:
    """The sum over ranks of each one's part, before anybody steps."""
    learner = Spy(tiny_run.config(learner=PLAIN), str(tiny_run.policy))
    alone, _ = spied(tiny_run, shard, away=1.0, learner=PLAIN)
    for rank in range(3):
        batch = laid_out(tiny_run, shard, rank, 3)
        batch.tokens["advantages"] = batch.advantages.float()[:, None].expand(batch.mask.shape)
        for part in batch.microbatches():
            learner.objective.loss(batch, part, batch.minibatches[0].divisor).backward()
    found = gradients_of(learner.learning)
    assert distance(found, alone) < 1e-5
