"""Values reach prompts, rewards, tables and files as they were read, a row at a time."""

import datetime
import io
import json
import pickle
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from task_factory import all_rows, as_lines, config, reasons, write_lines

from rl_llm.columns import JSON, values_of
from rl_llm.config import ComponentConfig
from rl_llm.errors import UserError
from rl_llm.rewards import Component
from rl_llm.table import FIELD, make_shard, reward_inputs
from rl_llm.tasks import Task, load_task, task_from_rows
from rl_llm.values import to_json

SIZE = 60


def rows_with(values: list[Any]) -> list[dict[str, Any]]:
    """Rows whose column `value` goes through the values over and over."""
    return [{"text": f"text {i}", "value": values[i % len(values)]} for i in range(SIZE)]


def values_in(task: Task) -> list[Any]:
    """The column `value` by row, as a reward gets it."""
    found = {}
    for table in task.splits.values():
        found |= dict(zip(table["prompt_id"].to_pylist(), values_of(table[FIELD + "value"]), strict=True))
    return [found[row] for row in sorted(found)]


def shard_of(task: Task, completions: list[str]) -> pa.Table:
    """The first rows of the train side with one completion each."""
    count = len(completions)
    prompts = task.splits["train"].slice(0, count)
    prompts = prompts.append_column("prompt_ids", pa.array([[0]] * count, pa.list_(pa.int32())))
    columns: dict[str, Any] = dict.fromkeys(("sample_id", "group", "policy_version", "temperature"), [0] * count)
    columns |= dict.fromkeys(("completion_ids", "action_mask", "logprobs", "log_kept_mass"), [[]] * count)
    return make_shard(prompts, 1, {**columns, "completion": completions, "finish": ["stop"] * count})


def same(found: list[Any], expected: list[Any]) -> bool:
    """Equal, whole numbers and fractions told apart."""
    return [repr(value) for value in found] == [repr(value) for value in expected]


# ---- JSON lines and rows in memory

MIXED = [
    [7, 0.5, None],
    [7, None],
    [2**70, 1],
    [True, None],
    ["a", None],
    [["a"], []],
    [["a", None], None],
    [[1, "a"], [0.5]],
    [[["Nile"], ["the Nile"]], []],
    [{"a": 1}, {"b": [1, 2.5]}, {}],
    [{"a": {"b": None}}, None],
]


@pytest.mark.parametrize("values", MIXED, ids=str)
def test_a_row_has_the_value_that_was_read(tmp_path: Path, values: list[Any]) -> None:
    rows = rows_with(values)
    expected = [row["value"] for row in rows]
    for task in (
        task_from_rows(rows, config()),
        load_task(config(write_lines(tmp_path / "d.jsonl", as_lines(rows))), seed=0),
    ):
        assert task.bad_rows == []
        assert same(values_in(task), expected)
        # What stands in the rollout table, and comes back from the run directory or another process.
        table = pa.concat_tables([task.splits[side] for side in ("train", "tune", "test")])
        table = table.take(pc.sort_indices(table["prompt_id"])).filter(pa.array([True] * SIZE))
        file = io.BytesIO()
        pq.write_table(table, file)
        for copy in (table, pq.read_table(file), pickle.loads(pickle.dumps(table))):
            assert same(values_of(copy[FIELD + "value"]), expected)


def test_columns_of_one_type_stay_columns_of_that_type() -> None:
    values = {"n": 1, "x": 0.5, "s": "a", "b": True, "l": ["a"], "k": [1], "d": datetime.date(2024, 1, 2)}
    schema = task_from_rows([{"text": f"t{i}", **values} for i in range(SIZE)], config()).splits["train"].schema
    kinds = {name: schema.field(FIELD + name).type for name in values}
    assert kinds == {
        "n": pa.int64(), "x": pa.float64(), "s": pa.string(), "b": pa.bool_(), "l": pa.list_(pa.string()),
        "k": pa.list_(pa.int64()), "d": pa.date32(),
    }  # fmt: skip


def test_an_answer_is_scored_by_its_own_type() -> None:
    task = task_from_rows(rows_with([7, 0.5]), config(columns={"reference": "value"}))
    answers = values_of(task.splits["train"]["field/reference"])[:20]
    assert {7, 0.5} <= set(answers)
    score = Component("match", ComponentConfig(use="exact_match")).score
    assert score(shard_of(task, [str(answer) for answer in answers])).values == [1.0] * 20
    assert score(shard_of(task, ["70"] * 20)).values == [0.0] * 20


