"""Using a trained policy: metrics on held-out prompts, completions for a file, scores for completions."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from rl_llm.columns import values_of
from rl_llm.config import ComponentConfig, RunConfig, SplitConfig, TaskConfig, build_config, read_config
from rl_llm.errors import UserError
from rl_llm.launch.fit import check_fit, probe_policy, without_weights
from rl_llm.launch.preflight import (
    check_components,
    check_model,
    load_tokenizer,
    quiet_libraries,
    read_task,
    registered_here,
)
from rl_llm.policies import SamplingParams, policy_class
from rl_llm.rewards import Component, Scores
from rl_llm.rewards.text import text_of
from rl_llm.runs.run import Run
from rl_llm.runtime import connected
from rl_llm.runtime.replica import fetch
from rl_llm.runtime.weights import Weights
from rl_llm.table import ERROR, FIELD, NOT_APPLICABLE, TIMEOUT, conversational, fields_of, mark_conversational
from rl_llm.tasks import Task, describe_bad_rows, load_prompts
from rl_llm.tasks.prompts import template_columns
from rl_llm.tasks.source import held_out
from rl_llm.trainer.collector import FirstIds
from rl_llm.trainer.evaluation import Evaluation, Evaluator
from rl_llm.trainer.workers import Workers
from rl_llm.values import as_text, to_json

Note = Callable[[str], None]
"""Is told in a line what went wrong with rows: bad ones, failed rewards."""

# Stands for the prompts of a file of completions that has none, and for the policy that wrote them.
NO_PROMPT = NO_MODEL = "-"


def config_for(model: str, source: str | None, overrides: list[str]) -> RunConfig:
    """The settings a policy is used with: a run's own, or those given, with the policy put in.

    Args:
        model: a run directory or a model (folder or Hub name).
        source: recipe or YAML file with settings for a model that is no run; None for defaults.

    Raises:
        UserError: settings that do not fit, or no such model.
    """
    run = Run(model) if (Path(model) / "config.yaml").is_file() else None
    raw = run.config.to_dict() if run else read_config(source) if source else {}
    raw.setdefault("rewards", {"components": ["constant"]})
    policy = raw.get("policy", {})
    kept = {key: policy[key] for key in ("type", "precision") if key in policy}
    raw["policy"] = {**kept, "model": str(run.model) if run else model}
    raw["warm_start"] = {}
    raw.setdefault("algorithm", {})["kl"] = {}
    built = build_config(raw, overrides, where=str(source or model))
    check_model(built.policy)
    return built


@contextmanager
def acting_workers(
    config: RunConfig, components: Mapping[str, ComponentConfig], functions: Mapping[str, Callable[..., Any]]
) -> Iterator[tuple[Workers, Weights]]:
    """Workers without a learner, and those of rewards only with rewards; and the weights they act with.

    Args:
        config: its `policy.model` acts.
        components: that score.
        functions: reward functions given as they are, by component.
    """
    idle = {"num_learners": 0} if components else {"num_learners": 0, "num_reward_workers": 0}
    resources = config.resources.model_copy(update=idle)
    config = config.model_copy(update={"resources": resources})
    with connected(resources):
        workers = Workers(config, _model(config), components, functions, learns=False)
        try:
            yield workers, workers.channel.publish(None, 0)
        finally:
            workers.close()


def _model(config: RunConfig) -> str:
    assert config.policy.model is not None
    return config.policy.model


def _tokenize(config: RunConfig, task: Task, note: Note) -> None:
    quiet_libraries()
    tokenizer, model = load_tokenizer(_model(config)), without_weights(config.policy)
    task.tokenize(tokenizer, policy_class(config.policy).continues)
    for line in check_fit(config, model, tokenizer, task, imitates=False):
        note(line)
    probe_policy(config, model.num_parameters(), task)
    if task.bad_rows:
        note(describe_bad_rows(task.bad_rows))


def evaluate(
    config: RunConfig, split: str, note: Note, functions: Mapping[str, Callable[..., Any]] | None = None
) -> tuple[dict[str, dict[str, float | None]], int]:
    """Measure a policy on a split, decoded as `evaluation` says.

    Args:
        functions: reward functions given as they are, by component.

    Returns:
        Every component's mean and 95 % interval, `{name: {mean, low, high}}`, and the number of prompts.
    """
    found = measure(config, split, note, functions)
    return found.line["metrics"], len(found.prompt_ids)


def measure(
    config: RunConfig, split: str, note: Note, functions: Mapping[str, Callable[..., Any]] | None = None
) -> Evaluation:
    """What `evaluate` reports, with each prompt's values and as many completions as `evaluation.samples` says."""
    functions = {**registered_here(config), **(functions or {})}
    task = read_task(config)
    if split not in task.splits:
        raise UserError(f"--split {split}: choose one of {', '.join(task.splits)}")
    check_components(config, functions, task)
    _tokenize(config, task, note)
    if overlap := task.overlap():
        note(overlap)
    params = SamplingParams.of(config.rollout, 1, config.evaluation.temperature, config.trainer.seed)
    components = config.measured
    prompts = held_out(task.splits[split], config.evaluation.test_prompts)
    with acting_workers(config, components, functions) as (workers, weights):
        evaluator = Evaluator(config.evaluation, params, components, workers.collector, telling(note))
        return evaluator.evaluate(prompts, split, "evaluate", 0, weights)


