"""A policy, a task and configs so small that a whole run takes seconds; and ways to compare runs."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rl_llm.config import PolicyConfig, RunConfig, ScratchConfig, WarmStartConfig, build_config
from rl_llm.launch.training import run_training
from rl_llm.learner.supervised import encode_examples, train_supervised
from rl_llm.policies import CausalLM, Policy, SamplingParams
from rl_llm.policies.scratch import build_scratch
from rl_llm.rollout import LocalEngine, RolloutRequest, sample_shard
from rl_llm.runs.callbacks import Callback
from rl_llm.runs.console import Console
from rl_llm.runs.jsonl import read_jsonl
from rl_llm.runs.run import Run
from rl_llm.runtime.weights import InPlace, Weights

COLOURS = ("red", "blue", "green", "gold")
NOISE = ("now", "then", "here", "there", "again", "please")
SCRATCH = ScratchConfig(layers=2, hidden_size=32, heads=2, vocab_size=300)


def rows(count: int = 48) -> list[dict[str, Any]]:
    """Prompts such as "3 please red", each with the colour it ends with; `id` says on which side a row is."""
    return [
        {
            "id": str(i),
            "text": f"{i} {NOISE[i // 4 % len(NOISE)]} {COLOURS[i % 4]}",
            "colour": COLOURS[i % 4],
            "demonstration": [" ".join(COLOURS[(i + k * turn) % 4] for k in range(1 + turn % 4)) for turn in range(12)],
        }
        for i in range(count)
    ]


def build_architecture(kind: str, folder: Path, tokenizer: Path, **settings: Any) -> Path:
    """An untrained model of one of the library's architectures, its logits far from even, with a given tokenizer."""
    words = AutoTokenizer.from_pretrained(tokenizer)
    shape = {"vocab_size": len(words), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": None, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **{**shape, **special, "initializer_range": 0.2, **settings})
        )
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def write_task(path: Path, count: int = 48) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    return path


def build_policy(folder: Path) -> Path:
    """A randomly initialised model and its tokenizer; it then learns to answer any prompt with a few random colours."""
    data = rows()
    texts = [text for row in data for text in (row["text"], *row["demonstration"])]
    build_scratch(SCRATCH, texts, str(folder / "random"), seed=0)
    policy = CausalLM(folder / "random", PolicyConfig(precision="fp32"))
    prompts = [np.array(ids) for ids in policy.tokenizer([row["text"] for row in data])["input_ids"]]
    examples = encode_examples(policy, prompts, [row["demonstration"] for row in data], max_target_tokens=8)
    warm = WarmStartConfig(batch_size=16, lr=1e-2, warmup_steps=5)
    train_supervised(policy, examples, warm, seed=1, steps=60)
    policy.save_pretrained(folder / "policy")
    return folder / "policy"


def settings(folder: Path, data: Path, /, **sections: Any) -> dict[str, Any]:
    """A run of 6 steps with 3 requests a step, as a plain mapping; the keys in `sections` go over it."""
    base: dict[str, dict[str, Any]] = {
        "task": {
            "data": str(data),
            "prompt": "{text}",
            "split": {"by": "id", "tune": 0.2, "test": 0.2},
        },
        "policy": {"model": str(folder), "precision": "fp32"},
        "rollout": {"prompts_per_step": 6, "samples_per_prompt": 4, "rows_per_request": 8, "max_new_tokens": 5},
        "rewards": {
            "components": {
                "match": {"use": "tiny_rewards:match"},
                "length": {"args": {"mode": "target", "target": 3}, "scale": 0.2},
            }
        },
        "learner": {"lr": 1.0e-2},
        "evaluation": {"every": 2, "prompts": 6, "test_prompts": 8, "samples": 2},
        "checkpoint": {"every": 2},
        "logging": {"tensorboard": False},
        "trainer": {"steps": 6},
    }
    return {name: {**base.get(name, {}), **sections.get(name, {})} for name in {**base, **sections}}


def config(folder: Path, data: Path, /, **sections: Any) -> RunConfig:
    return build_config(settings(folder, data, **sections))


def train(
    settings: RunConfig,
    path: Path,
    *callbacks: Callback,
    functions: dict[str, Callable[..., Any]] | None = None,
    resume: bool = False,
) -> Run:
    return run_training(settings, path, resume=resume, functions=functions, callbacks=callbacks, console=Console())


def greedy(tokens: int = 8, **changes: Any) -> SamplingParams:
    """Sampling parameters, greedy unless `changes` say otherwise."""
    base: dict[str, Any] = {
        "samples_per_prompt": 1, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": tokens,
        "min_new_tokens": 0, "stop": (), "seed": 0,
    }  # fmt: skip
    return SamplingParams(**{**base, **changes})


def prompt_table(policy: CausalLM, texts: Sequence[str]) -> pa.Table:
    """Tokenized prompts as an engine takes them."""
    ids = policy.tokenizer(list(texts))["input_ids"]
    return pa.table(
        {
            "prompt_id": pa.array(range(len(texts)), pa.int64()),
            "prompt": pa.array(texts, pa.string()),
            "prompt_ids": pa.array(ids, pa.list_(pa.int32())),
        }
    )


def generate(
    policy: Policy, prompts: pa.Table, sample_ids: np.ndarray, groups: np.ndarray, params: SamplingParams
) -> pa.Table:
    """A shard of the rollout table, sampled by a policy as it is."""
    request = RolloutRequest(prompts, sample_ids, groups, params, Weights(number=0, step=0))
    return sample_shard(LocalEngine(policy, InPlace()), request)


def flat(policy: Policy) -> torch.Tensor:
    """The trainable weights as one tensor."""
    return torch.cat([weight.flatten().clone() for weight in policy.named_weights().values()])


# Comparing runs.


def timeless(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl without what is measured in seconds, or depends on who was first to score a row."""
    others = ("tokens_per_second", "/extra/cached")
    return {k: v for k, v in line.items() if not (k.startswith("time/") or k.endswith(others))}


def metrics(path: Path) -> list[dict[str, Any]]:
    return [timeless(line) for line in read_jsonl(path / "metrics.jsonl")]


def table(path: Path, step: int) -> pa.Table:
    """A rollout table of a run directory without a config."""
    return pq.read_table(path / "rollouts" / f"step-{step:06d}.parquet")


def rollouts(path: Path) -> dict[str, pa.Table]:
    run = Run(path)
    return {str(step): run.rollouts(step) for step in run.rollout_steps}


def evaluations(path: Path) -> dict[str, pa.Table]:
    return {file.name: pq.read_table(file) for file in (path / "evaluations").iterdir()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_run(path: Path, other: Path) -> None:
    """Everything that two runs left is the same, bit for bit, times aside."""
    assert metrics(path) == metrics(other)
    assert read_jsonl(path / "eval.jsonl") == read_jsonl(other / "eval.jsonl")
    values, expected_values = evaluations(path), evaluations(other)
    assert values.keys() == expected_values.keys()
    assert [name for name in values if not values[name].equals(expected_values[name])] == []
    tables, expected = rollouts(path), rollouts(other)
    assert tables.keys() == expected.keys()
    for step in expected:
        assert tables[step].equals(expected[step]), f"rollouts of step {step} differ"
    assert_same_weights(path / "model", other / "model")
    assert Run(path).summary["best_step"] == Run(other).summary["best_step"]


def assert_same_weights(folder: Path, other: Path) -> None:
    found, expected = weights(folder), weights(other)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
