"""Samples of the base policy on the tune split, drawn as training would draw them and scored once, kept as a table."""

import itertools
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rl_llm.config import TOKENS, PolicyConfig, RunConfig, value_at
from rl_llm.files import replacing
from rl_llm.launch.inference import Note, acting_workers, telling
from rl_llm.launch.preflight import Plan
from rl_llm.policies import SamplingParams
from rl_llm.rewards import apply_failure_policies
from rl_llm.rng import Purpose, key
from rl_llm.runtime.replica import fetch
from rl_llm.runtime.weights import Weights
from rl_llm.search.samples import Samples, check_prompts
from rl_llm.table import REWARD, STATUS, component_columns
from rl_llm.tasks.source import held_out
from rl_llm.trainer.collector import Collector, FirstIds, Rollouts
from rl_llm.trainer.evaluation import Evaluator
from rl_llm.trainer.utility import base_statistics

# Streams that no sample of a run reaches.
FIRST = FirstIds(key(Purpose.FORECAST, 0), 0)
KEPT = ("sample_id", "prompt_id", "prompt", "completion", "finish", "temperature")
# Samples of one prompt share what is kept of it, so this many take less memory than as many prompts.
AT_ONCE = 64
PARTS = 8  # of the prompts, after each of which progress is noted
_ORIGIN, _BASE = b"forecast_origin", b"forecast_base"


def sample_base(plan: Plan, base: str, count: int, note: Note) -> pa.Table:
    """Sample and score `count` completions a tune prompt, at the temperature training begins with.

    Args:
        plan: of the run, its task tokenized.
        base: folder (or Hub name) of the policy, see `prepare_base`.
        note: is told of progress, and of rewards that failed.

    Returns:
        A row a sample, those of a prompt one after the other: `sample_id`, `prompt_id`, `group`, `prompt`,
        `completion`, `finish`, `temperature`, and for each component and metric `reward/<name>` float64, raw, and
        `status/<name>`. What it was made from and the base statistics are in the schema's metadata.

    Raises:
        UserError: too few prompts are left.
        RewardFailed: a component failed beyond what its configuration allows.
    """
    config, task = plan.config, plan.task
    prompts = held_out(task.splits["tune"], config.evaluation.prompts)
    check_prompts(prompts.num_rows)
    policy = PolicyConfig(model=base, type=config.policy.type, precision=config.policy.precision)
    acting = config.model_copy(update={"policy": policy})
    with acting_workers(acting, config.measured, plan.functions) as (workers, weights):
        params = SamplingParams.of(config.rollout, 1, config.evaluation.temperature, config.trainer.seed)
        evaluator = Evaluator(config.evaluation, params, config.measured, workers.collector, telling(note))
        greedy = evaluator.evaluate(prompts, "tune", "forecast", 0, weights).values
        found = _draw(config, prompts, count, workers.collector, weights, note)
        table = pa.concat_tables([shard.select(list(KEPT)) for shard in fetch(found.shards)])
    resolved = apply_failure_policies(config.measured, found.scores, found.prompt_ids, 0, telling(note))
    groups = np.repeat(np.arange(prompts.num_rows), count)
    table = table.add_column(2, "group", pa.array(groups, pa.int64()))
    for name, component in resolved.items():
        values = pa.array(component.values, mask=np.isnan(component.values))
        table = table.append_column(REWARD + name, values)
        table = table.append_column(STATUS + name, pa.array(component.status, pa.string()))
    statistics = base_statistics({name: column for name, column in greedy.items() if name != TOKENS})
    notes = {_ORIGIN: json.dumps(origin(plan, count)), _BASE: json.dumps(statistics)}
    return table.replace_schema_metadata(notes)


def _draw(
    config: RunConfig, prompts: pa.Table, count: int, collector: Collector, weights: Weights, note: Note
) -> Rollouts:
    """The samples, scored by every component."""
    rows, start = prompts.num_rows * count, time.perf_counter()
    most = max(AT_ONCE, config.rollout.request_rows)
    width = max(n for n in range(1, count + 1) if count % n == 0 and n <= most)
    repeated = prompts.take(np.repeat(np.arange(prompts.num_rows), count // width))
    params = SamplingParams.of(config.rollout, width, value_at(config.rollout.temperature, 0), config.trainer.seed)
    parts = []
    for low, high in itertools.pairwise(np.linspace(0, repeated.num_rows, PARTS + 1).astype(int).tolist()):
        first = FirstIds(FIRST.sample + low * width, low)
        part = repeated.slice(low, high - low)
        pending = collector.start(f"forecast-{low}", part, params, first, weights, list(config.measured))
        parts.append(collector.wait(pending))
        note(f"forecast: {high * width} of {rows} completions, {time.perf_counter() - start:.0f} s")
    return Rollouts.merge(parts)


def origin(plan: Plan, count: int) -> dict[str, Any]:
    """What samples and raw scores depend on, as plain JSON; weights, gates, clips and the algorithm are not of it."""
    raw = plan.config.to_dict()
    parts = {section: raw[section] for section in ("task", "warm_start")}
    parts["policy"] = {name: raw["policy"][name] for name in ("type", "model", "scratch", "dropout", "precision")}
    parts["rollout"] = {name: value for name, value in raw["rollout"].items() if name not in _OF_STEPS}
    parts["evaluation"] = {name: raw["evaluation"][name] for name in ("prompts", "temperature")}
    of_scores = ("use", "args", "on_failure", "impute")
    components = {**raw["rewards"]["components"], **raw["evaluation"]["metrics"]}
    parts["components"] = {name: {key: spec[key] for key in of_scores} for name, spec in components.items()}
    made_from = {name: value for name, value in asdict(plan.origin).items() if name in ("rows", "model", "code")}
    return {**parts, **made_from, "seed": raw["trainer"]["seed"], "samples": count}


_OF_STEPS = ("engine", "prompts_per_step", "samples_per_prompt", "rows_per_request")


def samples_of(table: pa.Table) -> Samples:
    """What a forecast is made from, of a table of `sample_base`."""
    base = json.loads(table.schema.metadata[_BASE])
    statistics = {name: (mean, spread) for name, (mean, spread) in base.items()}
    return Samples(component_columns(table), table["group"].to_numpy(), statistics)


def write_samples(table: pa.Table, path: Path) -> None:
    with replacing(path) as aside:
        pq.write_table(table, aside)


def read_samples(path: Path, plan: Plan, count: int) -> pa.Table | None:
    """The samples in a file, if there are any and the same plan would draw them again."""
    try:
        table = pq.read_table(path)
        made_from = json.loads(table.schema.metadata[_ORIGIN])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return table if made_from == json.loads(json.dumps(origin(plan, count))) else None