def telling(note: Note) -> Callable[[dict[str, Any]], None]:
    """What a record of failed rewards says, for `note`."""

    def tell(record: dict[str, Any]) -> None:
        failed = "failed at first" if record["outcome"] == "retried" else "failed"
        note(f"{record['component']} {failed} on {record['rows']} rows, {record['status']}: {record['message']}")

    return tell


def predict(config: RunConfig, file: str, note: Note) -> Iterator[dict[str, Any]]:
    """A completion for each row of a file, greedy unless `evaluation.temperature` says otherwise.

    Yields the row's own columns with `completion` and `finish`, in the file's order; bad rows are left out and noted.
    Where the file has columns of these names, the policy's get others, and a note says which.
    """
    task = load_prompts(_of_file(config, file), rewarded=False)
    _tokenize(config, task, note)
    prompts = task.splits["all"]
    names = _free_names(["completion", "finish"], _rows(prompts.slice(0, 1))[0], note)
    params = SamplingParams.of(config.rollout, 1, config.evaluation.temperature, config.trainer.seed)
    size = config.rollout.request_rows
    with acting_workers(config, {}, {}) as (workers, weights):
        for start in range(0, prompts.num_rows, size * 8):
            part = prompts.slice(start, size * 8)
            pending = workers.collector.start(f"predict-{start}", part, params, FirstIds(start, start), weights, [])
            found = workers.collector.wait(pending)
            for shard in fetch(found.shards):
                answers = shard.select(list(names)).rename_columns(names).to_pylist()
                yield from ({**row, **answer} for row, answer in zip(_rows(shard), answers, strict=True))


def _of_file(config: RunConfig, file: str) -> TaskConfig:
    """The task's settings for all rows of a file that is not divided."""
    return config.task.model_copy(update={"data": file, "rows": None, "split": SplitConfig()})


def _rows(table: pa.Table) -> list[dict[str, Any]]:
    """The data's own columns."""
    fields = fields_of(table)
    return [dict(zip(fields, row, strict=True)) for row in zip(*fields.values(), strict=True)]


def _free_names(ours: list[str], row: Mapping[str, Any], note: Note) -> dict[str, str]:
    """Our columns beside those of a row of the data: the name of each, another one where the data have it already."""
    names = {}
    for name in ours:
        numbered = (f"{name}_{number}" for number in count(2))
        names[name] = next(free for free in chain([name], numbered) if free not in row)
        if names[name] != name:
            note(f"the file has a column {name!r} of its own; the new one is called {names[name]!r}")
    return names


