"""The learner: its log-probs and gradients depend on the samples alone, and a bad update is never applied."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from conftest import Tiny
from updates import Spy, update

from rl_llm.config import PolicyConfig
from rl_llm.errors import RunFailed
from rl_llm.launch.warm_start import base_path
from rl_llm.learner.learner import Learner
from rl_llm.policies import CausalLM
from rl_llm.policies.packing import make_rows, microbatches, pack
from rl_llm.runtime.weights import unflatten
from rl_llm.tasks import load_task

TEXTS = ["red", "3 please blue", "17 there again now green", "gold gold gold gold gold gold gold"]
SAMPLES = 5


@pytest.fixture(scope="module")
def policy(tiny_run: Tiny) -> CausalLM:
    return CausalLM(tiny_run.policy, PolicyConfig(precision="fp32"))


@pytest.fixture(scope="module")
def shard(policy: CausalLM) -> pa.Table:
    """Four groups of five samples; prompts and completions differ in length."""
    count = len(TEXTS) * SAMPLES
    params = tiny.greedy(samples_per_prompt=SAMPLES, temperature=0.9)
    groups = np.repeat(np.arange(len(TEXTS)), SAMPLES)
    return tiny.generate(policy, tiny.prompt_table(policy, TEXTS), np.arange(count), groups, params)


def columns(shard: pa.Table, missing: list[int] | None = None) -> pa.Table:
    """Reward columns with a different advantage for each sample; rows in `missing` have no reward."""
    ids = shard["sample_id"].to_numpy()
    gone = np.isin(ids, missing or [])
    advantages = np.where(gone, 0, np.sin(3.0 * ids + 1)).astype(np.float32)
    return pa.table({"reward": pa.array(advantages, mask=gone), "advantage": pa.array(advantages), "trained": ~gone})


def gradients(
    tiny_run: Tiny, *shards: pa.Table, missing: list[int] | None = None, **sections: Any
) -> tuple[dict, dict]:
    """Gradients and metrics of one update of the base policy."""
    learner = Spy(tiny_run.config(**sections), str(tiny_run.policy))
    if learner.objective.reference is not None:  # away from it, or the KL has no gradient
        with torch.no_grad():
            for p in learner.policy.trainable.values():
                p.mul_(1.05)
    given = [columns(shard, missing) for shard in shards]
    metrics = update(learner, pa.concat_tables(given), 0, *shards)
    return learner.gradients, metrics


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    a, b = (torch.cat([g.flatten() for g in side.values()]).double() for side in (found, expected))
    assert b.norm() > 0.01
    assert float((a - b).norm() / b.norm()) < 1e-5


def budget(tokens: int) -> dict[str, Any]:
    return {"lr": 1e-2, "max_grad_norm": 1e9, "tokens_per_microbatch": tokens}


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("tokens", [1, 40, 100])
def test_gradient_does_not_depend_on_the_microbatch_split(
    tiny_run: Tiny, shard: pa.Table, algorithm: str, tokens: int
) -> None:
    kl = {"name": algorithm, "kl": {"coef": 0.1, "placement": "loss"}}
    whole, whole_metrics = gradients(tiny_run, shard, learner=budget(100_000), algorithm=kl)
    split, split_metrics = gradients(tiny_run, shard, learner=budget(tokens), algorithm=kl)
    assert whole_metrics["kl"] > 1e-3
    assert_close(split, whole)
    assert split_metrics == pytest.approx(whole_metrics, rel=1e-4, abs=1e-5)


def test_gradient_does_not_depend_on_the_order_of_rows_or_on_shards(tiny_run: Tiny, shard: pa.Table) -> None:
    expected, _ = gradients(tiny_run, shard, learner=budget(60))
    order = np.random.default_rng(0).permutation(shard.num_rows)
    shuffled = shard.take(pa.array(order))
    assert_close(gradients(tiny_run, shuffled, learner=budget(60))[0], expected)
    assert_close(gradients(tiny_run, shuffled.slice(0, 7), shuffled.slice(7), learner=budget(60))[0], expected)


def test_rows_without_a_reward_contribute_nothing(tiny_run: Tiny, shard: pa.Table) -> None:
    missing = [0, 6, 7, 19]
    masked, _ = gradients(tiny_run, shard, missing=missing, learner=budget(60))
    left = shard.filter(pa.array(~np.isin(np.arange(shard.num_rows), missing)))
    assert_close(masked, gradients(tiny_run, left, learner=budget(60))[0])


def test_gradient_checkpointing_changes_no_gradient(tiny_run: Tiny, shard: pa.Table) -> None:
    kept, _ = gradients(tiny_run, shard, learner=budget(60), policy={"gradient_checkpointing": True})
    assert_close(kept, gradients(tiny_run, shard, learner=budget(60))[0])


def reference_gradients(tiny_run: Tiny, shard: pa.Table) -> dict[str, torch.Tensor]:
    """GRPO's gradient from its formula, each sample alone: -(1/N) sum_i A_i (1/T_i) sum_t grad log p_it."""
    policy = CausalLM(tiny_run.policy, PolicyConfig(precision="fp32"))
    table = shard.append_column("advantage", columns(shard)["advantage"])
    loss = torch.zeros(())
    for row in table.select(["prompt_ids", "completion_ids", "advantage", "temperature"]).to_pylist():
        ids = torch.tensor(row["prompt_ids"] + row["completion_ids"])
        logits = policy.unwrapped(input_ids=ids[None]).logits[0, len(row["prompt_ids"]) - 1 : -1] / row["temperature"]
        chosen = logits.log_softmax(dim=1).gather(1, ids[len(row["prompt_ids"]) :, None])
        loss = loss - row["advantage"] * chosen.mean() / table.num_rows
    loss.backward()
    return {name: p.grad for name, p in policy.trainable.items() if p.grad is not None}


