"""The engine: what it draws, what it says of it, and that it is the model's own distribution."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
from conftest import Tiny
from transformers import AutoModelForCausalLM, PreTrainedModel

from rl_llm.config import PolicyConfig
from rl_llm.errors import UserError
from rl_llm.launch.preflight import make_plan
from rl_llm.policies import CausalLM
from rl_llm.policies.decoding import decode, stop_begins
from rl_llm.policies.packing import make_rows, pack
from rl_llm.policies.sampling import SamplingParams, draw, uniforms
from rl_llm.table import ragged

PROMPTS = ["red", "3 please blue", "17 there again now green", "gold gold gold gold gold gold gold"]


@pytest.fixture(scope="module")
def policy(tiny_run: Tiny) -> CausalLM:
    return CausalLM(tiny_run.policy, PolicyConfig(precision="fp32"))


@pytest.fixture(scope="module")
def wild(tiny_run: Tiny) -> CausalLM:
    """An untrained policy: no token is much likelier than the others."""
    return CausalLM(tiny_run.policy.parent / "random", PolicyConfig(precision="fp32"))


def sample(policy: CausalLM, params: SamplingParams, texts: list[str] = PROMPTS, first: int = 0) -> pa.Table:
    count = len(texts) * params.samples_per_prompt
    groups = np.repeat(np.arange(len(texts)), params.samples_per_prompt)
    return tiny.generate(policy, tiny.prompt_table(policy, texts), first + np.arange(count), groups, params)


def exact(lm: PreTrainedModel, prompt: np.ndarray, completion: np.ndarray, temperature: float) -> np.ndarray:
    """Log-probs [T] of a completion from one plain forward pass of the model on this sample alone."""
    ids = torch.tensor(np.concatenate([prompt, completion]).astype(np.int64))
    with torch.no_grad():
        logits = lm(input_ids=ids[None]).logits[0].double() / temperature
    logprobs = logits.log_softmax(dim=1)[len(prompt) - 1 : -1]
    return logprobs.gather(1, ids[len(prompt) :, None]).squeeze(1).numpy()


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "min_new_tokens"),
    [(1.0, 1.0, 0, 0), (0.7, 1.0, 0, 0), (1.3, 0.8, 0, 0), (1.0, 1.0, 5, 3), (0.0, 1.0, 0, 0)],
)
def test_logprobs_are_those_of_a_plain_forward(
    policy: CausalLM, temperature: float, top_p: float, top_k: int, min_new_tokens: int
) -> None:
    shard = sample(policy, tiny.greedy(samples_per_prompt=6, temperature=temperature, top_p=top_p, top_k=top_k,
                                       min_new_tokens=min_new_tokens))  # fmt: skip
    lengths = set()
    for prompt, completion, logprobs in zip(
        *(ragged(shard[name]) for name in ("prompt_ids", "completion_ids", "logprobs")), strict=True
    ):
        np.testing.assert_allclose(logprobs, exact(policy.unwrapped, prompt, completion, temperature or 1.0), atol=1e-4)
        lengths.add(len(completion))
    assert len(lengths) > 1  # rows that end early leave the batch: both sides of that are covered


GATED = {"intermediate_size": 48, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gpt2", {}),  # learned positions
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
        ("qwen2", GATED),
        ("mistral", {**GATED, "sliding_window": 40}),
        ("gemma2", {**GATED, "head_dim": 8, "final_logit_softcapping": 2.0, "attn_logit_softcapping": None}),
        ("qwen3", {**GATED, "head_dim": 8}),
        ("gemma3_text", {**GATED, "head_dim": 8, "sliding_window": 40}),
        ("cohere", {**GATED, "logit_scale": 0.3}),
        ("granite", {**GATED, "logits_scaling": 3.0}),
        ("hyperclovax", {**GATED, "logits_scaling": 3.0}),
        ("modernbert-decoder", {"intermediate_size": 48, "bos_token_id": 0}),
        ("bert", {"intermediate_size": 48, "is_decoder": True}),
        ("llama4_text", {**GATED, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2}),
    ],
)
def test_engine_and_learner_agree_with_a_plain_forward_on_every_architecture(
    tiny_run: Tiny, tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    folder = tiny.build_architecture(kind, tmp_path, tiny_run.policy, **settings)
    acting = CausalLM(folder, PolicyConfig(precision="fp32"))
    eager = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for temperature, count in ((0.0, 1), (0.7, 3)):
        shard = sample(acting, tiny.greedy(samples_per_prompt=count, temperature=temperature))
        prompts, completions, engine = (ragged(shard[name]) for name in ("prompt_ids", "completion_ids", "logprobs"))
        batch = pack(make_rows(shard["group"].to_pylist(), prompts, completions, 1000))
        with torch.no_grad():
            learner = acting.forward(batch, temperature or 1.0).logprobs.numpy()
        for at, row in enumerate(batch.rows.tolist()):
            plain = exact(eager, prompts[row], completions[row], temperature or 1.0)
            np.testing.assert_allclose(engine[row], plain, atol=1e-4)
            np.testing.assert_allclose(learner[at, : len(plain)], plain, atol=1e-4)


@pytest.mark.parametrize(("kind", "settings"), [("gptj", {"rotary_dim": 4}), ("bloom", {})])
def test_architecture_that_cannot_attend_by_blocks_is_refused(
    tiny_run: Tiny, tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    folder = tiny.build_architecture(kind, tmp_path, tiny_run.policy, **settings)
    for start in (
        lambda: CausalLM(folder, PolicyConfig()),
        lambda: make_plan(tiny_run.config(policy={"model": str(folder)}), {}),
    ):
        with pytest.raises(UserError, match=f"the architecture {kind} attends in a way of its own"):
            start()


def test_greedy_completions_are_those_of_transformers_generate(policy: CausalLM, wild: CausalLM) -> None:
    for acting in (policy, wild):
        model = AutoModelForCausalLM.from_pretrained(acting.unwrapped.name_or_path, dtype=torch.float32).eval()
        tokenizer = acting.tokenizer
        tokenizer.padding_side = "left"
        batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
        assert not batch["attention_mask"].all()  # prompts differ in length
        out = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=8, do_sample=False
        )
        expected = []
        for row in out[:, batch["input_ids"].shape[1] :].tolist():
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            expected.append(row[:end])

        shard = sample(acting, tiny.greedy())

        assert shard["completion_ids"].to_pylist() == expected
        assert shard["completion"].to_pylist() == tokenizer.batch_decode(expected, skip_special_tokens=True)
        ended = [row[-1] == tokenizer.eos_token_id for row in expected]
        assert shard["finish"].to_pylist() == ["stop" if end else "length" for end in ended]


def test_minimum_length_keeps_the_end_away_and_accounts_for_it(policy: CausalLM) -> None:
    shard = sample(policy, tiny.greedy(samples_per_prompt=32, temperature=1.0, min_new_tokens=4))
    end = policy.tokenizer.eos_token_id
    completions, kept = (shard[name].to_pylist() for name in ("completion_ids", "log_kept_mass"))
    assert not any(end in ids[:4] for ids in completions)
    assert any(ids[4:] == [end] for ids in completions)  # ... and lets it come right after
    assert all(mass < 0 for row in kept for mass in row[:4])
    assert all(mass == 0 for row in kept for mass in row[4:])


def test_stop_string_ends_a_completion_and_is_cut_from_its_text(policy: CausalLM) -> None:
    free = sample(policy, tiny.greedy(samples_per_prompt=16, temperature=1.0))
    shard = sample(policy, tiny.greedy(samples_per_prompt=16, temperature=1.0, stop=("green", "gold red")))
    stopped = 0
    for before, row in zip(free.to_pylist(), shard.to_pylist(), strict=True):
        found = [at for at in (before["completion"].find(stop) for stop in ("green", "gold red")) if at >= 0]
        if not found:
            assert row["completion_ids"] == before["completion_ids"]
            continue
        stopped += 1
        assert row["completion"] == before["completion"][: min(found)]
        assert row["finish"] == "stop"
        # Tokens are kept up to the one that completes the string: the policy chose it and is to answer for it.
        assert row["completion_ids"] == before["completion_ids"][: len(row["completion_ids"])]
        spelled = policy.tokenizer.decode(row["completion_ids"])
        assert spelled.endswith(("green", "gold red"))
    assert stopped > 5


def test_special_token_can_be_a_stop_string(tiny_run: Tiny) -> None:
    acting = CausalLM(tiny_run.policy, PolicyConfig(precision="fp32"))
    (mark,) = acting.tokenizer(" green", add_special_tokens=False)["input_ids"]
    acting.tokenizer.add_special_tokens({"additional_special_tokens": acting.tokenizer.convert_ids_to_tokens([mark])})
    free = sample(acting, tiny.greedy(samples_per_prompt=16, temperature=1.0)).to_pylist()
    shard = sample(acting, tiny.greedy(samples_per_prompt=16, temperature=1.0, stop=("green",))).to_pylist()
    assert any(mark in row["completion_ids"][:-1] for row in free)
    for before, row in zip(free, shard, strict=True):
        ids = before["completion_ids"]
        if mark in ids:
            ids = ids[: ids.index(mark) + 1]
            assert row["finish"] == "stop"
        assert row["completion_ids"] == ids
        assert row["completion"] == acting.tokenizer.decode(ids).removesuffix("<|end|>").removesuffix("green")


def test_stop_string_before_the_minimum_length_cuts_neither_tokens_nor_text(policy: CausalLM) -> None:
    params = {"samples_per_prompt": 32, "temperature": 1.0, "min_new_tokens": 3}
    free = sample(policy, tiny.greedy(**params)).to_pylist()
    shard = sample(policy, tiny.greedy(**params, stop=("green", "gold red"))).to_pylist()
    spelled = partial(policy.tokenizer.decode, clean_up_tokenization_spaces=False)
    early = again = 0
    for before, row in zip(free, shard, strict=True):
        ids = before["completion_ids"]
        ends = (n for n in range(3, len(ids) + 1) if spelled(ids[:n]).endswith(("green", "gold red")))
        end = next(ends, None)
        assert row["completion_ids"] == ids[:end]
        text = before["completion"] if end is None else spelled(ids[:end])
        cut = "" if end is None else "gold red" if text.endswith("gold red") else "green"
        assert row["completion"] == text.removesuffix(cut)
        early += "green" in row["completion"]
        again += "green" in row["completion"] and cut == "green"
    assert early > again > 0


def test_special_tokens_are_in_the_text_save_those_that_end_it(tiny_run: Tiny) -> None:
    acting = CausalLM(tiny_run.policy, PolicyConfig(precision="fp32"))
    think, full_stop = acting.tokenizer(" green blue", add_special_tokens=False)["input_ids"]
    acting.tokenizer.add_special_tokens({"additional_special_tokens": acting.tokenizer.convert_ids_to_tokens([think])})
    acting.unwrapped.generation_config.eos_token_id = [acting.tokenizer.eos_token_id, full_stop]
    written = 0
    for row in sample(acting, tiny.greedy(samples_per_prompt=16, temperature=1.0)).to_pylist():
        ids = row["completion_ids"]
        said = ids[:-1] if row["finish"] == "stop" else ids
        assert row["completion"] == acting.tokenizer.decode(said)
        assert "<|end|>" not in row["completion"]
        assert "blue" not in row["completion"]
        written += think in said
    assert written > 5


def test_what_a_tokenizer_tidies_is_left_as_it_was_written(tiny_run: Tiny) -> None:
    tokenizer = CausalLM(tiny_run.policy, PolicyConfig(precision="fp32")).tokenizer
    text = " red , do n't ! <|end|> gold ."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    assert tokenizer.decode(ids) != text
    assert decode(tokenizer, [ids]) == [text]
    assert decode(tokenizer, [ids], silent=[tokenizer.eos_token_id]) == [text.replace("<|end|>", "")]


@pytest.mark.parametrize(
    ("before", "text", "expected"),
    [
        ("a ", "a b.", 3),
        ("a. b", "a. b", None),  # an old one does not end it again
        ("a. b", "a. b.", 4),
        ("a.", "a.. ", 2),
        ("x�", "xé.", 2),  # half a character became a whole one
        ("a EN", "a END", 2),
    ],
)
def test_stop_string_that_the_last_token_completed(before: str, text: str, expected: int | None) -> None:
    assert stop_begins(before, text, (".", "END")) == expected


def test_samples_follow_their_id_whatever_else_is_in_the_batch(policy: CausalLM) -> None:
    params = tiny.greedy(samples_per_prompt=4, temperature=1.0)
    together = sample(policy, params)
    alone = sample(policy, params, PROMPTS[2:3], first=8)
    assert alone["completion_ids"].to_pylist() == together["completion_ids"].to_pylist()[8:12]
    reseeded = sample(policy, tiny.greedy(samples_per_prompt=4, temperature=1.0, seed=1))
    assert reseeded["completion_ids"].to_pylist() != together["completion_ids"].to_pylist()


# The draw itself.


def logits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def even(count: int) -> torch.Tensor:
    """Uniforms spread over [0, 1) without gaps: what is drawn with them has its probabilities to within 1 / count."""
    return torch.linspace(0, 1, count + 1, dtype=torch.float64)[:-1]


@pytest.mark.parametrize("vocab", [5, 256, 300, 1000])
def test_draw_follows_the_softmax(vocab: int) -> None:
    count, scores = 20_000, logits(1, vocab)
    drawn = draw(scores.expand(count, vocab).clone(), even(count), tiny.greedy(temperature=0.8), [])
    shares = np.bincount(drawn.tokens.numpy(), minlength=vocab) / count
    np.testing.assert_allclose(shares, (scores[0] / 0.8).softmax(dim=0).numpy(), atol=1.5 / count)
    expected = (scores[0] / 0.8).log_softmax(dim=0)[drawn.tokens]
    torch.testing.assert_close(drawn.logprobs, expected, atol=1e-5, rtol=0)
    assert not drawn.log_kept_mass.any()


def test_draw_with_keyed_uniforms_follows_the_softmax_by_chi_square() -> None:
    count, vocab = 4000, 20
    scores = logits(1, vocab)
    uniform = uniforms(seed=7, sample_ids=np.arange(count), length=3)[:, 1]
    drawn = draw(scores.expand(count, vocab).clone(), uniform, tiny.greedy(temperature=1.0), [])
    expected = scores[0].softmax(dim=0).numpy() * count
    chi_square = ((np.bincount(drawn.tokens.numpy(), minlength=vocab) - expected) ** 2 / expected).sum()
    assert chi_square < 43.8  # the 0.999 quantile with 19 degrees of freedom


@pytest.mark.parametrize("vocab", [3, 256, 257, 700])
@pytest.mark.parametrize("allowed", ["first", "last", "middle"])
def test_token_without_probability_is_never_drawn(vocab: int, allowed: str) -> None:
    only = {"first": 0, "last": vocab - 1, "middle": vocab // 2}[allowed]
    scores = torch.full((3, vocab), float("-inf"))
    scores[:, only] = -3.0
    ends = torch.tensor([0.0, 0.5, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert draw(scores, ends, tiny.greedy(temperature=1.0), []).tokens.tolist() == [only] * 3


def test_ends_of_the_unit_interval_draw_the_first_and_the_last_token_there_is() -> None:
    scores = logits(2, 600)
    scores[:, :10] = scores[:, 520:] = float("-inf")
    ends = torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert draw(scores, ends, tiny.greedy(temperature=1.0), []).tokens.tolist() == [10, 519]


@pytest.mark.parametrize("vocab", [200, 256, 500])
def test_draw_stays_within_the_vocabulary_however_its_sums_round(vocab: int) -> None:
    # So wide apart that sums of the weights are not exact even in float64.
    scores = 8 * logits(3000, vocab)
    almost_one = torch.full((3000,), np.nextafter(1.0, 0.0), dtype=torch.float64)
    drawn = draw(scores.clone(), almost_one, tiny.greedy(temperature=1.0), [])
    assert int(drawn.tokens.max()) < vocab
    assert torch.isfinite(drawn.logprobs).all()


@pytest.mark.parametrize(
    ("top_p", "top_k", "banned"), [(0.7, 0, []), (1.0, 7, []), (0.9, 12, []), (1.0, 0, [3, 4]), (0.8, 9, [0])]
)
def test_kept_mass_makes_truncated_logprobs_sum_to_one(top_p: float, top_k: int, banned: list[int]) -> None:
    count, vocab = 5000, 40
    scores = logits(1, vocab)
    params = tiny.greedy(temperature=1.2, top_p=top_p, top_k=top_k)
    drawn = draw(scores.expand(count, vocab).clone(), even(count), params, banned)

    probabilities = (scores[0] / 1.2).softmax(dim=0).double()
    allowed = [token for token in probabilities.argsort(descending=True).tolist() if token not in banned]
    kept = allowed[:top_k] if top_k else allowed
    if top_p < 1:
        before = torch.tensor([0.0, *probabilities[kept].cumsum(dim=0)[:-1]])
        kept = [token for token, mass in zip(kept, before, strict=True) if mass < top_p * probabilities[kept].sum()]
    assert 1 < len(kept) < vocab
    assert set(drawn.tokens.tolist()) == set(kept)
    of_token = dict(zip(drawn.tokens.tolist(), (drawn.logprobs - drawn.log_kept_mass).exp().tolist(), strict=True))
    assert sum(of_token.values()) == pytest.approx(1, abs=1e-5)
    shares = np.bincount(drawn.tokens.numpy(), minlength=vocab) / count
    np.testing.assert_allclose([shares[token] for token in kept], [of_token[token] for token in kept], atol=2 / count)
    torch.testing.assert_close(drawn.logprobs, probabilities.log()[drawn.tokens].float(), atol=1e-5, rtol=0)


def test_ties_at_the_edge_of_top_k_are_a_stated_choice() -> None:
    """Tokens as likely as the k-th stay in, rather than an arbitrary one of them."""
    scores = torch.zeros(100, 6)
    scores[:, 5] = -1
    drawn = draw(scores, even(100), tiny.greedy(temperature=1.0, top_k=2), [])
    assert set(drawn.tokens.tolist()) == {0, 1, 2, 3, 4}


def test_greedy_draw_takes_the_likeliest_that_is_not_banned() -> None:
    scores = torch.tensor([[1.0, 5.0, 3.0], [4.0, 2.0, 1.0]])
    drawn = draw(scores.clone(), torch.zeros(2), tiny.greedy(), banned=[1])
    assert drawn.tokens.tolist() == [2, 0]
    expected = scores.log_softmax(dim=1).gather(1, drawn.tokens[:, None]).squeeze(1)
    torch.testing.assert_close(drawn.logprobs, expected)
