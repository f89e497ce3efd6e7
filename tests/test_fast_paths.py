"""What is fast says the same as what is plain: log-probs from states, their gradients, and what the cache holds."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conftest import Tiny

from rl_llm.config import PolicyConfig
from rl_llm.policies import CausalLM, attention, logprobs
from rl_llm.policies.cache import GroupCache
from rl_llm.policies.logprobs import chosen_logprobs
from rl_llm.policies.packing import GroupBatch, make_rows, pack

COUNT, WIDTH, VOCAB = 23, 16, 300
GATED = {"intermediate_size": 48, "num_key_value_heads": 2}


def plain(
    states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logp = (scale * states @ weight.t()).log_softmax(dim=1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(dim=1)


def made(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(COUNT, WIDTH, generator=generator).requires_grad_()
    weight = (0.5 * torch.randn(VOCAB, WIDTH, generator=generator)).requires_grad_()
    return states, weight, torch.randint(0, VOCAB, (COUNT,), generator=generator)


@pytest.mark.parametrize("rows_at_a_time", [1, 7, 1000])
@pytest.mark.parametrize("scale", [1.0, 1.6])
@pytest.mark.parametrize("of_entropy", [0.0, 0.3])
def test_logprobs_entropy_and_gradients_are_those_of_the_plain_formula(
    monkeypatch: pytest.MonkeyPatch, rows_at_a_time: int, scale: float, of_entropy: float
) -> None:
    monkeypatch.setattr(logprobs, "_LOGITS", (rows_at_a_time + 4) * VOCAB)
    monkeypatch.setattr(logprobs, "_CPU_BLOCK", rows_at_a_time * VOCAB)
    states, weight, targets = made()
    by_token = torch.linspace(-1, 1, COUNT)
    results = []
    for formula in (plain, lambda *given: chosen_logprobs(*given, entropy=True)):
        chosen, entropy = formula(states, weight, targets, scale)
        loss = (by_token * chosen).sum() + of_entropy * (by_token**2 * entropy).sum()
        results.append((chosen, entropy, *torch.autograd.grad(loss, (states, weight))))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_frozen_head_gets_no_gradient_and_passes_it_on_to_the_states() -> None:
    states, weight, targets = made()
    (expected,) = torch.autograd.grad(plain(states, weight, targets, 1.0)[0].sum(), states)
    frozen = weight.detach()
    chosen, entropy = chosen_logprobs(states, frozen, targets, 1.0, entropy=False)
    chosen.sum().backward()
    torch.testing.assert_close(states.grad, expected, atol=1e-5, rtol=1e-4)
    assert len(entropy) == 0
    assert not chosen_logprobs(states.detach(), frozen, targets, 1.0, entropy=False)[0].requires_grad


def test_nothing_to_predict_gives_nothing() -> None:
    states, weight, _ = made()
    chosen, _ = chosen_logprobs(states[:0], weight, torch.zeros(0, dtype=torch.int64), 1.0, entropy=True)
    assert chosen.shape == (0,)
    chosen.sum().backward()
    assert not weight.grad.any()


def test_gradient_in_bf16_is_near_that_in_fp32_even_where_the_target_is_nearly_certain() -> None:
    states, weight, targets = made()
    with torch.no_grad():
        # Probabilities of 0.9 to 0.9999, whose distance from 1 has at most three bits of a bf16 number.
        states.copy_(torch.linspace(8, 14, COUNT)[:, None] * weight[targets] / (weight[targets] ** 2).sum(1, True))
        states.copy_(states.bfloat16())
        weight.copy_(weight.bfloat16())
    exact = torch.autograd.grad(plain(states, weight, targets, 1.0)[0].sum(), (states, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chosen, _ = chosen_logprobs(states, weight, targets, 1.0, entropy=False)
    for found, expected in zip(torch.autograd.grad(chosen.sum(), (states, weight)), exact, strict=True):
        assert found.dtype == torch.float32
        assert float((found - expected).norm() / expected.norm()) < 0.05


def under_the_mask(batch: GroupBatch) -> Any:
    """In place of attention by blocks: that of the library, over all pairs that a mask does not hide."""

    def attend(query: Any, key: Any, value: Any, blocks: Any, scale: float, dropout: float) -> torch.Tensor:
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        mask = batch.attention_mask()
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        return out.transpose(1, 2)

    return attend


@pytest.mark.parametrize("scores", [1, 200, 10**9])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_attention_by_blocks_is_attention_under_the_mask(
    tiny_run: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, scores: int
) -> None:
    """Log-probs and gradients, for prompts and completions of many lengths, whatever is computed at a time."""
    monkeypatch.setattr(attention, "_SCORES", scores)
    folder = tiny.build_architecture(kind, tmp_path, tiny_run.policy, **(GATED if kind == "llama" else {}))
    policy = CausalLM(folder, PolicyConfig(precision="fp32"))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 200, length) for length in (1, 9, 4)]
    lengths = (3, 1, 7, 2, 2, 5, 1)
    completions = [rng.integers(0, 200, length) for length in lengths]
    groups = [0, 0, 0, 1, 1, 2, 2]
    batch = pack(make_rows(groups, [prompts[g] for g in groups], completions, budget=1000))
    assert (batch.segments < 0).any()
    results = []
    for _ in range(2):
        logprobs = policy.forward(batch, 1.0).logprobs
        loss = (logprobs * torch.linspace(-1, 1, len(lengths))[:, None]).sum()
        results.append((logprobs, *torch.autograd.grad(loss, list(policy.trainable.values()))))
        monkeypatch.setattr(attention, "_attend_blocks", under_the_mask(batch))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_dropout_of_attention_acts_also_by_blocks(tiny_run: Tiny) -> None:
    policy = CausalLM(tiny_run.policy, PolicyConfig(precision="fp32"))
    batch = pack(make_rows([0, 0], [np.arange(5)] * 2, [np.arange(3), np.arange(4)], budget=1000))
    plain = policy.forward(batch, 1.0).logprobs
    with policy.training(dropout=0.5):
        assert not torch.equal(policy.forward(batch, 1.0).logprobs, plain)
    assert torch.equal(policy.forward(batch, 1.0).logprobs, plain)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gemma2", {**GATED, "head_dim": 8, "final_logit_softcapping": 2.0, "attn_logit_softcapping": None}),
        ("cohere", {**GATED, "logit_scale": 0.3}),
        ("granite", {**GATED, "logits_scaling": 3.0}),
        ("phi", {"intermediate_size": 48}),  # its head has a bias
        ("hyperclovax", {**GATED, "logits_scaling": 3.0}),  # Granite's name for a divisor is that of a factor here
        (
            "modernbert-decoder",
            {"intermediate_size": 48, "bos_token_id": 0},
        ),  # more stands before its head
    ],
)
def test_head_of_every_architecture_learns_as_in_a_plain_forward(
    tiny_run: Tiny, tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    policy = CausalLM(
        tiny.build_architecture(kind, tmp_path, tiny_run.policy, **settings), PolicyConfig(precision="fp32")
    )
    prompt, completion = np.array([5, 9, 11]), np.array([21, 3, 40, 8])
    out = policy.forward(pack(make_rows([0], [prompt], [completion], 100)), temperature=0.7, entropy=True)
    ids = torch.tensor(np.concatenate([prompt, completion]))
    logp = (policy.unwrapped(input_ids=ids[None]).logits[0, 2:-1] / 0.7).log_softmax(dim=1)
    chosen, entropy = logp.gather(1, ids[3:, None]).squeeze(1), -(logp.exp() * logp).sum(dim=1)
    weight = policy.unwrapped.get_output_embeddings().weight
    found, expected = (
        torch.autograd.grad((a * torch.arange(4)).sum() + b.sum(), weight)[0]
        for a, b in ((out.logprobs[0], out.entropy[0]), (chosen, entropy))
    )
    torch.testing.assert_close(out.logprobs[0], chosen, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.entropy[0], entropy, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_cache_keeps_keys_in_the_dtype_attention_reads_them_in() -> None:
    cache = GroupCache(1)
    key, value = torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4).bfloat16()
    assert cache.update(key, value, 0)[0].dtype == torch.bfloat16
    cache.begin(2, room=1)
    assert cache.prompts is not None
    torch.testing.assert_close(cache.prompts.keys[0], key.bfloat16())
    keys, values = cache.update(torch.ones(4, 1, 1, 4), torch.ones(4, 1, 1, 4).bfloat16(), 0)
    assert keys.dtype == values.dtype == torch.bfloat16
    assert keys.shape == values.shape == (4, 1, 1, 4)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5], [1, 5], [3, 4, 5]])
def test_rows_that_share_a_prompt_attend_as_if_each_had_its_own(rows: list[int]) -> None:
    """Also when some of them, or all of a prompt's, are no more."""
    generator = torch.Generator().manual_seed(0)
    prompts, samples, heads, shared, size = 2, 3, 4, 2, 8
    read, written = 5, 2
    keys, values = (torch.randn(prompts, shared, read, size, generator=generator) for _ in range(2))
    left = torch.tensor(rows)
    own = [torch.randn(len(rows), shared, written, size, generator=generator) for _ in range(2)]
    query = torch.randn(len(rows), heads, 1, size, generator=generator)
    mask = torch.ones(len(rows), 1, 1, read + written, dtype=torch.bool)
    mask[left < samples, ..., :2] = False  # the first prompt is shorter
    module = torch.nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    given = attention.Prompts([keys], [values], samples, left)
    found, _ = attention.grouped_attention(module, query, *own, mask, prompts=given)

    alone = [torch.cat([p[left // samples], o], dim=2) for p, o in zip((keys, values), own, strict=True)]
    alone = [x.repeat_interleave(heads // shared, dim=1) for x in alone]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *alone, attn_mask=mask)
    torch.testing.assert_close(found, expected.transpose(1, 2), atol=1e-5, rtol=1e-4)


def test_weights_cast_once_for_several_forwards_have_the_same_gradients(tiny_run: Tiny) -> None:
    policy = CausalLM(tiny_run.policy, PolicyConfig(precision="bf16"))
    ids = np.random.default_rng(0).integers(0, 200, (4, 6))
    groups = make_rows([0, 0, 1, 1], [np.arange(5)] * 4, list(ids), budget=1000)

    def gradients(context: Any) -> list[torch.Tensor]:
        with context:
            for group in groups:
                policy.forward(pack([group]), 1.0).logprobs.sum().backward()
        found = [p.grad for p in policy.trainable.values() if p.grad is not None]
        for p in policy.trainable.values():
            p.grad = None
        return found

    once, each = gradients(policy.casting_once()), gradients(contextlib.nullcontext())
    assert len(once) == len(each) > 0
    assert all(torch.equal(a, b) for a, b in zip(once, each, strict=True))