def test_gradient_is_that_of_the_formula_over_samples_alone(tiny_run: Tiny, shard: pa.Table) -> None:
    found, metrics = gradients(tiny_run, shard, learner=budget(60))
    assert_close(found, reference_gradients(tiny_run, shard))
    assert 0 < metrics["mismatch"] <= metrics["mismatch/max"] < 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_packed_logprobs_are_those_of_each_sample_alone(policy: CausalLM, shard: pa.Table, temperature: float) -> None:
    prompts = [np.array(ids) for ids in shard["prompt_ids"].to_pylist()]
    completions = [np.array(ids) for ids in shard["completion_ids"].to_pylist()]
    parts = microbatches(make_rows(shard["group"].to_pylist(), prompts, completions, 60), 60)
    assert len(parts) > 1
    seen = []
    for part in parts:
        batch = pack(part)
        with torch.no_grad():
            packed = policy.forward(batch, temperature).logprobs
        for at, row in enumerate(batch.rows.tolist()):
            seen.append(row)
            ids = torch.tensor(np.concatenate([prompts[row], completions[row]]))
            with torch.no_grad():
                logits = policy.unwrapped(input_ids=ids[None]).logits[0, len(prompts[row]) - 1 : -1] / temperature
            alone = logits.log_softmax(dim=1).gather(1, ids[len(prompts[row]) :, None]).squeeze(1)
            torch.testing.assert_close(packed[at, : len(alone)], alone, atol=1e-5, rtol=0)
            assert not packed[at, len(alone) :].any()
    assert sorted(seen) == list(range(shard.num_rows))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("gpt2", {"resid_pdrop": 0.1}), ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.1})],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_of_the_model_itself_has_no_part_in_an_update(
    tiny_run: Tiny, tmp_path: Path, kind: str, settings: dict[str, Any], checkpointing: bool
) -> None:
    folder = tiny.build_architecture(kind, tmp_path, tiny_run.policy, **settings)
    learner = Spy(tiny_run.config(policy={"gradient_checkpointing": checkpointing}), str(folder))
    prompts = tiny.prompt_table(learner.policy, ["red", "red"])
    shard = tiny.generate(learner.policy, prompts, np.arange(2), np.arange(2), tiny.greedy(temperature=1.0))
    assert update(learner, columns(shard), 0, shard)["mismatch/max"] < 1e-4


