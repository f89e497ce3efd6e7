"""What TRL hands a reward beside the data: the state of the run, and ways to log numbers."""

import pickle
from typing import Any

import numpy as np
import pyarrow as pa

from rl_llm.config import ComponentConfig
from rl_llm.rewards import Component, RewardWorker, Scores
from rl_llm.rewards.hooks import RunState
from rl_llm.runs.console import shown_metrics


def rows(completions: list[str], version: int | None = None, **fields: Any) -> pa.Table:
    columns = {f"field/{name}": values for name, values in fields.items()}
    if version is not None:
        columns["policy_version"] = [version] * len(completions)
    ids = pa.array([[0]] * len(completions), pa.list_(pa.int32()))
    return pa.table({"prompt": ["?"] * len(completions), "completion": completions, "completion_ids": ids, **columns})


def score(fn: Any, table: pa.Table, **settings: Any) -> Scores:
    mine = Component("mine", ComponentConfig(use="function:mine", **settings), fn)
    mine.check_columns([])
    return mine.score(table)


def test_a_reward_knows_the_step_and_how_many_there_are() -> None:
    seen = []

    def mine(completions: list[str], trainer_state: Any, **columns: Any) -> list[float]:
        seen.append((trainer_state.global_step, trainer_state.max_steps))
        return [0.0] * len(completions)

    worker = RewardWorker({"mine": ComponentConfig(use="function:mine")}, {"mine": mine}, max_steps=100)
    worker.score("mine", rows(["a", "b"], version=7))
    worker.score("mine", rows(["a", "b"], version=7), row=1)
    score(mine, rows(["a"]))
    assert seen == [(7, 100), (7, 100), (0, 0)]


def test_what_a_reward_logs_is_averaged_over_shards_and_travels() -> None:
    def mine(completions: list[str], *, log_extra: Any, log_metric: Any, scale: float = 1.0) -> list[float]:
        log_extra("length", [len(text) for text in completions])
        log_extra("odd", [np.float32(0.5), None, "text", float("nan"), True][: len(completions)])
        log_metric("share", scale)
        return [0.0] * len(completions)

    shards = [rows(["a", "bb", "ccc"]), rows(["dddd"])]
    parts = [pickle.loads(pickle.dumps(score(mine, shard, args={"scale": 2.0}))) for shard in shards]
    assert Scores.merge(parts).logged == {"length": (10.0, 4), "odd": (1.0, 2), "share": (4.0, 2)}


def test_a_call_that_fails_logs_nothing_and_its_rows_log_for_themselves() -> None:
    async def mine(completions: list[str], log_extra: Any, **columns: Any) -> list[float]:
        log_extra("length", [len(text) for text in completions])
        return [1 / (text != "bad") for text in completions]

    scores = score(mine, rows(["a", "bad", "ccc"]))
    assert scores.status == ["ok", "error", "ok"]
    assert scores.logged == {"length": (4.0, 2)}


def test_columns_of_the_data_do_not_stand_for_them() -> None:
    seen = []

    def mine(completions: list[str], **columns: Any) -> list[float]:
        seen.append(columns["trainer_state"])
        return [0.0] * len(completions)

    score(mine, rows(["a"], trainer_state=["mine"]))
    assert seen == [RunState()]


def test_a_logged_mean_is_no_component() -> None:
    metrics = {"reward/mean": 1.0, "reward/chrf/mean": 1.0, "reward/chrf/extra/mean": 1.0}
    assert list(shown_metrics(metrics)) == ["reward/mean", "reward/chrf/mean"]
