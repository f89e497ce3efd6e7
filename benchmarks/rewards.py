"""The reward pool with one worker, as in a run, against a plain loop over the library.

    python benchmarks/rewards.py

First every built-in component by itself: rows a second and the 99th percentile of a batch's latency. Then chrF through
the pool (shards in the object store, one worker process, values back) and through sacrebleu's sentence score, row by
row, in turns on the same batches; the values must be equal. In a run the samples of a group share a reference, whose
n-grams the component counts once; where each row has its own, nothing is gained by that. The last line is one ratio,
seconds of the pool / of the library: the largest of the medians.
"""

import argparse
import random
import statistics
import time
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from sacrebleu.metrics import CHRF

from rl_llm.config import ComponentConfig, ResourcesConfig
from rl_llm.rewards import RewardWorker, Scores, known
from rl_llm.runtime import connected
from rl_llm.runtime.actor import Actor
from rl_llm.runtime.pool import Pool
from rl_llm.runtime.replica import put
from rl_llm.table import make_shard

WORDS = 64
GROUP = 8
SIZES = (64, 256)
ARGS: dict[str, dict[str, Any]] = {
    "facts": {"columns": ["first", "last"]},
    "length": {"mode": "target", "target": WORDS},
    "overlong": {"limit": WORDS, "buffer": WORDS // 2},
    "regex": {"pattern": r"\bba\w*\b"},
    "vocab": {"kind": "repetition"},
}


def make_batch(rows: int, group: int, rng: random.Random) -> pa.Table:
    """A shard of completions of 64 words, `group` of them to a reference, of which each has kept about half."""
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    vocabulary = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(2000)]
    references = [rng.choices(vocabulary, k=WORDS) for _ in range(rows // group)]
    prompts = {
        "prompt_id": np.arange(len(references)),
        "prompt": ["Write the text again."] * len(references),
        "prompt_ids": [np.arange(8, dtype=np.int32)] * len(references),
        "field/reference": [" ".join(words) for words in references],
        "field/first": [words[0] for words in references],
        "field/last": [words[-1] for words in references],
    }
    completions = [[rng.choice((word, rng.choice(vocabulary))) for word in words] for words in references * group]
    completions = [completions[i % group * len(references) + i // group] for i in range(rows)]
    columns = {
        "sample_id": np.arange(rows),
        "group": np.arange(rows) // group,
        "policy_version": np.zeros(rows),
        "completion": [" ".join(words) for words in completions],
        "completion_ids": [np.arange(WORDS)] * rows,
        "action_mask": [np.ones(WORDS, dtype=bool)] * rows,
        "logprobs": [np.zeros(WORDS)] * rows,
        "log_kept_mass": [np.zeros(WORDS)] * rows,
        "temperature": np.ones(rows),
        "finish": ["length"] * rows,
    }
    return make_shard(pa.table(prompts), group, columns)


def through_pool(pool: Pool, component: str, shard: Any) -> Scores:
    return pool.call("score", component, shard)


def through_library(completions: list[str], references: list[str]) -> list[float]:
    metric = CHRF()
    return [
        metric.sentence_score(text, [reference]).score / 100
        for text, reference in zip(completions, references, strict=True)
    ]


def show_components(pool: Pool, names: list[str], rng: random.Random, calls: int, budget_s: float) -> None:
    """A line a component and batch size; slow ones are called for `budget_s` seconds and not `calls` times."""
    print(
        "| component | rows a batch | batches | rows a second | median, ms | 99 %, ms |\n|---|---:|---:|---:|---:|---:|"
    )
    for rows in SIZES:
        shards = [put(make_batch(rows, GROUP, rng)) for _ in range(calls)]
        for name in names:
            through_pool(pool, name, shards[-1])
            seconds: list[float] = []
            while len(seconds) < calls and sum(seconds) < budget_s:
                start = time.perf_counter()
                scores = through_pool(pool, name, shards[len(seconds)])
                seconds.append(time.perf_counter() - start)
                assert set(scores.status) == {"ok"}
            median, high = (1e3 * float(np.quantile(seconds, q)) for q in (0.5, 0.99))
            rate = rows * len(seconds) / sum(seconds)
            print(f"| {name} | {rows} | {len(seconds)} | {rate:.0f} | {median:.1f} | {high:.1f} |", flush=True)


def compare(pool: Pool, rows: int, group: int, rng: random.Random, pairs: int) -> float:
    """Median ratio of the pool's seconds to the library's on batches that neither has seen before."""
    seconds: list[list[float]] = []
    for turn in range(pairs + 2):
        table = make_batch(rows, group, rng)
        shard, took, values = put(table), [0.0, 0.0], [[0.0], [0.0]]
        completions, references = (table[name].to_pylist() for name in ("completion", "field/reference"))
        for side in (turn % 2, 1 - turn % 2):
            start = time.perf_counter()
            values[side] = (
                through_library(completions, references) if side else through_pool(pool, "chrf", shard).values
            )
            took[side] = time.perf_counter() - start
        assert values[0] == values[1]
        seconds.append(took)
    pool_s, library_s = (statistics.median(took[side] for took in seconds[2:]) for side in (0, 1))
    ratio = statistics.median(took[0] / took[1] for took in seconds[2:])
    print(f"| {rows} | {group} | {1e3 * pool_s:.1f} | {1e3 * library_s:.1f} | {ratio:.3f} |", flush=True)
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser(description="The reward pool against a plain loop over the library.")
    parser.add_argument("--pairs", type=int, default=50, help="of batches, for each line of the comparison")
    parser.add_argument("--calls", type=int, default=200, help="batches a component is timed on")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds at most for a component and batch size")
    args = parser.parse_args()
    names = list(known())
    configs = {name: ComponentConfig(use=name, args=ARGS.get(name, {})) for name in names}
    make, rng = partial(RewardWorker, configs, {}), random.Random(0)
    with (
        connected(ResourcesConfig(num_reward_workers=1)),
        closing(Pool("reward", make, lambda index: Actor(1, {}), 1)) as pool,
    ):
        if args.calls:
            show_components(pool, names, rng, args.calls, args.budget)
        print("\n| rows | rows a reference | pool, ms | library, ms | ratio |\n|---:|---:|---:|---:|---:|")
        ratios = [compare(pool, rows, group, rng, args.pairs) for group in (GROUP, 1) for rows in SIZES]
    print(f"{max(ratios):.3f}")


if __name__ == "__main__":
    main()
