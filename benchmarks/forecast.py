"""How well the forecast tells what training comes to: four tasks, nine weightings each, two seeds.

    python benchmarks/forecast.py --synopsis FILE --reviews FILE [--output FOLDER] [--task NAME ...]

The tasks are the quickstart and another mixture on its generated records, and two on real text: synopses of packages
(JSON lines with `pkg` and `synopsis`) and film reviews with a rating (`text` and `rating`). The policy is a small one,
warm-started once a task. Each weighting is trained from that start with two seeds; the trained policy is sampled and
decoded greedily on test prompts, and its KL from the start is the mean log-ratio of its samples, nats a completion.

For each metric it prints Spearman's rank correlation between forecast and trained result, the mean over the two seeds,
with a 95 % bootstrap interval over weightings, and beside it the correlation between the seeds: no forecast can do
better. The regret is what the forecast's best of the nine weightings loses in test utility to the best of them, over
the range of the nine. A finished run is a line in FOLDER/runs.jsonl, and a new start goes on from there.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from rl_llm.config import PolicyConfig, RunConfig, build_config, read_config
from rl_llm.launch.preflight import Plan, make_plan
from rl_llm.launch.record import prepare_base
from rl_llm.policies import Policy, SamplingParams, load_policy
from rl_llm.policies.packing import make_rows, microbatches
from rl_llm.rewards import apply_failure_policies
from rl_llm.rng import Purpose, key
from rl_llm.runs.jsonl import read_jsonl
from rl_llm.runtime.replica import fetch
from rl_llm.search.forecast import Forecast, forecast
from rl_llm.search.samples import Samples
from rl_llm.search.sampling import read_samples, sample_base, samples_of, write_samples
from rl_llm.table import ragged
from rl_llm.tasks.source import held_out
from rl_llm.trainer.collector import FirstIds
from rl_llm.trainer.state import utility_weights
from rl_llm.trainer.trainer import Trainer
from rl_llm.trainer.utility import Utility

SEEDS = (0, 1)
WEIGHTINGS = 9
SAMPLES = 64
TEST_PROMPTS, TEST_SAMPLES = 128, 4
KLS = (0.25, 0.5, 1.0, 2.0)
SETTINGS: dict[str, Any] = {
    "policy": {"scratch": {"layers": 4, "hidden_size": 128, "heads": 4, "vocab_size": 512}, "precision": "fp32"},
    "warm_start": {"supervised_steps": 400, "batch_size": 32, "max_target_tokens": 48, "lr": 4.0e-3},
    "rollout": {"prompts_per_step": 8, "samples_per_prompt": 8, "rows_per_request": 32, "max_new_tokens": 32},
    "learner": {"lr": 2.0e-4, "schedule": "linear", "warmup_steps": 5},
    "trainer": {"steps": 40},
}
OF_TEXT: dict[str, Any] = {
    "policy": {"scratch": {**SETTINGS["policy"]["scratch"], "vocab_size": 1024}},
    "warm_start": {"supervised_steps": 1200},
}
TASKS: dict[str, dict[str, Any]] = {
    "quickstart": {"trainer": {"steps": 40}},
    # To chat takes words, and words cost similarity.
    "style": {
        "task": {"data": "builtin:records"},
        "warm_start": {"target": "demonstration"},
        "rollout": {"max_new_tokens": 48},
        "rewards": {
            "components": {
                "chrf": {},
                "chatty": {"use": "regex", "args": {"pattern": "you see|as we know|and that is all"}},
                "long": {"use": "length", "args": {"mode": "target", "target": 24}},
            }
        },
        "evaluation": {"metrics": {"token_f1": {}}, "utility": {"chrf": 1.0, "chatty": 1.0}},
    },
    "synopsis": {
        **OF_TEXT,
        "task": {"prompt": "{pkg} :", "columns": {"reference": "synopsis"}},
        "rewards": {
            "components": {
                "chrf": {},
                "short": {"use": "length", "args": {"mode": "target", "target": 2, "tolerance": 8}},
                "rich": {"use": "vocab", "args": {"kind": "words"}, "scale": 0.1},
            }
        },
        "evaluation": {"metrics": {"rouge": {}}, "utility": {"chrf": 1.0, "short": 1.0}},
    },
    "reviews": {
        **OF_TEXT,
        "task": {"prompt": "rating {rating} :", "columns": {"reference": "text"}},
        "rewards": {
            "components": {
                "sentiment": {},
                "short": {"use": "length", "args": {"mode": "target", "target": 5, "tolerance": 15}},
                "distinct": {"use": "vocab", "args": {"kind": "words"}, "scale": 0.1},
            }
        },
        "evaluation": {"metrics": {"chrf": {}}, "utility": {"sentiment": 10.0, "short": 1.0, "distinct": 0.5}},
    },
}


def settings_of(name: str, data: str | None, steps: int | None) -> RunConfig:
    raw = read_config("quickstart") if name == "quickstart" else {}
    for section, values in itertools.chain(SETTINGS.items() if name != "quickstart" else (), TASKS[name].items()):
        raw[section] = {**raw.get(section, {}), **values}
    if data is not None:
        raw["task"]["data"] = data
    raw["evaluation"] = {
        **raw["evaluation"],
        "prompts": 128,
        "test_prompts": TEST_PROMPTS,
        "samples": 0,
        "controls": [],
    }
    raw["logging"] = {"rollouts": 0, "tensorboard": False}
    if steps is not None:
        raw["trainer"] = {**raw["trainer"], "steps": steps}
    return build_config(raw, where=name)


def weightings(members: list[str]) -> list[dict[str, float]]:
    """Equal weights, each component alone, each left out, and half way from equal weights to each alone; up to nine."""
    count = len(members)
    alone = np.eye(count)
    rows = [alone.mean(axis=0), *alone, *((1 - alone) / (count - 1)), *((alone + 1 / count) / 2)]
    return [dict(zip(members, row.round(6).tolist(), strict=True)) for row in rows[:WEIGHTINGS]]


class Bench:
    """A task with its plan, its start and the forecast's samples."""

    def __init__(self, name: str, config: RunConfig, folder: Path) -> None:
        self.name, self.config = name, config
        self.plan: Plan = make_plan(config, {})
        self.base = prepare_base(self.plan, folder, None, print)
        file = folder / f"{name}.parquet"
        table = read_samples(file, self.plan, SAMPLES) if file.exists() else None
        if table is None:
            table = sample_base(self.plan, self.base, SAMPLES, print)
            write_samples(table, file)
        self.samples: Samples = samples_of(table)
        self.start: Policy = load_policy(self.base, PolicyConfig(precision=config.policy.precision))
        self.weightings = weightings(list(config.rewards.components))
        self.utility = Utility(utility_weights(config), self.samples.base)

    def forecast(self, kl: float | None = None) -> Forecast:
        return forecast(self.samples, self.config, utility=self.utility.weights, weightings=self.weightings, kl=kl)

    def train(self, weights: Mapping[str, float], seed: int) -> dict[str, Any]:
        """A run, as a line: means of the sampled and of the greedy test metrics, KL, seconds."""
        started = time.perf_counter()
        raw = self.config.to_dict()
        raw["rewards"]["weights"], raw["trainer"]["seed"] = dict(weights), seed
        config = build_config(raw)
        with (
            tempfile.TemporaryDirectory() as path,
            Trainer.open(config, Path(path), self.plan.task, self.base) as trainer,
        ):
            while not trainer.over:
                trainer.step()
            trained = time.perf_counter() - started
            sampled, table = self.measure(trainer, TEST_SAMPLES, config.rollout.temperature)
            greedy, _ = self.measure(trainer, 1, 0.0)
        return {
            "task": self.name,
            "weights": dict(weights),
            "seed": seed,
            "sampled": sampled,
            "greedy": greedy,
            "kl": self.kl(table),
            "seconds": {"training": trained, "all": time.perf_counter() - started},
        }

    def measure(self, trainer: Trainer, count: int, temperature: Any) -> tuple[dict[str, float], pa.Table]:
        config = trainer.config
        prompts = held_out(self.plan.task.splits["test"], TEST_PROMPTS)
        params = SamplingParams.of(config.rollout, count, temperature, config.trainer.seed)
        first = FirstIds(key(Purpose.EVALUATION, 0), 0)
        collector = trainer.workers.collector
        found = collector.wait(
            collector.start(f"test-{count}", prompts, params, first, trainer.weights, list(config.measured))
        )
        resolved = apply_failure_policies(config.measured, found.scores, found.prompt_ids, 0, print)
        values = {name: component.values for name, component in resolved.items()}
        values["utility"] = self.utility.per_prompt(values)
        return {name: float(np.nanmean(column)) for name, column in values.items()}, pa.concat_tables(
            fetch(found.shards)
        )

    def kl(self, table: pa.Table) -> float:
        """Mean over samples of log p(trained) - log p(start), both at the sampling temperature."""
        ours = np.array([row.sum(dtype=np.float64) for row in ragged(table["logprobs"])])
        base = np.zeros(len(ours))
        groups = make_rows(
            table["group"].to_pylist(), ragged(table["prompt_ids"]), ragged(table["completion_ids"]), budget=4096
        )
        with torch.no_grad(), self.start.acting():
            for part in microbatches(groups, 4096):
                batch = self.start.pack(part)
                logprobs = self.start.forward(batch, float(table["temperature"][0].as_py())).logprobs.double()
                base[batch.rows.numpy()] = (logprobs * batch.mask).sum(dim=1).numpy()
        return float((ours - base).mean())


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks of [N], ties at their mean."""
    return np.array([(values < value).sum() + ((values == value).sum() - 1) / 2 for value in values])


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation, NaN where one side has no order."""
    a, b = ranks(a), ranks(b)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else float("nan")


