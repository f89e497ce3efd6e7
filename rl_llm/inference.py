"""Using a trained policy: metrics on held-out prompts, completions for a file, scores for completions."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from rl_llm.config import RunConfig, build_config
from rl_llm.crew import Crew
from rl_llm.errors import UserError
from rl_llm.evaluation import Evaluator, held_out
from rl_llm.plan import check_model
from rl_llm.rewards import Component, Scores
from rl_llm.rollout import SamplingParams
from rl_llm.run import Run
from rl_llm.table import FIELD
from rl_llm.tasks import load_prompts, load_task
from rl_llm.workers import fetch


def config_for(model: str, config: RunConfig | None, overrides: list[str]) -> RunConfig:
    """The settings a policy is used with: a run's own, or those given, with the policy put in.

    Args:
        model: a run directory or a model (folder or Hub name).
        config: settings for a model that is no run; None for defaults.
    """
    run = Run(model) if (Path(model) / "config.yaml").is_file() else None
    source = run.config if run else config
    raw: dict[str, Any] = source.model_dump(mode="json", by_alias=True) if source else {}
    raw.setdefault("rewards", {"components": ["constant"]})
    raw["policy"] = {
        "model": str(run.model) if run else model,
        "precision": raw.get("policy", {}).get("precision", "auto"),
    }
    raw["warm_start"] = {}
    raw.setdefault("algorithm", {})["kl"] = {}
    built = build_config(raw, overrides)
    check_model(built.policy.model)
    return built


@contextmanager
def _crew(config: RunConfig, functions: Mapping[str, Callable[..., Any]]) -> Iterator[Crew]:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    started = False
    if config.resources.uses_ray:
        from rl_llm.cluster import connect

        started = connect(config.resources)
    assert config.policy.model is not None
    crew = Crew(config, config.policy.model, _components(config), functions)
    try:
        crew.publish(0)
        yield crew
    finally:
        crew.close()
        if started:
            import ray

            ray.shutdown()


def _components(config: RunConfig) -> dict[str, Any]:
    return {**config.rewards.components, **config.evaluation.metrics}


def evaluate(
    config: RunConfig, split: str = "test", functions: Mapping[str, Callable[..., Any]] | None = None
) -> dict[str, dict[str, float | None]]:
    """Every component's mean and 95 % interval on a split, `{name: {mean, low, high}}`, decoded as `evaluation` says."""
    functions = functions or {}
    task = load_task(config.task, config.trainer.seed)
    if split not in task.splits:
        raise UserError(f"--split {split}: choose one of {', '.join(task.splits)}")
    for name, component in _components(config).items():
        Component(name, component, functions.get(name)).check_columns(task.fields)
    task.tokenize(AutoTokenizer.from_pretrained(config.policy.model))
    params = SamplingParams.of(config.rollout, 1, config.evaluation.temperature, config.trainer.seed)
    with _crew(config, functions) as crew:
        evaluator = Evaluator(
            config.evaluation, params, config.rollout.request_rows, _components(config), crew, None, lambda record: None
        )
        prompts = held_out(task.splits[split], config.evaluation.test_prompts)
        return evaluator.evaluate(prompts, split, "evaluate", 0).line["metrics"]


def predict(config: RunConfig, file: str) -> Iterator[dict[str, Any]]:
    """A completion for each row of a file, greedy unless `evaluation.temperature` says otherwise.

    Yields the row's own columns with `completion` and `finish`, in the file's order.
    """
    task = load_prompts(config.task.model_copy(update={"data": file, "columns": {}}))
    task.tokenize(AutoTokenizer.from_pretrained(config.policy.model))
    prompts = task.splits["all"]
    params = SamplingParams.of(config.rollout, 1, config.evaluation.temperature, config.trainer.seed)
    size = config.rollout.request_rows
    with _crew(config, {}) as crew:
        for start in range(0, prompts.num_rows, size * 8):
            part = prompts.slice(start, size * 8)
            found = crew.collector.collect(
                f"predict-{start}", part, params, size, (start, start), crew.version, crew.weights, []
            )
            for shard in fetch(found.shards):
                fields = [name for name in shard.column_names if name.startswith(FIELD)]
                for row in shard.select([*fields, "completion", "finish"]).to_pylist():
                    yield {name.removeprefix(FIELD): value for name, value in row.items()}


def score(config: RunConfig, file: str, completion: str) -> tuple[list[dict[str, Any]], dict[str, Scores]]:
    """Completions that stand in a column of a file, scored by every component: the rows and their scores."""
    task = load_prompts(config.task.model_copy(update={"data": file}))
    rows = task.splits["all"]
    if FIELD + completion not in rows.column_names:
        raise UserError(
            f"{file} has no column {completion!r} to score; --completion names one of {', '.join(task.fields)}"
        )
    texts = rows[FIELD + completion].cast(pa.string())
    words = pa.array([text.split() for text in texts.to_pylist()])
    table = rows.append_column("completion", texts).append_column("completion_ids", words)
    scores = {}
    for name, component in _components(config).items():
        built = Component(name, component)
        built.check_columns(task.fields)
        scores[name] = built.score(table)
    return rows.select(["prompt"]).to_pylist(), scores


def write_jsonl(rows: Iterator[dict[str, Any]], path: Path) -> int:
    """Write rows as JSON lines; returns how many."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for count, row in enumerate(rows, start=1):
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    return count


def summarise(scores: Mapping[str, Scores]) -> list[list[str]]:
    """A row a component: mean, spread, rows without a value, failures, milliseconds a row, first message."""
    out = []
    for name, found in scores.items():
        values = np.array([value for value in found.values if value is not None], dtype=np.float64)
        mean, std = (f"{values.mean():.4f}", f"{values.std():.4f}") if len(values) else ("-", "-")
        failed = sum(status in ("error", "timeout") for status in found.status)
        rows = len(found.values)
        out.append(
            [name, mean, std, str(rows - len(values) - failed), str(failed), f"{1000 * found.seconds / max(rows, 1):.2f}",
             found.errors[0] if found.errors else ""]
        )  # fmt: skip
    return out