def test_rollout_table_appears_whole_or_not_at_all(
    tiny_run: Tiny, shard: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(table: pa.Table, path: Path) -> None:
        path.write_bytes(b"PAR1")
        raise OSError("No space left on device")

    learner = Learner(tiny_run.config(), str(tiny_run.policy))
    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", broken)
        with pytest.raises(OSError, match="No space"):
            learner.update(columns(shard), 0, 1e-3, str(tmp_path / "step-000001.parquet"), shard)
    assert list(tmp_path.glob("step-*")) == []
    learner.update(columns(shard), 0, 1e-3, str(tmp_path / "step-000001.parquet"), shard)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001.parquet"]
    assert pq.read_table(tmp_path / "step-000001.parquet").num_rows == shard.num_rows


def test_warm_start_cache_follows_the_files_of_the_model(tiny_run: Tiny, tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"first")
    config = tiny_run.config(policy={"model": str(tmp_path)}, warm_start={"target": "colour"})
    task = load_task(config.task, 0)
    before = base_path(config, task)
    assert base_path(config, task) == before
    weights.write_bytes(b"second")
    assert base_path(config, task) != before


def test_kl_is_zero_at_the_start_and_its_gradient_holds_the_policy_back(tiny_run: Tiny, shard: pa.Table) -> None:
    learner = Learner(tiny_run.config(algorithm={"kl": {"coef": 0.1}}), str(tiny_run.policy))
    first = update(learner, columns(shard), 0, shard)
    second = update(learner, columns(shard), 1, shard)
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert second["kl"] > 1e-3
    # With nothing but the KL to follow, the policy goes back to where it came from.
    none = columns(shard).set_column(1, "advantage", pa.array(np.zeros(shard.num_rows, dtype=np.float32)))
    kls = [update(learner, none, step, shard)["kl"] for step in range(2, 30)]
    assert kls[-1] < 0.1 * kls[0]


def snapshot(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in learner.policy.trainable.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in b)


def poison(shard: pa.Table) -> pa.Table:
    return columns(shard).set_column(1, "advantage", pa.array(np.full(shard.num_rows, np.nan, dtype=np.float32)))


def test_update_that_is_not_finite_is_skipped_and_counted(tiny_run: Tiny, shard: pa.Table) -> None:
    learner = Learner(tiny_run.config(learner={"lr": 1e-2, "max_bad_steps": 2}), str(tiny_run.policy))
    clean = Learner(tiny_run.config(learner={"lr": 1e-2, "max_bad_steps": 2}), str(tiny_run.policy))
    for step in range(2):  # a good update in between: the count in a row starts anew
        before = snapshot(learner)
        assert update(learner, poison(shard), step, shard)["bad_steps"] == step + 1
        assert same(snapshot(learner), before)
        assert update(learner, columns(shard), step, shard)["bad_steps"] == step + 1
        update(clean, columns(shard), step, shard)
    assert same(snapshot(learner), snapshot(clean))  # the optimiser's moments were left alone too

    update(learner, poison(shard), 2, shard)
    before = snapshot(learner)
    with pytest.raises(RunFailed, match=r"step 4: loss nan .* not finite for 2 updates in a row"):
        update(learner, poison(shard), 3, shard)
    assert same(snapshot(learner), before)


@pytest.mark.parametrize("optimizer", [{}, {"optimizer": "sgd", "momentum": 0.9}, {"optimizer": "sgd"}])
@pytest.mark.parametrize("trainable", ["all", "last_layers", "lora"])
def test_saved_state_goes_on_as_if_nothing_had_been(
    tiny_run: Tiny, shard: pa.Table, tmp_path: Path, optimizer: dict[str, Any], trainable: str
) -> None:
    policy = {"trainable": trainable, "last_layers": 1}
    config = tiny_run.config(learner={"lr": 1e-2, **optimizer}, policy=policy)
    learner = Learner(config, str(tiny_run.policy))
    update(learner, columns(shard), 0, shard)
    update(learner, poison(shard), 1, shard)
    learner.save(tmp_path)
    restored = Learner(config, str(tiny_run.policy))
    restored.load(tmp_path)
    for step in (2, 3):
        expected = update(learner, columns(shard), step, shard)
        assert update(restored, columns(shard), step, shard) == expected
    assert same(snapshot(restored), snapshot(learner))


def test_weights_travel_to_a_replica_and_back_through_a_file(tiny_run: Tiny, shard: pa.Table, tmp_path: Path) -> None:
    learner = Learner(tiny_run.config(), str(tiny_run.policy))
    update(learner, columns(shard), 0, shard)
    replica = CausalLM(tiny_run.policy, PolicyConfig(precision="fp32"))
    manifest, flat = learner.weights()
    assert flat.dtype == np.uint8
    replica.load_named(unflatten(manifest, flat))
    assert same({**replica.trainable}, snapshot(learner))
    with pytest.raises(ValueError, match="end within"):
        replica.load_named(unflatten(manifest, flat[:-4]))
    with pytest.raises(ValueError, match="fits none that trains here"):
        replica.load_named([("lm_head.other", torch.zeros(3))])
    learner.save_weights(tmp_path / "weights.safetensors")
    trained = snapshot(learner)
    update(learner, columns(shard), 1, shard)
    learner.load_weights(tmp_path / "weights.safetensors")
    assert same(snapshot(learner), trained)


def test_adapters_of_two_processes_start_alike(tiny_run: Tiny) -> None:
    first = CausalLM(tiny_run.policy, PolicyConfig(trainable="lora"))
    torch.rand(7)  # wherever the generator stands, which is left there
    state = torch.get_rng_state()
    second = CausalLM(tiny_run.policy, PolicyConfig(trainable="lora"))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(tiny.flat(first), tiny.flat(second))
