"""The rollout table: the one thing that flows through a run.

A `pyarrow.Table` with a row per sample, made in *shards* of one rollout request each. Columns:

==================  =============  ==========================================================================
`sample_id`         int64          unique over the run; keys the row's random numbers
`prompt_id`         int64          row of the data set
`group`             int64          samples of one prompt in one step share it
`policy_version`    int32          learner updates behind the weights that acted
`prompt`            string         as read; messages as JSON where the task is conversational
`completion`        string         what the tokens say, without those that end it; never encoded again
`prompt_ids`        list<int32>    what the policy read
`completion_ids`    list<int32>    what the policy wrote, end token included
`action_mask`       list<bool>     tokens the policy chose
`logprobs`          list<float32>  of the untruncated distribution at the sampling temperature
`log_kept_mass`     list<float32>  log of the probability that top_p, top_k or a minimum length kept (0: all)
`temperature`       float32        0: greedy
`finish`            string         "stop" or "length"
`field/<name>`      of the task    the data set's own columns, as `rl_llm.columns` has them
`reward/<name>`     float32        raw component value; null: no value
`status/<name>`     string         "ok", "not_applicable", "error" or "timeout"
`reward`            float32        the weighted mixture
`advantage`         float32        of the row in its group (in the batch, where the learner makes advantages of tokens)
`outcome`           float32        the mixture that such a learner makes them of
`trained`           bool           whether the learner used the row
==================  =============  ==========================================================================

Whether prompts are messages is kept in the schema metadata under `conversational`.
"""

import hashlib
import itertools
import json
from typing import Any

import numpy as np
import pyarrow as pa

from rl_llm.columns import values_of

OK, NOT_APPLICABLE, ERROR, TIMEOUT = "ok", "not_applicable", "error", "timeout"
FIELD, REWARD, STATUS = "field/", "reward/", "status/"
SUMMARY = ("sample_id", "prompt_id", "group", "finish")

_ROLLOUT_TYPES = {
    "sample_id": pa.int64(),
    "group": pa.int64(),
    "policy_version": pa.int32(),
    "completion": pa.string(),
    "completion_ids": pa.list_(pa.int32()),
    "action_mask": pa.list_(pa.bool_()),
    "logprobs": pa.list_(pa.float32()),
    "log_kept_mass": pa.list_(pa.float32()),
    "temperature": pa.float32(),
    "finish": pa.string(),
}


def make_shard(prompts: pa.Table, repeats: int, columns: dict[str, Any]) -> pa.Table:
    """A shard from a task's prompts, each row repeated `repeats` times in place, and what the rollout produced.

    Args:
        prompts: columns `prompt_id`, `prompt`, `prompt_ids` and `field/<name>`; [P] rows.
        repeats: samples per prompt, n.
        columns: the rollout columns of the module's table, [P * n] rows each.
    """
    shard = prompts.take(pa.array(np.repeat(np.arange(prompts.num_rows), repeats)))
    for name, kind in _ROLLOUT_TYPES.items():
        shard = shard.append_column(name, pa.array(columns[name], type=kind))
    return shard


def summarize(shard: pa.Table) -> pa.Table:
    """What passes through the driver: ids, groups, how a sample ended, its length and a digest; no text, no tokens."""
    summary = shard.select(list(SUMMARY))
    completions = ragged(shard["completion_ids"])
    # Equal completions have equal digests, in every process.
    digests = [hashlib.blake2b(ids.tobytes(), digest_size=8).digest() for ids in completions]
    summary = summary.append_column("length", pa.array(list(map(len, completions)), type=pa.int32()))
    return summary.append_column("digest", pa.array([int.from_bytes(d, "little", signed=True) for d in digests]))


def ragged(column: pa.ChunkedArray) -> list[np.ndarray]:
    """A list column as one numpy array a row, without copying."""
    array = column.combine_chunks()
    offsets = np.asarray(array.offsets)
    values = array.values.to_numpy(zero_copy_only=False)
    return [values[a:b] for a, b in itertools.pairwise(offsets)]


def conversational(table: pa.Table) -> bool:
    return (table.schema.metadata or {}).get(b"conversational") == b"1"


def mark_conversational(table: pa.Table) -> pa.Table:
    return table.replace_schema_metadata({**(table.schema.metadata or {}), b"conversational": b"1"})


def reward_inputs(table: pa.Table) -> dict[str, list[Any]]:
    """The keyword arguments of a reward function: prompts, completions, completion_ids and the task's columns.

    In a conversational task prompts are lists of messages and a completion is `[{"role": "assistant", ...}]`.
    """
    prompts: list[Any] = table["prompt"].to_pylist()
    completions: list[Any] = table["completion"].to_pylist()
    if conversational(table):
        prompts = [json.loads(prompt) for prompt in prompts]
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    return {
        **fields_of(table),
        "prompts": prompts,
        "completions": completions,
        "completion_ids": table["completion_ids"].to_pylist(),
    }


def fields_of(table: pa.Table) -> dict[str, list[Any]]:
    """The data's own columns by name, a value a row as it was read."""
    names = [name for name in table.column_names if name.startswith(FIELD)]
    return {name.removeprefix(FIELD): values_of(table[name]) for name in names}


def component_columns(table: pa.Table) -> dict[str, np.ndarray]:
    """Raw component values by name, float64 [N], NaN where a row has no value."""
    return {
        name.removeprefix(REWARD): table[name].to_numpy(zero_copy_only=False).astype(np.float64)
        for name in table.column_names
        if name.startswith(REWARD)
    }
