"""A model and its task: tokens without an embedding, positions, weights that are no numbers; and what is saved."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conftest import Tiny
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    GenerationConfig,
)

from rl_llm.config import PolicyConfig, RunConfig
from rl_llm.errors import RunFailed, UserError
from rl_llm.launch import fit
from rl_llm.launch.inference import config_for, evaluate, predict
from rl_llm.launch.preflight import describe, make_plan
from rl_llm.policies import CausalLM
from rl_llm.policies.folder import stored_dtype

NAN, INFINITE = float("nan"), float("inf")


@pytest.fixture
def model(tiny_run: Tiny, tmp_path: Path) -> Path:
    """A copy of the tiny model to spoil."""
    return Path(shutil.copytree(tiny_run.policy, tmp_path / "model"))


def run_of(model: Path, tiny_run: Tiny, **sections: Any) -> RunConfig:
    return tiny.config(model, tiny_run.data, **sections)


def change_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def cut_embedding(model: Path, rows: int) -> None:
    def cut(weights: dict[str, torch.Tensor]) -> None:
        weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:rows].clone()

    change_weights(model, cut)
    change_json(model / "config.json", vocab_size=rows)


# ---- tokens


def test_a_prompts_token_without_an_embedding_is_refused_with_its_row(model: Path, tiny_run: Tiny) -> None:
    cut_embedding(model, 200)
    config = run_of(model, tiny_run)
    expected = r"in the prompt of .*task\.jsonl:\d+ its tokenizer has token \d+, '.+', but its embedding has 200 rows"
    with pytest.raises(UserError, match=expected):
        make_plan(config, {})
    with pytest.raises(UserError, match=expected):
        evaluate(config, "test", print)


def test_targets_and_the_end_token_need_an_embedding_too(model: Path, tiny_run: Tiny) -> None:
    words = AutoTokenizer.from_pretrained(model)
    known = len(words)
    words.add_tokens(["crimson"])
    words.save_pretrained(model)
    make_plan(run_of(model, tiny_run), {})  # one that nothing is written with does no harm
    tiny_run_rows = [{**row, "colour": "crimson"} for row in tiny.rows()]
    data = model.parent / "crimson.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny_run_rows))
    config = tiny.config(model, data, warm_start={"supervised_steps": 1, "target": "colour"})
    with pytest.raises(UserError, match=f"in a target its tokenizer has token {known}, 'crimson'"):
        make_plan(config, {})
    words.eos_token = "<|done|>"
    words.save_pretrained(model)
    with pytest.raises(UserError, match=f"to end with its tokenizer has token {known + 1}"):
        make_plan(run_of(model, tiny_run), {})


# ---- positions


def test_more_positions_than_a_model_has_learned_are_refused(tiny_run: Tiny, tmp_path: Path) -> None:
    folder = tiny.build_architecture("gpt2", tmp_path / "gpt2", tiny_run.policy, n_positions=12)
    longest = max(map(len, AutoTokenizer.from_pretrained(folder)([row["text"] for row in tiny.rows()])["input_ids"]))
    fits = 12 - longest
    assert make_plan(run_of(folder, tiny_run, rollout={"max_new_tokens": fits}), {}).notes == []
    expected = rf"up to {longest} tokens and rollout\.max_new_tokens {fits + 1} are more than the 12 positions"
    with pytest.raises(UserError, match=expected):
        make_plan(run_of(folder, tiny_run, rollout={"max_new_tokens": fits + 1}), {})
    warm = {"supervised_steps": 1, "target": "colour"}
    with pytest.raises(UserError, match=r"warm_start\.max_target_tokens 128 .* lower warm_start\.max_target_tokens"):
        make_plan(run_of(folder, tiny_run, rollout={"max_new_tokens": fits}, warm_start=warm), {})


def test_a_policy_that_writes_nothing_behind_its_prompt_needs_no_positions_there(model: Path, tiny_run: Tiny) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 400}
    policy = {"type": "two_labels:TwoLabels", "model": str(model)}
    for positions in (16, 3):
        bert = BertConfig(**shape, max_position_embeddings=positions)
        AutoModelForSequenceClassification.from_config(bert).save_pretrained(model)
        config = run_of(model, tiny_run, policy=policy, rollout={"max_new_tokens": 32})
        if positions == 16:
            assert make_plan(config, {}).notes == []
    with pytest.raises(UserError, match=r"more than the 3 positions .* learned; lower task\.max_prompt_tokens$"):
        make_plan(config, {})


def test_positions_that_turn_may_go_on_with_a_note(model: Path, tiny_run: Tiny) -> None:
    change_json(model / "config.json", max_position_embeddings=8)
    plan = make_plan(run_of(model, tiny_run, rollout={"max_new_tokens": 16}), {})
    assert len(plan.notes) == 1
    assert "16 are more than the 8 positions the model has been made for" in plan.notes[0]
    assert f"note       {plan.notes[0]}" in describe(plan)


# ---- weights


@pytest.mark.parametrize("value", [NAN, INFINITE])
def test_weights_that_are_no_numbers_are_refused(model: Path, tiny_run: Tiny, value: float) -> None:
    change_weights(model, lambda weights: weights["model.norm.weight"][3:4].fill_(value))
    expected = r"the weight model\.norm\.weight holds NaN or infinite values"
    config = run_of(model, tiny_run)
    with pytest.raises(UserError, match=expected):
        make_plan(config, {})
    with pytest.raises(UserError, match=expected):
        next(predict(config_for(str(model), None, ["task.prompt={text}"]), str(tiny_run.data), print))


def test_weights_that_were_not_looked_at_before_are_when_they_are_loaded(
    model: Path, tiny_run: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_weights(model, lambda weights: weights["model.norm.weight"].fill_(NAN))
    monkeypatch.setattr(fit, "LOOKED_AT", 0)
    for load in (lambda: make_plan(run_of(model, tiny_run), {}), lambda: CausalLM(model, PolicyConfig())):
        with pytest.raises(UserError, match=r"the weight model\.norm\.weight holds NaN"):
            load()


def test_weights_in_several_files_and_in_torchs_own_format_are_looked_at(tiny_run: Tiny, tmp_path: Path) -> None:
    given = AutoModelForCausalLM.from_pretrained(tiny_run.policy)
    with torch.no_grad():
        given.model.norm.weight.fill_(NAN)
    for number, save in enumerate(
        (
            lambda folder: given.save_pretrained(folder, max_shard_size="20KB"),
            lambda folder: torch.save(given.state_dict(), folder / "pytorch_model.bin"),
        )
    ):
        folder = tmp_path / str(number)
        shutil.copytree(tiny_run.policy, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        save(folder)
        with pytest.raises(UserError, match=r"norm\.weight holds NaN"):
            make_plan(run_of(folder, tiny_run), {})


def test_logits_that_are_not_finite_end_a_rollout_by_name(model: Path, tiny_run: Tiny) -> None:
    expected = "the policy's logits are NaN or infinite"
    policy = CausalLM(model, PolicyConfig(precision="fp32"))
    with torch.no_grad():
        policy.model.model.norm.weight.fill_(NAN)
    for temperature in (0.0, 1.0):
        with pytest.raises(RunFailed, match=expected):
            policy.sample([np.array([260, 261])], np.array([0]), tiny.greedy(temperature=temperature))
    # Weights that are numbers, and too large ones: only the forward tells.
    change_weights(model, lambda weights: weights["model.norm.weight"].fill_(3e38))
    with pytest.raises(UserError, match=expected):
        evaluate(run_of(model, tiny_run), "test", print)


# ---- what is saved


def dtypes(folder: Path) -> set[torch.dtype]:
    return {weight.dtype for weight in load_file(folder / "model.safetensors").values()}


@pytest.fixture
def half(model: Path) -> Path:
    """The tiny model in bf16."""
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(model)
    return model


@pytest.mark.parametrize("trainable", ["all", "lora"])
@pytest.mark.parametrize(
    ("save_dtype", "expected"), [("auto", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_a_model_is_saved_in_the_dtype_it_came_in_or_the_one_asked_for(
    half: Path, tmp_path: Path, trainable: str, save_dtype: str, expected: torch.dtype
) -> None:
    config = PolicyConfig(model=str(half), precision="fp32", trainable=trainable, save_dtype=save_dtype)
    policy = CausalLM(half, config)
    before = tiny.flat(policy)
    policy.save_pretrained(tmp_path / "saved")
    assert dtypes(tmp_path / "saved") == {expected}
    assert AutoConfig.from_pretrained(tmp_path / "saved").dtype == expected
    assert torch.equal(tiny.flat(policy), before)
    assert before.dtype == torch.float32
    saved, given = (load_file(folder / "model.safetensors") for folder in (tmp_path / "saved", half))
    assert saved.keys() == given.keys()  # tied weights are there once
    assert all(torch.equal(saved[name], given[name].to(expected)) for name in given)


def test_a_base_keeps_its_bits_and_the_trained_model_the_dtype_of_the_given_one(half: Path, tmp_path: Path) -> None:
    config = PolicyConfig(model=str(half), precision="fp32")
    warmed = CausalLM(half, config)
    with torch.no_grad():
        for p in warmed.trainable.values():
            p.mul_(1.001)
    warmed.save_pretrained(tmp_path / "base", torch.float32)
    policy = CausalLM(tmp_path / "base", config)
    assert torch.equal(tiny.flat(policy), tiny.flat(warmed))
    policy.save_pretrained(tmp_path / "saved")
    assert dtypes(tmp_path / "saved") == {torch.bfloat16}


def test_a_dtype_that_the_config_does_not_name_is_that_of_the_weights(half: Path) -> None:
    config = json.loads((half / "config.json").read_text())
    del config["dtype"]
    (half / "config.json").write_text(json.dumps(config))
    assert stored_dtype(half) == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, r"cannot be saved as they are \(temperature, top_p\); .* do_sample: true"),
        ({"early_stopping": True}, r"cannot be saved as they are \(early_stopping\); .* the special tokens only"),
    ],
)
def test_generation_settings_that_cannot_be_saved_are_mended_with_a_note(
    model: Path, tiny_run: Tiny, settings: dict[str, Any], named: str
) -> None:
    change_json(model / "generation_config.json", **settings)
    (note,) = make_plan(run_of(model, tiny_run), {}).notes
    assert re.search(named, note)
    policy = CausalLM(model, PolicyConfig())
    policy.save_pretrained(model.parent / "saved")
    saved = GenerationConfig.from_pretrained(model.parent / "saved")
    assert saved.eos_token_id == policy.tokenizer.eos_token_id
    assert (saved.temperature, saved.do_sample) == ((0.6, True) if "temperature" in settings else (None, None))


def test_generation_settings_that_transformers_does_not_load_are_refused(model: Path, tiny_run: Tiny) -> None:
    change_json(model / "generation_config.json", max_new_tokens=0)
    with pytest.raises(UserError, match=r"cannot be loaded: `max_new_tokens` must be greater than 0"):
        make_plan(run_of(model, tiny_run), {})