def agreement(forecast_: np.ndarray, runs: np.ndarray) -> tuple[float, float, float]:
    """Mean rank correlation of a forecast [W] with each seed's runs [S, W], and its interval over weightings."""

    def mean(rows: np.ndarray) -> float:
        return float(np.mean([spearman(forecast_[rows], seed[rows]) for seed in runs]))

    generator = np.random.default_rng(0)
    count = len(forecast_)
    drawn = np.array([mean(generator.integers(count, size=count)) for _ in range(2000)])
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return mean(np.arange(count)), float(low), float(high)


def results(bench: Bench, lines: list[dict[str, Any]], kind: str, metric: str) -> np.ndarray:
    """[S, W] of the finished runs."""
    found = {(line["seed"], json.dumps(line["weights"])): line[kind][metric] for line in lines}
    return np.array([[found[seed, json.dumps(weights)] for weights in bench.weightings] for seed in SEEDS])


def predicted(bench: Bench, found: Forecast, metric: str) -> np.ndarray:
    """[W], of the benchmark's weightings."""

    def of(weights: Mapping[str, float]) -> float:
        point = next(p for p in found.points if all(abs(p.weights[k] - weights[k]) < 1e-6 for k in weights))
        return float(point.metrics[metric]["mean"] or 0.0)

    return np.array([of(weights) for weights in bench.weightings])


