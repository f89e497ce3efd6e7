"""Makes synthetic run directories, as a training run leaves them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rl_llm.config import RunConfig, build_config
from rl_llm.runs.jsonl import JsonlWriter
from rl_llm.table import OK
from rl_llm.values import to_json


def make_config(components: dict[str, float], overrides: tuple[str, ...] = ()) -> RunConfig:
    """A config whose mixture has these components and weights."""
    raw = {
        "policy": {"model": "folder/of/a-model"},
        "rewards": {"components": {name: {"use": "length"} for name in components}, "weights": dict(components)},
    }
    return build_config(raw, list(overrides))


def make_run(
    path: Path,
    components: dict[str, float] | None = None,
    steps: int = 40,
    every: int = 10,
    summary: dict[str, Any] | None = None,
    overrides: tuple[str, ...] = (),
    completion: str = "a short completion",
) -> Path:
    """A run directory with `steps` metric lines and a validation each `every` steps; `summary` None: still running."""
    components = {"chrf": 1.0, "length": 0.3} if components is None else components
    config = make_config(components, ("evaluation.metrics.bleu=bleu", f"trainer.steps={max(steps, 1)}", *overrides))
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(config.to_yaml() + "versions:\n  torch: 2.13.0\n")
    rng = np.random.default_rng(0)
    names = list(components)
    metrics = JsonlWriter(path / "metrics.jsonl")
    for step in range(1, steps + 1):
        metrics.write(step_metrics(step, steps, names, components, rng))
    evaluations = JsonlWriter(path / "eval.jsonl")
    evaluations.write(evaluation(0, "test", "before", names, 0.0, completion))
    for step in range(0, steps + 1, every):
        evaluations.write(evaluation(step, "tune", "validation", names, step / max(steps, 1), completion))
    if summary is not None:
        if steps:
            evaluations.write(evaluation(steps, "test", "after", names, 1.0, completion))
        (path / "summary.json").write_text(to_json(summary))
    return path


def step_metrics(
    step: int, steps: int, names: list[str], weights: dict[str, float], rng: np.random.Generator
) -> dict[str, Any]:
    done = step / steps
    line: dict[str, Any] = {"step": step, "loss": rng.normal(0, 0.01), "grad_norm": 1 + rng.exponential(0.2)}
    line |= {"lr": 1e-5, "temperature": 1.0, "reward/mean": done + rng.normal(0, 0.1), "reward/std": 0.3 - 0.1 * done}
    for index, name in enumerate(names):
        line[f"reward/{name}/mean"] = 0.3 + 0.4 * done / (index + 1) + rng.normal(0, 0.05)
        line[f"reward/{name}/std"] = 0.2 - 0.1 * done
        line[f"weights/{name}"] = weights[name]
        line[f"share/{name}"] = 1 / len(names) + (0.2 if index % 2 else -0.2) * done
        line[f"failures/{name}"] = int(rng.random() < 0.1) * index
        line[f"not_applicable/{name}"] = 0
        line[f"time/reward/{name}"] = 0.02 * (index + 1)
        for other in names[index + 1 :]:
            line[f"correlation/{name}~{other}"] = float(np.clip(rng.normal(0.2, 0.3), -1, 1))
    line |= {"completion/length": 40 - 15 * done, "completion/stopped": 0.5 + 0.4 * done}
    line |= {"groups/without_signal": 0.1 * done, "kl": 0.02 * done, "entropy": 2.5 - done}
    line |= {"mismatch": 1e-6 * rng.exponential(), "bad_steps": 0, "tokens_per_second": 1200 + rng.normal(0, 50)}
    return line | {"time/rollout": 2.0, "time/score": 0.3, "time/update": 1.5}


def evaluation(step: int, split: str, label: str, names: list[str], done: float, completion: str) -> dict[str, Any]:
    metrics = {name: around(0.3 + 0.3 * done) for name in [*names, "bleu"]} | {"utility": around(done)}
    samples = [
        {
            "prompt": f"prompt {index}: name Ada, born 1815, known for programs",
            "completion": f"{completion} of step {step}",
            "rewards": dict.fromkeys(names, None if index == 2 else 0.3 + done / 3),
        }
        for index in range(3)
    ]
    return {"step": step, "split": split, "label": label, "metrics": metrics, "samples": samples}


def around(mean: float, half: float = 0.05) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def finished(steps: int, **changes: Any) -> dict[str, Any]:
    """A summary of a run that ended well; before, after and one control on the test split."""
    before = {"chrf": around(0.30), "length": around(0.5), "utility": around(0.0)}
    after = {"chrf": around(0.55), "length": around(0.52), "utility": around(1.4)}
    controls = {"supervised": {"chrf": around(0.33), "length": around(0.5), "utility": around(0.1)}}
    summary = {"status": "finished", "reason": None, "steps": steps, "best_step": steps, "seconds": 754.2}
    return summary | {"before": before, "after": after, "controls": controls, "bad_rows": 3} | changes


def write_rollouts(
    path: Path,
    step: int,
    values: dict[str, list[float | None]],
    groups: list[int],
    advantages: list[float] | None = None,
    conversational: bool = False,
) -> None:
    """A rollout table with raw component `values`; `advantages` as the run used them."""
    count = len(groups)
    prompts = [f"prompt of group {group}" for group in groups]
    columns: dict[str, Any] = {
        "sample_id": pa.array(range(count), pa.int64()),
        "prompt_id": pa.array(groups, pa.int64()),
        "group": pa.array(groups, pa.int64()),
        "prompt": [json.dumps([{"role": "user", "content": text}]) for text in prompts] if conversational else prompts,
        "completion": [f"completion {row}" for row in range(count)],
        "finish": ["stop"] * count,
    }
    for name, rewards in values.items():
        columns[f"reward/{name}"] = pa.array(rewards, pa.float32())
        columns[f"status/{name}"] = [OK if reward is not None else "not_applicable" for reward in rewards]
    columns["reward"] = pa.array([0.0] * count, pa.float32())
    columns["advantage"] = pa.array(advantages or [0.0] * count, pa.float32())
    (path / "rollouts").mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path / "rollouts" / f"step-{step:06d}.parquet")
