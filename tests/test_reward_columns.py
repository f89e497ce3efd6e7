"""What components read in the columns of the data, and what is refused before the start."""

import functools
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pytest
from task_factory import as_lines, write_lines

import rl_llm
from rl_llm.config import ComponentConfig, RunConfig, build_config
from rl_llm.errors import UserError
from rl_llm.launch.preflight import check_components, read_task
from rl_llm.rewards import Component, exact_match, known
from rl_llm.rewards.registry import parameters_of
from rl_llm.tasks import task_from_rows
from rl_llm.values import texts_of

REFERENCED = sorted(name for name, entry in known().items() if entry.columns)
SQUAD = {"text": ["Nile", "the Nile"], "answer_start": [3, 0]}


def run_config(data: Path | str, **components: Any) -> RunConfig:
    task = {"data": str(data), "prompt": "{question}", "columns": {"reference": "answers"}}
    return build_config({"task": task, "policy": {"model": "-"}, "rewards": {"components": components}})


def questions(answers: list[Any]) -> list[dict[str, Any]]:
    return [{"question": f"question {i}", "answers": answer} for i, answer in enumerate(answers)]


def check(config: RunConfig, answers: list[Any], **functions: Any) -> None:
    check_components(config, functions, task_from_rows(questions(answers), config.task))


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ("Nile", ["Nile"]),
        (7, ["7"]),
        (7.0, ["7"]),
        (0.1, ["0.1"]),
        (True, ["True"]),
        (["Nile", None, 7, 0.5], ["Nile", "7", "0.5"]),
        (SQUAD, ["Nile", "the Nile"]),
        ({"text": [], "answer_start": []}, []),
        (None, []),
    ],
)
def test_what_references_and_targets_may_be(value: Any, texts: list[str]) -> None:
    assert texts_of(value) == texts


def test_a_whole_fraction_is_right_as_12_and_as_12_0() -> None:
    said = ["12", "12.0", "120", "1", "0.5"]
    assert exact_match(said, [12.0] * 5) == [1, 1, 0, 0, 0]
    assert exact_match(said, [[12.0, 0.5]] * 5) == [1, 1, 0, 0, 1]
    assert exact_match(said, [12] * 5) == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("name", REFERENCED)
def test_squads_object_is_its_texts(name: str) -> None:
    config = run_config("unused", answer={"use": name})
    task = task_from_rows(questions([SQUAD] * 60), config.task)
    check_components(config, {}, task)
    assert task.training_texts("reference")[0][1] == SQUAD["text"]
    function = known()[name].target
    completions = ["Nile", "a river", "the Nile"]
    assert function(completions, reference=[SQUAD] * 3) == function(completions, reference=[SQUAD["text"]] * 3)


@pytest.mark.parametrize(
    ("odd", "what"),
    [
        ([["Nile"], ["the Nile"]], "a list in a list"),
        ({"value": "Nile"}, "an object"),
        ({**SQUAD, "more": 1}, "an object"),
        ([{"text": "Nile"}], "an object in a list"),
    ],
)
@pytest.mark.parametrize("name", REFERENCED)
def test_what_no_reference_can_be_is_refused_with_its_row(tmp_path: Path, name: str, odd: Any, what: str) -> None:
    fine: Any = SQUAD if isinstance(odd, dict) else ["Nile"]
    rows = questions([fine] * 60)
    rows[41]["answers"] = odd
    config = run_config(write_lines(tmp_path / "d.jsonl", ["", *as_lines(rows)]), answer={"use": name})
    with pytest.raises(UserError) as caught:
        check_components(config, {}, read_task(config))
    assert str(caught.value).startswith(
        f"{tmp_path / 'd.jsonl'}:43: component 'answer' cannot read the column 'reference': {what} ("
    )
    assert "where a text, a number, a list of these" in str(caught.value)


def test_a_warm_start_target_that_is_no_text_is_refused_with_its_row() -> None:
    config = run_config("unused", answer={"use": "length"})
    task = task_from_rows(questions([[["Nile"]]] * 60), config.task)
    with pytest.raises(UserError, match=r"^rows:\d+: the target 'reference' is a list in a list \(\['Nile'\]\), where"):
        task.training_texts("reference")


def close(completions: list[str], target: Annotated[list[float], rl_llm.Takes(float)], **columns: Any) -> list[float]:
    return [float(text == str(one)) for text, one in zip(completions, target, strict=True)]


class Close:
    def __call__(self, completions: list[str], target: "Annotated[list[float], rl_llm.Takes(float)]") -> list[float]:
        return close(completions, target)


@pytest.mark.parametrize("reward", [close, Close, Close(), functools.partial(close)])
def test_a_reward_of_ones_own_says_what_it_takes(reward: Any) -> None:
    config = run_config("unused", close={"use": "function:close"})
    config.task.columns["target"] = "answers"
    check(config, [7, 0.5] * 30, close=reward)
    expected = r"^rows:1: component 'close' cannot read the column 'target': could not convert string"
    with pytest.raises(UserError, match=expected):
        check(config, ["seven"] * 60, close=reward)


def test_a_column_that_args_give_is_not_read_in_the_data() -> None:
    config = run_config("unused", close={"use": "function:close", "args": {"target": [1.0]}})
    config.task.columns["target"] = "answers"
    check(config, ["seven"] * 60, close=close)


def test_annotations_that_say_nothing_of_values_refuse_nothing() -> None:
    def mine(completions: list[str], reference: list[str], **columns: "Nowhere") -> list[float]:  # type: ignore[name-defined]  # noqa: F821
        return [1.0] * len(completions)

    check(run_config("unused", mine={"use": "function:mine"}), [[["nested"]]] * 60, mine=mine)


def shard(fields: list[dict[str, Any]]) -> pa.Table:
    columns = {f"field/{name}": [row[name] for row in fields] for name in fields[0]}
    same = {"prompt": ["?"] * len(fields), "completion": ["a"] * len(fields), "completion_ids": [[0]] * len(fields)}
    return pa.table({**same, **columns})


class Columns:
    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        return [float("self" not in columns and "this" in columns)] * len(completions)

    def method(this, completions: list[str], **columns: Any) -> list[float]:
        return [float("self" in columns)] * len(completions)


@pytest.mark.parametrize("reward", [Columns, Columns()])
def test_a_column_called_self_is_not_passed_to_a_class(reward: Any) -> None:
    table = shard([{"self": "x", "this": "y"}])
    scores = Component("mine", ComponentConfig(use="function:mine"), reward).score(table)
    assert (scores.errors, scores.values) == ([], [1.0])


def test_a_column_called_self_is_passed_to_what_can_take_it() -> None:
    def mine(completions: list[str], **columns: Any) -> list[float]:
        return [float("self" in columns and "this" in columns)] * len(completions)

    table = shard([{"self": "x", "this": "y"}])
    config = ComponentConfig(use="function:mine")
    assert Component("mine", config, mine).score(table).values == [1.0]
    assert Component("mine", config, Columns().method).score(table).values == [1.0]
    assert parameters_of(Columns().method).own == "this"