def report(bench: Bench, lines: list[dict[str, Any]]) -> list[tuple[float, float, float]]:
    """Prints a task's table; returns correlation, ceiling and their ratio of each sampled metric."""
    found = bench.forecast()
    print(f"\n## {bench.name}: forecast at {found.kl:.2f} nats from {found.prompts} prompts x {found.samples}")
    kls = np.array([line["kl"] for line in lines])
    seconds = [line["seconds"]["all"] for line in lines]
    print(f"measured KL of the runs: {kls.min():.1f} to {kls.max():.1f}, median {np.median(kls):.1f} nats a completion;"
          f" {statistics.median(seconds):.0f} s a run")  # fmt: skip
    for weights in bench.weightings:
        runs = [line for line in lines if line["weights"] == weights]
        kl, utility = (
            " ".join(f"{value:.1f}" for value in values)
            for values in ([line["kl"] for line in runs], [line["sampled"]["utility"] for line in runs])
        )
        print(f"  {' '.join(f'{name}={weight:.2f}' for name, weight in weights.items())}: KL {kl}, utility {utility}")
    print("| metric | sampled | seeds | greedy | seeds |\n|---|---|---|---|---|")
    out = []
    metrics = [*bench.config.measured, "utility"]
    for metric in metrics:
        cells = []
        for kind in ("sampled", "greedy"):
            runs = results(bench, lines, kind, metric)
            mean, low, high = agreement(predicted(bench, found, metric), runs)
            ceiling = spearman(*runs)
            cells += [f"{mean:.2f} [{low:.2f}, {high:.2f}]", f"{ceiling:.2f}"]
            if kind == "sampled":
                out.append((mean, ceiling, mean / ceiling if ceiling > 0 else float("nan")))
        print(f"| {metric} | {' | '.join(cells)} |")
    for kind in ("sampled", "greedy"):
        utility = results(bench, lines, kind, "utility").mean(axis=0)
        chosen = int(np.argmax(predicted(bench, found, "utility")))
        span = utility.max() - utility.min()
        lost = [(utility.max() - value) / span for value in (utility[chosen], utility[0], np.median(utility))]
        print(
            f"regret, {kind}: {lost[0]:.1%} of the range {span:.2f}; of equal weights {lost[1]:.1%}, of the median "
            f"weighting {lost[2]:.1%}"
        )
    for kl in KLS:
        at = bench.forecast(kl)
        means = [agreement_mean(predicted(bench, at, m), results(bench, lines, "sampled", m)) for m in metrics]
        print(f"forecast at {at.kl:.2f} nats: median correlation {np.nanmedian(means):.2f}")
    return out