def score(config: RunConfig, file: str, completion: str, note: Note) -> tuple[list[dict[str, Any]], dict[str, Scores]]:
    """Completions that stand in a column of a file, scored by every component: the rows and their scores.

    Components see prompts where the file has the columns of the config's template, and messages where the completions
    are messages. Tokens are those of `policy.model`, with the end token.
    """
    settings = _of_file(config, file)
    task = load_prompts(settings.model_copy(update={"prompt": NO_PROMPT, "system": None, "chat_args": {}}))
    if completion not in task.fields:
        raise UserError(f"{file} has no column {completion!r}; --completion names one of {', '.join(task.fields)}")
    if set(template_columns(settings.prompt)) <= set(task.fields):
        task = load_prompts(settings)
    if task.bad_rows:
        note(describe_bad_rows(task.bad_rows))
    check_components(config, {}, task)
    rows = task.splits["all"]
    components = {name: Component(name, component) for name, component in config.measured.items()}
    given = values_of(rows[FIELD + completion])
    texts = [_text(one, f"{file}: column {completion!r}") for one in given]
    table = rows.append_column("completion", pa.array(texts, pa.string()))
    table = table.append_column("completion_ids", pa.array(_tokens(config, components, texts), pa.list_(pa.int32())))
    if any(isinstance(one, list) for one in given) and not conversational(table):
        asked = [json.dumps([{"role": "user", "content": prompt}]) for prompt in table["prompt"].to_pylist()]
        at = table.column_names.index("prompt")
        table = mark_conversational(table.set_column(at, "prompt", pa.array(asked, pa.string())))
    return _rows(rows), {name: component.score(table) for name, component in components.items()}


def _text(completion: Any, where: str) -> str:
    """The text of a completion of the data: a text, a number or messages."""
    if isinstance(completion, dict | list):
        messages = completion if isinstance(completion, list) else [None]
        if not all(isinstance(one, dict) and isinstance(one.get("content"), str | None) for one in messages):
            raise UserError(f"{where} holds {completion!r:.60}, but a text or a list of messages is needed")
        return text_of(completion)
    return "" if completion is None else as_text(completion)


def _tokens(config: RunConfig, components: Mapping[str, Component], texts: list[str]) -> list[list[int] | None]:
    """The tokens of each text as a policy would have written it; None where no component counts them."""
    counting = [name for name, component in components.items() if component.reads_tokens]
    if not counting:
        return [None] * len(texts)
    if config.policy.model in (None, NO_MODEL):
        raise UserError(
            f"component {counting[0]!r} reads tokens, and a file has none; name the model whose tokenizer counts: "
            "policy.model=<folder or Hub name>"
        )
    tokenizer = load_tokenizer(_model(config))
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    return [[*ids, *end] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def with_scores(rows: list[dict[str, Any]], scores: Mapping[str, Scores], note: Note) -> Iterator[dict[str, Any]]:
    """Each row with its `rewards` and their `status`, by component; under other names, noted, where it has these."""
    names = _free_names(["rewards", "status"], rows[0], note)
    for i, row in enumerate(rows):
        values = {name: found.values[i] for name, found in scores.items()}
        status = {name: found.status[i] for name, found in scores.items()}
        yield {**row, names["rewards"]: values, names["status"]: status}


def write_jsonl(rows: Iterable[dict[str, Any]], file: IO[str]) -> int:
    """Write rows as JSON lines; returns how many."""
    written = 0
    for row in rows:
        file.write(to_json(row) + "\n")
        written += 1
    return written


def summarise(scores: Mapping[str, Scores]) -> list[list[str]]:
    """A row a component: mean, spread, rows it does not apply to, rows it failed on, milliseconds a row."""
    out = []
    for name, found in scores.items():
        values = np.array([value for value in found.values if value is not None], dtype=np.float64)
        mean, std = (f"{values.mean():.4f}", f"{values.std():.4f}") if len(values) else ("-", "-")
        counts = [found.status.count(NOT_APPLICABLE), found.status.count(ERROR) + found.status.count(TIMEOUT)]
        milliseconds = 1000 * found.seconds / max(len(found.values), 1)
        out.append([name, mean, std, *map(str, counts), f"{milliseconds:.2f}"])
    return out