def test_a_reward_sees_the_keys_of_its_row_and_tables_hold_no_others() -> None:
    def keys(completions: list[str], value: list[dict[str, int]], **columns: Any) -> list[float]:
        return [float(len(one)) for one in value]

    rows = [{"text": f"t{i}", "value": {f"k{i}-{j}": j for j in range(3)}} for i in range(600)]
    task = task_from_rows(rows, config())
    mine = Component("keys", ComponentConfig(use="function:keys"), keys)
    assert mine.score(shard_of(task, ["x"] * 20)).values == [3.0] * 20
    column = task.splits["train"][FIELD + "value"]
    assert column.type == JSON
    assert column.nbytes < 100 * task.splits["train"].num_rows


def test_a_prompt_is_made_of_its_own_row() -> None:
    rows = [{"value": 7.5 if i == 3 else i} for i in range(3 * SIZE)]
    prompts = [row["prompt"] for row in all_rows(task_from_rows(rows, config(prompt="{value}")))]
    assert prompts == [str(row["value"]) for row in rows]
    turns = [[{"role": "user", "content": "hi", "turn": 1}], [{"role": "user", "content": "hi", "turn": 1.5}]]
    task = task_from_rows(rows_with(turns), config(prompt="{value}", split={"by": "text"}))
    assert [json.loads(row["prompt"]) for row in all_rows(task)] == [row["value"] for row in rows_with(turns)]
    assert '"turn": 1}' in all_rows(task)[0]["prompt"]


def test_columns_named_like_the_policys_output_are_kept_but_not_passed() -> None:
    task = task_from_rows([{"text": f"t{i}", "completions": "old"} for i in range(SIZE)], config())
    shard = shard_of(task, ["new"])
    assert shard["field/completions"].to_pylist() == ["old"]
    assert reward_inputs(shard)["completions"] == ["new"]


# ---- missing values