def agreement_mean(forecast_: np.ndarray, runs: np.ndarray) -> float:
    return float(np.mean([spearman(forecast_, seed) for seed in runs]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--synopsis", metavar="FILE")
    parser.add_argument("--reviews", metavar="FILE")
    parser.add_argument("--output", type=Path, default=Path("runs/forecast-benchmark"))
    parser.add_argument("--task", action="append", choices=list(TASKS), help="default: all whose file is given")
    parser.add_argument("--steps", type=int, help="of each run")
    given = parser.parse_args()
    files = {"synopsis": given.synopsis, "reviews": given.reviews}
    names = given.task or [name for name in TASKS if files.get(name, "") is not None]
    given.output.mkdir(parents=True, exist_ok=True)
    where = given.output / "runs.jsonl"
    ratios: list[tuple[float, float, float]] = []
    for name in names:
        bench = Bench(name, settings_of(name, files.get(name), given.steps), given.output)
        done = [line for line in read_jsonl(where) if line["task"] == name]
        for seed, weights in itertools.product(SEEDS, bench.weightings):
            if not any(line["seed"] == seed and line["weights"] == weights for line in done):
                line = bench.train(weights, seed)
                with where.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                done.append(line)
                print(f"{name} {weights} seed {seed}: KL {line['kl']:.2f}, {line['seconds']['all']:.0f} s", flush=True)
        ratios += report(bench, done)
    told = [ratio for _, _, ratio in ratios if not np.isnan(ratio)]
    print(f"\nmedian over {len(told)} metrics of correlation / ceiling: {statistics.median(told):.2f}")


if __name__ == "__main__":
    main()
