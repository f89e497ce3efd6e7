"""What becomes of rows a component failed on, and of calls that failed and were mended."""

import numpy as np
import pyarrow as pa
import pytest

from rl_llm.config import ComponentConfig, ResourcesConfig
from rl_llm.rewards import RewardFailed, Scores, apply_failure_policy
from rl_llm.runtime.pool import Outcome, RequestFailed
from rl_llm.trainer.collector import Collector, Pending

MIXED = Scores(
    [1.0, None, None, None], ["ok", "not_applicable", "error", "timeout"], 0.1, ["ValueError: x", "TimeoutError: y"]
)


def apply_failure_policies(scores, **settings):
    return apply_failure_policy("mine", ComponentConfig(use="x", **settings), scores, np.arange(4) // 2, step=7)


def test_mask_leaves_no_value():
    resolved = apply_failure_policies(MIXED, max_failure_rate=1)
    np.testing.assert_array_equal(resolved.values, [1, np.nan, np.nan, np.nan])
    shared = {"step": 7, "component": "mine", "rows": 1, "outcome": "mask", "prompt_ids": [1]}
    assert resolved.failures == [
        {**shared, "status": "error", "message": "ValueError: x"},
        {**shared, "status": "timeout", "message": "TimeoutError: y"},
    ]


def test_impute_puts_the_number_and_keeps_the_status():
    resolved = apply_failure_policies(MIXED, on_failure="impute", impute=-1, max_failure_rate=1)
    np.testing.assert_array_equal(resolved.values, [1, np.nan, -1, -1])
    assert resolved.status == MIXED.status


def test_raise_ends_the_run_with_name_count_and_message():
    with pytest.raises(RewardFailed, match=r"'mine' failed on 2 of 3 rows .*ValueError: x") as caught:
        apply_failure_policies(MIXED, on_failure="raise", max_failure_rate=1)
    assert [failure["outcome"] for failure in caught.value.failures] == ["raise", "raise"]


@pytest.mark.parametrize("policy", [{}, {"on_failure": "impute", "impute": 0}])
def test_too_many_failures_end_the_run_whatever_the_policy(policy):
    with pytest.raises(RewardFailed, match=r"max_failure_rate 0\.5"):
        apply_failure_policies(MIXED, **policy)


def test_rows_the_component_does_not_apply_to_do_not_dilute_failures():
    with pytest.raises(RewardFailed, match="1 of 1 rows"):
        apply_failure_policies(Scores([None] * 4, ["not_applicable"] * 3 + ["error"], 0.0, ["E: x"]))


def test_without_failures_nothing_is_recorded():
    resolved = apply_failure_policies(
        Scores([1.0, 2.0, None, 3.0], ["ok", "ok", "not_applicable", "ok"], 0.0, []), on_failure="raise"
    )
    assert resolved.failures == []


def test_a_lost_batch_is_scored_as_lost():
    lost = Scores.failed(4, "timeout", "TimeoutError: killed after 60 s")
    with pytest.raises(RewardFailed, match="killed after 60 s"):
        apply_failure_policies(lost)


def test_a_mended_call_is_recorded_and_is_no_failure():
    mended = Scores(
        [0.5] * 3, ["ok"] * 3, 0.0, ["returned 1 values for 3 completions"], dict.fromkeys(range(3), "error")
    )
    resolved = apply_failure_policies(Scores.merge([Scores([1.0], ["ok"], 0.0, []), mended]), on_failure="raise")
    assert resolved.status == ["ok"] * 4
    [record] = resolved.failures
    assert (record["status"], record["outcome"], record["rows"]) == ("error", "retried", 3)
    assert (record["message"], record["prompt_ids"]) == ("returned 1 values for 3 completions", [0, 1])


class Sent(list):
    """Stands in for a pool of reward workers."""

    submit = list.append


@pytest.mark.parametrize(("second", "retried"), [("ok", {0: "timeout", 1: "timeout"}), ("error", {})])
def test_a_batch_lost_with_its_worker_is_mended_by_its_rows(second, retried):
    sent = Sent()
    batch = Pending(Collector(None, {"mine": sent}, {"mine": 1.0}, ResourcesConfig(), 2), "step-1", ["mine"], 1)
    batch.summaries[0], batch.shards[0] = pa.table({"length": [1, 2]}), None
    batch.ask(0, "mine")
    sent[0].reply(Outcome(error=RequestFailed("timeout", "too slow")))
    for request, status in zip(sent[1:], ["ok", second], strict=True):
        request.reply(Outcome(Scores([0.5 if status == "ok" else None], [status], 0.0, [])))
    assert batch.scores[0, "mine"].status == ["ok", second]
    assert batch.scores[0, "mine"].retried == retried