def test_what_is_no_finite_number_is_missing_in_every_source(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": f"t{i}", "value": 0.5, "unused": 1.5, "tags": [0.5]} for i in range(SIZE)]
    rows[3]["text"] = rows[4]["value"] = rows[5]["unused"] = float("nan")
    rows[6]["tags"], rows[7]["unused"] = [float("nan"), 0.5], float("inf")
    frame = pd.DataFrame(rows)
    file = write_lines(tmp_path / "d.jsonl", as_lines(rows))
    assert "NaN" in file.read_text()
    frame.drop(columns="tags").to_csv(tmp_path / "d.csv", na_rep="NaN", index=False)
    pq.write_table(pa.Table.from_pylist([{**row, "text": str(row["text"])} for row in rows]), tmp_path / "d.parquet")
    numbers = [{**row, "value": np.float64(row["value"]), "tags": np.array(row["tags"])} for row in rows]
    for task in (
        load_task(config(file), seed=0),
        load_task(config(tmp_path / "d.csv"), seed=0),
        task_from_rows(frame, config()),
        task_from_rows(frame.to_dict("records"), config()),
        task_from_rows(numbers, config()),
    ):
        line = 5 if task.name.endswith(".csv") else 4
        assert reasons(task) == {line: "column 'text' is missing or empty"}
        table = pa.concat_tables(task.splits.values()).sort_by("prompt_id")
        assert [i for i, value in enumerate(table["field/value"].to_pylist()) if value is None] == [3]
        if "field/tags" in table.column_names:
            assert table["field/tags"][5].as_py() == [None, 0.5]
            assert [i for i, value in enumerate(table["field/unused"].to_pylist()) if value is None] == [4, 6]
    parquet = load_task(config(tmp_path / "d.parquet"), seed=0)
    assert values_in(parquet)[4] is None
    scores = Component("f1", ComponentConfig(use="token_f1")).score(
        shard_of(task_from_rows([{"text": f"t{i}", "reference": float("nan")} for i in range(SIZE)], config()), ["nan"])
    )
    assert scores.status == ["not_applicable"]


def test_what_is_written_is_strict_json() -> None:
    value = {
        "a": float("nan"), "b": [np.float32(0.1), float("inf")], "c": datetime.datetime(2024, 1, 2, 3, 4),
        "d": Decimal("1.50"), "e": b"\x00\xff", "f": datetime.timedelta(days=1), "g": (np.int64(1), pd.NaT),
        "h": Path("a/b"), "i": np.datetime64("2024-01-02"),
    }  # fmt: skip
    assert json.loads(to_json(value)) == {
        "a": None, "b": [0.1, None], "c": "2024-01-02T03:04:00", "d": "1.50", "e": "AP8=", "f": "1 day, 0:00:00",
        "g": [1, None], "h": "a/b", "i": "2024-01-02",
    }  # fmt: skip
    with pytest.raises(TypeError):
        to_json(object())


# ---- Parquet, data sets, frames


def arrow_columns() -> dict[str, tuple[pa.Array, list[Any]]]:
    texts = ["a", "b", None] * (SIZE // 3)
    lists = [["a"], ["b", None], None] * (SIZE // 3)
    pairs = [["a", "b"], None] * (SIZE // 2)
    tenths = [0.1, 7.0, float("nan")] * (SIZE // 3)
    known = [0.1, 7.0, None] * (SIZE // 3)
    objects = [{"x": 0.1, "y": ["a"]}, {"x": None, "y": None}, None] * (SIZE // 3)
    maps = [[("k", 1)], [("j", 2)]] * (SIZE // 2)
    kind = pa.struct([("x", pa.float32()), ("y", pa.large_list(pa.string_view()))])
    return {
        "string_view": (pa.array(texts, pa.string_view()), texts),
        "large_string": (pa.array(texts, pa.large_string()), texts),
        "dictionary": (pa.array(texts).dictionary_encode(), texts),
        "run_end": (pc.run_end_encode(pa.array(texts)), texts),
        "large_list": (pa.array(lists, pa.large_list(pa.large_string())), lists),
        "list_view": (pa.array(lists, pa.list_view(pa.string())), lists),
        "fixed_list": (pa.array(pairs, pa.list_(pa.string(), 2)), pairs),
        "float32": (pa.array(tenths, pa.float32()), known),
        "float16": (pa.array(tenths, pa.float64()).cast(pa.float16()), known),
        "float64": (pa.array(tenths, pa.float64()), known),
        "floats": (pa.array([tenths[:3]] * SIZE, pa.list_(pa.float32())), [known[:3]] * SIZE),
        "objects": (pa.array(objects, kind), objects),
        "map": (pa.array(maps, pa.map_(pa.string(), pa.int8())), [{"k": 1}, {"j": 2}]),
        "json": (pa.array(['{"a": 1}', "[2]"] * (SIZE // 2), JSON), [{"a": 1}, [2]]),
    }


@pytest.mark.parametrize("name", arrow_columns())
def test_every_arrow_type_is_read_as_the_values_it_holds(name: str) -> None:
    column, expected = arrow_columns()[name]
    table = pa.table({"text": [f"t{i}" for i in range(SIZE)], "value": column})
    task = task_from_rows(table, config())
    assert same(values_in(task), expected * (SIZE // len(expected)))
    if isinstance(expected[0], str):
        assert len(all_rows(task_from_rows(table, config(prompt="{value}", split={"by": "text"})))) == SIZE * 2 // 3
        targets = [texts for _, texts in task.training_texts("value")]
        assert {text for texts in targets for text in texts} == {"a", "b"}
    elif name == "fixed_list":
        assert all(texts == ["a", "b"] for _, texts in task.training_texts("value"))


def test_a_data_set_with_json_of_its_own_keeps_the_keys_of_each_row() -> None:
    features = datasets.Features({"text": datasets.Value("string"), "value": datasets.Json()})
    rows = rows_with([{"a": 1}, {"b": "x"}])
    assert same(
        values_in(task_from_rows(datasets.Dataset.from_list(rows, features), config())), [r["value"] for r in rows]
    )


def test_frames_are_data() -> None:
    values = [7, 0.5, None] * (SIZE // 3)
    frame = pd.DataFrame(
        {
            "text": pd.Categorical([f"t{i}" for i in range(SIZE)]),
            "value": pd.array(values, dtype=object),
            "info": [{"a": 1}, {"b": 2}] * (SIZE // 2),
            "gap": [12, None] * (SIZE // 2),
            "day": pd.Timestamp("2024-01-02"),
        },
        index=range(SIZE, 0, -1),
    )
    task = task_from_rows(frame, config(columns={"reference": "gap"}, on_bad_row="skip"))
    assert task.fields == ["text", "value", "info", "gap", "day", "reference"]
    assert len(task.bad_rows) == SIZE // 2  # the gaps
    shard = shard_of(task, ["12"] * 10)
    assert Component("match", ComponentConfig(use="exact_match")).score(shard).values == [1.0] * 10
    assert same(values_in(task_from_rows(frame, config())), values)
    assert all(len(info) == 1 for info in values_of(task.splits["train"]["field/info"]))
    mixed = pd.DataFrame({"text": ["a", 1, *map(str, range(SIZE))]})
    found = reasons(task_from_rows(mixed, config()))
    assert found[2] == "column 'text' holds a number (1), where other rows hold text"


def test_frames_whose_columns_have_no_names_of_their_own_are_refused() -> None:
    with pytest.raises(UserError, match="the column name 0 is not text; rename the columns"):
        task_from_rows(pd.DataFrame([["a", "b"]]), config())
    with pytest.raises(UserError, match="two columns named 'text'"):
        task_from_rows(pd.DataFrame([["a", "b"]], columns=["text", "text"]), config())
