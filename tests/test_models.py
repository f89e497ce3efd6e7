"""Kinds of models: each is the policy that the library has of it, or is refused before anything starts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import tiny
import torch
from conftest import Tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rl_llm.config import PolicyConfig
from rl_llm.errors import UserError
from rl_llm.launch.preflight import Plan, describe, make_plan
from rl_llm.policies import CausalLM, ValueFunction, causal_lm, probe
from rl_llm.policies.checkpointing import enable_checkpointing
from rl_llm.policies.packing import make_rows, pack

GATED = {"intermediate_size": 48, "num_key_value_heads": 2}
Make = Callable[..., Path]


@pytest.fixture
def make(tiny_run: Tiny, tmp_path: Path) -> Make:
    return lambda kind, **settings: tiny.build_architecture(kind, tmp_path / kind, tiny_run.policy, **settings)


@pytest.fixture
def sees(tiny_run: Tiny, tmp_path: Path) -> Path:
    """A model of text and images."""
    words = AutoTokenizer.from_pretrained(tiny_run.policy)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**shape, "vocab_size": len(words), "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2}
    settings = AutoConfig.for_model(
        "gemma3",
        text_config={**text, "eos_token_id": words.eos_token_id, "bos_token_id": None, "pad_token_id": None},
        vision_config={**shape, "image_size": 16, "patch_size": 8},
        mm_tokens_per_image=4,
        **dict.fromkeys(("boi_token_index", "eoi_token_index", "image_token_index"), len(words) - 1),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path / "sees")
    words.save_pretrained(tmp_path / "sees")
    return tmp_path / "sees"


def plan(tiny_run: Tiny, folder: Path, **policy: Any) -> Plan:
    return make_plan(tiny_run.config(policy={"model": str(folder), "precision": "fp32", **policy}), {})


def load(folder: Path, **settings: Any) -> CausalLM:
    return CausalLM(folder, PolicyConfig(precision="fp32", **settings))


def logprobs(policy: CausalLM) -> torch.Tensor:
    batch = pack(make_rows([0, 0, 1], [np.arange(5, 9)] * 3, [np.arange(3), np.arange(4), np.arange(9, 12)], 1000))
    return policy.forward(batch, 1.0).logprobs


@pytest.mark.parametrize(
    ("kind", "settings", "why"),
    [
        ("diffllama", GATED, r"are [\d.]+ and \S+ nats off its own forward"),  # it rearranges values
        ("gpt_oss", {**GATED, "head_dim": 8, "num_local_experts": 4}, r"are [\d.]+ and [\d.]+ nats off"),  # sinks
        ("roberta", {"intermediate_size": 48, "is_decoder": True}, "nats off"),  # positions begin behind padding's
        ("bert", {"intermediate_size": 48}, "nats off"),  # tokens look at those behind them
        ("nemotron", GATED, "RuntimeError: "),
        ("lfm2", {**GATED, "layer_types": ["conv", "full_attention"]}, "ValueError: "),
        ("minimax", {**GATED, "head_dim": 8, "num_local_experts": 2}, "ValueError: "),
    ],
)
def test_model_whose_policy_would_be_another_is_refused_in_a_line(
    tiny_run: Tiny, make: Make, kind: str, settings: dict[str, Any], why: str
) -> None:
    with pytest.raises(UserError, match=f"^policy.model: {kind} cannot be used.*{why}.*docs/models.md") as refused:
        plan(tiny_run, make(kind, **settings))
    assert "\n" not in str(refused.value)


def test_head_that_is_read_wrongly_is_seen(tiny_run: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan(tiny_run, tiny_run.policy).probe is not None
    monkeypatch.setattr(causal_lm, "_scale_of_head", lambda *model: 1.5)
    with pytest.raises(UserError, match=r"are \d\S* and 0\.\d+ nats off its own forward"):
        plan(tiny_run, tiny_run.policy)


def test_large_model_is_probed_by_its_first_layers_of_every_kind(
    tiny_run: Tiny, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    folder = make(
        "qwen3", **{**GATED, "head_dim": 8, "num_hidden_layers": 4}, layer_types=kinds, use_sliding_window=True
    )
    whole = plan(tiny_run, folder).probe
    monkeypatch.setattr(probe, "_WHOLE", 0)
    part = plan(tiny_run, folder)
    assert whole is not None
    assert part.probe is not None
    assert (whole.layers, part.probe.layers, part.probe.depth) == (4, 2, 4)
    assert whole.engine != part.probe.engine  # weights are the real ones, of other layers
    assert any("(2 of 4 layers)" in line for line in describe(part))


def test_run_notes_what_its_probe_found(tiny_run: Tiny) -> None:
    import yaml

    noted = yaml.safe_load((tiny_run.undisturbed / "config.yaml").read_text())["probe"]
    assert max(noted["engine"], noted["learner"]) < 1e-4
    assert (noted["layers"], noted["depth"]) == (2, 2)


# Lengths.


@pytest.mark.parametrize(
    ("kind", "settings", "why"),
    [
        ("mistral", {"sliding_window": 4}, "sees the last 4 tokens only"),
        (
            "llama4_text",
            {"attention_chunk_size": 4, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2},
            "sees the last 4 tokens only",
        ),
        (
            "llama",
            {
                "max_position_embeddings": 6,
                "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            },
            "more than 6 tokens",
        ),
        (
            "phi3",
            {
                "max_position_embeddings": 64,
                "original_max_position_embeddings": 6,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                    "original_max_position_embeddings": 6,
                },
            },
            "more than 6 tokens",
        ),
    ],
)
def test_length_that_would_be_computed_wrongly_is_refused(
    tiny_run: Tiny, make: Make, kind: str, settings: dict[str, Any], why: str
) -> None:
    folder = make(kind, **GATED, **settings)
    message = rf"policy.model: {kind} .*{why}.* comes to \d+: lower task.max_prompt_tokens or"
    with pytest.raises(UserError, match=message):
        plan(tiny_run, folder)
    acting = load(folder)
    with pytest.raises(UserError, match=message):
        acting.sample([np.arange(3)], np.arange(1), tiny.greedy(4))
    with pytest.raises(UserError, match=message):
        acting.pack(make_rows([0], [np.arange(3)], [np.arange(4)], 100))
    acting.sample([np.arange(2)], np.arange(1), tiny.greedy(2))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("olmoe", {"sliding_window": 4, "num_experts": 2, "num_experts_per_tok": 1}),  # told to attention alone
        ("qwen2_moe", {"sliding_window": 4, "use_sliding_window": False, "num_experts": 2, "num_experts_per_tok": 1}),
    ],
)
def test_window_that_the_library_does_not_use_is_none(
    tiny_run: Tiny, make: Make, kind: str, settings: dict[str, Any]
) -> None:
    assert plan(tiny_run, make(kind, **GATED, **settings)).probe is not None


# What a folder holds.


def test_text_of_a_model_that_sees_is_what_trains(tiny_run: Tiny, sees: Path) -> None:
    found = plan(tiny_run, sees)
    assert found.probe is not None
    assert any("memory" in line for line in describe(found))
    for settings in ({}, {"trainable": "last_layers", "last_layers": 1}, {"trainable": "lora"}):
        policy = load(sees, **settings)
        assert policy.trainable
        assert not [name for name in policy.trainable if "vision" in name or "projector" in name]
        logprobs(policy).sum().backward()
        assert all(p.grad is not None for p in policy.trainable.values())


def test_values_take_the_width_of_the_states(make: Make) -> None:
    policy = load(make("opt", ffn_dim=48, word_embed_proj_dim=16))
    batch = pack(make_rows([0], [np.arange(3)], [np.arange(4)], 100))
    value = ValueFunction(policy, own=False)
    assert value.values(batch, policy.forward(batch, 1.0).states).shape == (1, 4)
    assert policy.hidden_size == 16


def adapter(tiny_run: Tiny, folder: Path) -> peft.PeftModel:
    model = AutoModelForCausalLM.from_pretrained(tiny_run.policy, dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_training_starts_from_an_adapter(tiny_run: Tiny, tmp_path: Path, trainable: str) -> None:
    adapted = adapter(tiny_run, tmp_path / "adapter")
    assert plan(tiny_run, tmp_path / "adapter", trainable=trainable).probe is not None
    policy = load(tmp_path / "adapter", trainable=trainable)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad(), policy.plain() as merged:
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)
    policy.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(saved(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)


def edited(folder: Path, name: str, **changes: Any) -> None:
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.filterwarnings("ignore:Unexpected keyword")  # of a folder that says it is of another kind
def test_folder_that_cannot_be_loaded_is_refused_by_what_it_lacks(tiny_run: Tiny, make: Make, tmp_path: Path) -> None:
    folder = make("llama", **GATED)
    edited(folder, "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    lost, prompts = tmp_path / "lost", tmp_path / "prompts"
    adapter(tiny_run, lost)
    edited(lost, "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    adapter(tiny_run, prompts)
    edited(prompts, "adapter_config.json", peft_type="PROMPT_TUNING", num_virtual_tokens=2)
    for where, message in (
        (folder, "its weights are quantised with bitsandbytes"),
        (lost, f"an adapter of {tmp_path / 'gone'}.* cannot be loaded"),
        (prompts, "an adapter .*PROMPT_TUNING cannot be merged"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            plan(tiny_run, where)
        assert "\n" not in str(refused.value)
        with pytest.raises(UserError, match=message):
            load(where)


@pytest.mark.parametrize(
    "ways",
    [
        {"trainable": "all"},
        {"trainable": "last_layers", "last_layers": 1},
        {"trainable": "lora"},
        *({"trainable": "lora", "lora": {"targets": [name]}} for name in ("q_proj", "embed_tokens", "lm_head")),
        {"trainable": "lora", "lora": {"targets": ["embed_tokens", "lm_head", "v_proj"]}},
    ],
    ids=str,
)
def test_what_was_trained_is_what_is_saved(tiny_run: Tiny, tmp_path: Path, ways: dict[str, Any]) -> None:
    """Of a model whose embedding and head are one matrix, too."""
    policy = load(tiny_run.policy, **ways)
    optimizer = torch.optim.SGD(policy.trainable.values(), lr=1.0)
    for _ in range(3):
        logprobs(policy).sum().backward()
        torch.nn.utils.clip_grad_norm_(policy.trainable.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    policy.save_pretrained(tmp_path)
    with torch.no_grad():
        assert not torch.allclose(logprobs(policy), logprobs(load(tiny_run.policy)), atol=0.1)
        torch.testing.assert_close(logprobs(load(tmp_path)), logprobs(policy), atol=1e-4, rtol=1e-4)


# Gradient checkpointing.


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "layerdrop": 0.9, "dropout": 0.5}),
        ("mixtral", {**GATED, "num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.9}),
        ("gpt2", {"resid_pdrop": 0.5, "attn_pdrop": 0.5}),
    ],
)
def test_checkpointed_layers_compute_what_they_compute_without(make: Make, kind: str, settings: dict[str, Any]) -> None:
    folder = make(kind, **settings)

    def learn(policy: CausalLM) -> tuple[int, torch.Tensor, list[torch.Tensor]]:
        calls: list[int] = []
        layer = policy.unwrapped.get_decoder().layers[-1] if kind != "gpt2" else policy.unwrapped.transformer.h[-1]
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
        with policy.training(dropout=0.0):
            found = logprobs(policy)
            found.sum().backward()
        return len(calls), found.detach(), [p.grad for p in policy.trainable.values() if p.grad is not None]

    calls, plain, gradients = learn(load(folder))
    again, found, others = learn(load(folder, gradient_checkpointing=True))
    assert (calls, again) == (1, 2)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(others, gradients)


def test_model_without_checkpointing_is_refused_by_the_key(make: Make) -> None:
    policy = load(make("llama", **GATED))
    policy.unwrapped.supports_gradient_checkpointing = False
    with pytest.raises(UserError, match=r"policy\.gradient_checkpointing: llama has none"):
        enable_checkpointing(policy.unwrapped)
