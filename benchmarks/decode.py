"""Tokens a second of the engine's decoding, against `generate` of transformers.

    python benchmarks/decode.py MODEL

Both sample from the same model in bf16 at temperature 1, 8 rows for each prompt of 64 tokens, at 16, 64 and 256 rows.
Completions are as long-tailed as they are in training: half of the rows end within 6 tokens, one in twenty goes to the
limit of 32. The lengths are drawn beforehand and forced on both sides; only tokens up to the end of a row count.
The two take turns. The last line is one ratio, tokens a second of rl-llm / transformers: the median over the turns, and
of these medians the smallest at 64 rows or more.
"""

import argparse
import statistics
import time
from unittest import mock

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LogitsProcessor

from rl_llm.config import PolicyConfig
from rl_llm.policies import CausalLM, SamplingParams, decoding
from rl_llm.rollout import LocalEngine, RolloutRequest, sample_shard
from rl_llm.runtime.weights import InPlace, Weights

SAMPLES, PROMPT_TOKENS, LIMIT, MEDIAN = 8, 64, 32, 6


def long_tailed(rows: int) -> np.ndarray:
    """Lengths [rows]: log-normal, cut at the limit."""
    drawn = MEDIAN * np.exp(np.random.default_rng(0).standard_normal(rows))
    return np.minimum(np.ceil(drawn), LIMIT).astype(np.int64)


def ours(policy: CausalLM, prompts: np.ndarray, lengths: np.ndarray) -> int:
    class Forced(decoding.Decoding):
        def record(self, step: int, tokens: Tensor, logprobs: Tensor, log_kept_mass: Tensor) -> None:
            tokens[torch.from_numpy(lengths)[self.active] == step + 1] = self.end_ids[0]
            super().record(step, tokens, logprobs, log_kept_mass)

    # The end token is banned throughout: a row ends where it is told to.
    params = SamplingParams(SAMPLES, 1.0, 1.0, 0, LIMIT, LIMIT, (), seed=0)
    ids = np.arange(len(lengths))
    groups = ids // SAMPLES
    table = pa.table(
        {
            "prompt_id": pa.array(range(len(prompts)), type=pa.int64()),
            "prompt": pa.array([""] * len(prompts)),
            "prompt_ids": pa.array(prompts.tolist(), type=pa.list_(pa.int32())),
        }
    )
    request = RolloutRequest(table, ids, groups, params, Weights(number=0, step=0))
    with mock.patch.object(decoding, "Decoding", Forced):
        shard = sample_shard(LocalEngine(policy, InPlace()), request)
    return sum(map(len, shard["completion_ids"].to_pylist()))


class _End(LogitsProcessor):
    """Lets a row end at its length and nowhere else."""

    def __init__(self, lengths: np.ndarray, end: int) -> None:
        self.lengths, self.end = torch.from_numpy(lengths), end

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        done = self.lengths == input_ids.shape[1] - PROMPT_TOKENS + 1
        scores[:, self.end] = -torch.inf
        scores[done] = -torch.inf
        scores[done, self.end] = 0
        return scores


def theirs(model: torch.nn.Module, prompts: np.ndarray, lengths: np.ndarray, end: int) -> int:
    ids = torch.from_numpy(prompts)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            num_return_sequences=SAMPLES,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=LIMIT,
            eos_token_id=end,
            pad_token_id=end,
            logits_processor=[_End(lengths, end)],
        )[:, PROMPT_TOKENS:]
    ended = (out == end).int()
    return int(torch.where(ended.any(dim=1), ended.argmax(dim=1) + 1, out.shape[1]).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a Hugging Face folder")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    policy = CausalLM(args.model, PolicyConfig(precision="bf16"))
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    end = policy.end_ids[0]
    medians = {}
    for rows in args.rows:
        lengths = long_tailed(rows)
        prompts = np.random.default_rng(1).integers(
            end + 1, policy.unwrapped.config.vocab_size, (rows // SAMPLES, PROMPT_TOKENS)
        )
        sides = (lambda: ours(policy, prompts, lengths)), (lambda: theirs(model, prompts, lengths, end))  # noqa: B023
        speeds = []
        for _ in range(1 + args.turns):
            pair = []
            for side in sides:
                start = time.perf_counter()
                tokens = side()
                pair.append(tokens / (time.perf_counter() - start))
                assert tokens == lengths.sum(), (tokens, lengths.sum())
            speeds.append(pair)
        speeds = speeds[1:]
        medians[rows] = statistics.median(a / b for a, b in speeds)
        mine, other = (statistics.median(column) for column in zip(*speeds, strict=True))
        print(
            f"{rows:4d} rows, {lengths.sum()} tokens of {rows * LIMIT}: rl-llm {mine:6.0f} tokens/s, "
            f"transformers {other:6.0f} tokens/s, ratio {medians[rows]:.2f}",
            flush=True,
        )
    print(f"{min(ratio for rows, ratio in medians.items() if rows >= 64 or rows == max(medians)):.2f}")


if __name__ == "__main__":
    main()
