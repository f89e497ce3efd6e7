import csv
import gzip
import io
import random
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from task_factory import all_rows, as_lines, config, facts, reasons, side_by_prompt, write_lines

from rl_llm.config import TaskConfig
from rl_llm.errors import UserError
from rl_llm.table import FIELD
from rl_llm.tasks import SPLITS, load_task, task_from_rows

# --- formats


def write_format(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    buffer = io.BytesIO()
    if ".jsonl" in name:
        buffer.write("\n".join(as_lines(rows)).encode())
    elif ".csv" in name:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        buffer.write(text.getvalue().encode())
    else:
        pq.write_table(pa.Table.from_pylist(rows), buffer)
    path = folder / name
    path.write_bytes(gzip.compress(buffer.getvalue()) if name.endswith(".gz") else buffer.getvalue())
    return path


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.csv", "d.csv.gz", "d.parquet", "d.parquet.gz"])
def test_every_format_reads_the_same(tmp_path: Path, name: str) -> None:
    rows = facts(60)
    task = load_task(config(write_format(tmp_path, name, rows)), seed=0)
    read = all_rows(task)
    assert [row["prompt"] for row in read] == [f"Shorten: {row['text']}" for row in rows]
    assert [row[FIELD + "summary"] for row in read] == [row["summary"] for row in rows]
    assert [row["prompt_id"] for row in read] == list(range(60))
    assert side_by_prompt(task) == side_by_prompt(task_from_rows(rows, config()))
    assert task.bad_rows == []
    assert task.fields == ["text", "summary"]


def test_types_are_kept_in_memory_and_parquet(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "score": i / 2, "tags": ["a"], "n": i} for i in range(60)]
    for task in (load_task(config(write_format(tmp_path, "d.parquet", rows)), 0), task_from_rows(iter(rows), config())):
        schema = task.splits["train"].schema
        assert schema.field("field/score").type == pa.float64()
        assert schema.field("field/tags").type == pa.list_(pa.string())
        assert schema.field("field/n").type == pa.int64()


def test_a_datasets_object_is_read_as_it_is_selected() -> None:
    rows = facts(80)
    dataset = datasets.Dataset.from_list(rows).select(range(79, 9, -1))
    task = task_from_rows(dataset, config(), name="mine")
    assert [row["prompt"] for row in all_rows(task)] == [f"Shorten: text {i}" for i in range(79, 9, -1)]
    assert task.name == "mine"


def test_rows_limits_what_is_read(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [*as_lines(facts(50)), "broken"])
    task = load_task(config(path, rows=40), seed=0)
    assert len(all_rows(task)) == 40
    assert task.bad_rows == []


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    lines = as_lines(facts(40))
    task = load_task(config(write_lines(tmp_path / "d.jsonl", ["", *lines[:5], "", "  ", *lines[5:], "oops"])), seed=0)
    assert [row["prompt_id"] for row in all_rows(task)] == list(range(40))
    assert list(reasons(task)) == [44]


# --- columns and template


def test_mapped_names_are_added_and_may_be_used_in_the_template() -> None:
    task = task_from_rows(facts(40), config(columns={"reference": "summary", "source": "text"}, prompt="{source} =>"))
    train = task.splits["train"]
    assert task.fields == ["text", "summary", "reference", "source"]
    assert train["field/reference"].to_pylist() == train["field/summary"].to_pylist()
    assert train["prompt"].to_pylist() == [f"{text} =>" for text in train["field/text"].to_pylist()]


def test_a_mapped_name_hides_a_column_of_that_name() -> None:
    rows = [{"a": f"a{i}", "b": f"b{i}"} for i in range(40)]
    train = task_from_rows(rows, config(prompt="{a}", columns={"a": "b", "b": "a"})).splits["train"]
    assert all(prompt.startswith("b") for prompt in train["prompt"].to_pylist())
    assert all(value.startswith("a") for value in train["field/b"].to_pylist())


def test_columns_named_like_the_policys_output_are_kept_from_rewards_until_renamed() -> None:
    rows = [{"text": f"t{i}", "completions": "old"} for i in range(40)]
    assert task_from_rows(rows, config()).fields == ["text"]
    assert task_from_rows(rows, config(columns={"old": "completions"})).fields == ["text", "old"]
    with pytest.raises(UserError, match="choose another"):
        task_from_rows(rows, config(columns={"completions": "text"}))


@pytest.mark.parametrize(
    "prompt", ['{"answer": 1} {text}', '{"a": {"b": "x"}} {text}', '{"a": {"b": "{text}"}}', "\\boxed{answer} {text}"]
)
def test_braces_that_are_text_give_their_remedy(prompt: str) -> None:
    with pytest.raises(UserError, match=r"^task\.prompt: .*braces that are text, as in JSON, are doubled: {{ and }}$"):
        task_from_rows(facts(60), config(prompt=prompt))
    doubled = re.sub(r"[{}]", lambda brace: brace[0] * 2, prompt).replace("{{text}}", "{text}")
    told = all_rows(task_from_rows(facts(60), config(prompt=doubled)))[5]["prompt"]
    assert told == prompt.replace("{text}", "text 5")


def test_braces_and_numbers_in_a_template() -> None:
    rows = [{"n": i if i % 2 else i + 0.5} for i in range(40)]
    prompts = [row["prompt"] for row in all_rows(task_from_rows(rows, config(prompt="{{n}} {n} }")))]
    assert prompts[:4] == ["{n} 0.5 }", "{n} 1 }", "{n} 2.5 }", "{n} 3 }"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"prompt": "{txet}"},
            r"task\.prompt: rows has no column 'txet'; did you mean 'text'\? \(columns: text, summary",
        ),
        ({"columns": {"reference": "sumary"}}, r"task\.columns\.reference: .*'sumary'; did you mean 'summary'\?"),
        ({"split": {"by": "summery"}}, r"task\.split\.by: .*did you mean 'summary'\?"),
        ({"prompt": "{tags}"}, "'tags' holds a list"),
        ({"split": {"by": "tags"}}, r"task\.split\.by: column 'tags' holds a list"),
        ({"system": "be short"}, r"task\.chat: true"),
    ],
)
def test_wrong_settings_name_what_to_change(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        task_from_rows([{**row, "tags": ["x"]} for row in facts(40)], config(**settings))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("dta.jsonl", r"no file .*dta\.jsonl; did you mean 'data\.jsonl'\?"),
        ("data.txt", r"must end in one of \.jsonl, \.csv, \.parquet"),
        ("bad.parquet", "not a readable Parquet file"),
        ("bad.jsonl.gz", r"cannot read .*bad\.jsonl\.gz"),
        ("cut.jsonl.gz", r"cannot read .*cut\.jsonl\.gz"),
        ("empty.jsonl", "there are no rows"),
        ("twice.csv", "two columns named 'text'"),
    ],
)
def test_unusable_files(tmp_path: Path, data: str, message: str) -> None:
    for name in ("data.jsonl", "data.txt", "bad.parquet", "bad.jsonl.gz"):
        (tmp_path / name).write_text("nonsense")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"x" * 1000)[:-12])
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "twice.csv").write_text("text,text\na,b\n")
    with pytest.raises(UserError, match=message):
        load_task(config(tmp_path / data), seed=0)


def test_an_unknown_generator_is_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'builtin:records'"):
        load_task(TaskConfig(data="builtin:record"), seed=0)


# --- Hub


def test_a_hub_data_set_is_read_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> datasets.Dataset:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(facts(80))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load_task(config("hub:owner/name", hub_subset="en", hub_split="validation", rows=60), seed=0)
    assert asked == [(("owner/name", "en"), {"split": "validation"})]
    assert side_by_prompt(task) == side_by_prompt(task_from_rows(facts(60), config()))


def test_an_unreachable_hub_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        UserError, match=r"could not load hub:owner/name .*Couldn't reach.*the network, or give a file$"
    ):
        load_task(config("hub:owner/name"), seed=0)


# --- sides


def test_a_row_keeps_its_side_when_rows_are_added_removed_or_reordered() -> None:
    rows = facts(300)
    before = side_by_prompt(task_from_rows(rows, config()))
    changed = rows[50:] + [{"text": f"new {i}", "summary": "s"} for i in range(100)]
    random.Random(1).shuffle(changed)
    after = side_by_prompt(task_from_rows(changed, config()))
    assert all(after[prompt] == side for prompt, side in before.items() if prompt in after)


def test_sides_are_the_same_in_every_process() -> None:
    # Written down once: a change of this list would move rows of users' data between sides.
    task = task_from_rows(facts(60), config())
    assert task.splits["test"]["prompt_id"].to_pylist() == [12, 16, 34, 44, 57]
    assert task.splits["tune"]["prompt_id"].to_pylist() == [2, 6, 31, 33]


def test_shares_are_about_as_configured() -> None:
    task = task_from_rows(facts(4000), config(split={"tune": 0.2, "test": 0.3}))
    shares = {side: task.splits[side].num_rows / 4000 for side in SPLITS}
    assert shares == pytest.approx({"train": 0.5, "tune": 0.2, "test": 0.3}, abs=0.03)


def test_equal_prompts_and_equal_keys_stay_together() -> None:
    rows = [{"text": f"t{i % 50}", "family": f"f{i % 30}"} for i in range(600)]
    task = task_from_rows(rows, config())
    assert sum(len(set(task.splits[side]["prompt"].to_pylist())) for side in SPLITS) == 50
    task = task_from_rows(rows, config(split={"by": "family"}))
    assert sum(len(set(task.splits[side]["field/family"].to_pylist())) for side in SPLITS) == 30


def test_a_fraction_in_another_row_does_not_move_a_row() -> None:
    rows: list[dict[str, Any]] = [{"n": i} for i in range(200)]
    before = side_by_prompt(task_from_rows(rows, config(prompt="{n}")))
    after = side_by_prompt(task_from_rows([*rows, {"n": 0.5}], config(prompt="{n}")))
    assert before.items() <= after.items()


def test_an_empty_side_says_what_to_change() -> None:
    with pytest.raises(UserError, match=r"side of rows is empty: 3 rows .*raise task\.split\."):
        task_from_rows(facts(3), config())


# --- bad rows


def test_bad_json_lines_are_reported_with_their_lines(tmp_path: Path) -> None:
    lines = [line.encode() for line in as_lines(facts(40))]
    lines[2:2] = [
        b'{"text": "cut',
        b"",
        b"[1, 2]",
        b'{"summary": "no text"}',
        b'{"text": null, "summary": "x"}',
        b'{"text": " ", "summary": "x"}',
        b'{"text": "\xff\xfe", "summary": "x"}',
        b'{"text": 7, "summary": "x"}',
        b'{"text": "\\ud800", "summary": "x"}',
        b'{"text": "fine"}',
        b"[" * 100_000,
    ]
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\r\n".join(lines))
    task = load_task(config(path), seed=0)
    found = reasons(task)
    assert list(found) == [3, 5, 6, 7, 8, 9, 10, 11, 13]
    assert found[3].startswith("not JSON: ")
    assert found[5] == "not a JSON object but a list"
    assert found[6] == found[7] == "column 'text' is missing or empty"
    assert found[8] == "empty prompt"
    assert found[9] == "bytes that are not UTF-8 text"
    assert found[10] == "column 'text' holds a number (7), where other rows hold text"
    assert found[11] == "column 'text' holds text ('\\ud800') that no table can store"
    assert str(task.bad_rows[0]).startswith(f"{path}:3: not JSON")
    rows = {row["prompt_id"]: row for row in all_rows(task)}
    assert len(rows) == 41
    assert rows[10]["prompt"] == "Shorten: fine"
    assert rows[10][FIELD + "summary"] is None


def test_bad_csv_rows_are_reported_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    good = b"".join(b"text %d,s\n" % i for i in range(40))
    path.write_bytes(
        b'text,summary\n"two\nlines",s\none cell\n\na,b,c\n,s\n\xff,s\n'
        + good
        + b'a,"b"c\nfine,s\n"open,s\nto the end\n'
    )
    found = reasons(load_task(config(path), seed=0))
    assert list(found) == [4, 6, 7, 8, 49, 51]
    assert found[4] == "1 cells where the header has 2"
    assert found[6] == "3 cells where the header has 2"
    assert found[7] == "column 'text' is missing or empty"
    assert found[8] == "bytes that are not UTF-8 text"
    assert found[49].startswith("broken CSV from here to line 49: ")
    assert found[51].startswith("broken CSV from here to line 52: ")


def test_a_csv_cell_may_be_long(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.csv", ["text,summary", *(f"{i}{'x' * 200_000},s" for i in range(10))])
    task = load_task(config(path, split={"tune": 0.3, "test": 0.4}), seed=0)
    assert len(all_rows(task)) == 10


def test_missing_values_in_parquet_are_counted_by_row(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = facts(40)
    rows[7]["text"] = None
    rows[9]["summary"] = None
    task = load_task(config(write_format(tmp_path, "d.parquet", rows)), seed=0)
    assert reasons(task) == {8: "column 'text' is missing or empty"}
    task = load_task(config(tmp_path / "d.parquet", columns={"reference": "summary"}), seed=0)
    assert reasons(task)[10] == "column 'summary' is missing or empty"


def test_rows_in_memory_that_are_no_rows() -> None:
    rows: list[Any] = [*facts(40), "text", {1: "x"}]
    task = task_from_rows(rows, config())
    assert reasons(task) == {41: "the row is a str, not a dict", 42: "a column's name is not text"}
    with pytest.raises(UserError, match=r"pass one split"):
        task_from_rows(datasets.DatasetDict({"train": datasets.Dataset.from_list(facts(3))}), config())


def test_bad_rows_may_be_fatal(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", ["x", *as_lines(facts(40)), "y"])
    with pytest.raises(UserError, match=r"2 bad rows: .*d\.jsonl:1: .*d\.jsonl:42: .*task\.on_bad_row: skip"):
        load_task(config(path, on_bad_row="fail"), seed=0)


def test_nothing_but_bad_rows_is_an_error(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", ["x"] * 5)
    with pytest.raises(UserError, match=r"every row is bad; 5 bad rows: .*; and 2 more"):
        load_task(config(path), seed=0)
    with pytest.raises(UserError, match=r"every row is bad; 5 bad rows: rows:1: empty prompt"):
        task_from_rows([{"text": ""}] * 5, config())


def test_values_that_no_table_holds_are_an_error() -> None:
    with pytest.raises(UserError, match=r"column 'big' holds a object that no table can store"):
        task_from_rows([{"text": f"t{i}", "big": object()} for i in range(40)], config())
    rows: list[dict[str, Any]] = [{"text": f"t{i}", "info": [i]} for i in range(40)]
    rows[5]["info"] = [object()]
    assert list(reasons(task_from_rows(rows, config()))) == [6]


def test_the_most_common_kind_of_a_column_wins() -> None:
    rows: list[dict[str, Any]] = [{"text": f"t{i}", "n": i, "info": {"n": i}} for i in range(40)]
    rows.insert(0, {"text": "odd", "n": "one", "info": {"n": 1}})
    rows.insert(1, {"text": "odd", "n": 1, "info": "one"})
    rows.insert(2, {"text": "even", "n": 0.5, "info": {"n": "one", "m": []}})
    assert reasons(task_from_rows(rows, config())) == {
        1: "column 'n' holds text ('one'), where other rows hold a number",
        2: "column 'info' holds text ('one'), where other rows hold an object",
    }


def test_rows_whose_prompts_are_on_both_sides_are_told() -> None:
    rows = [{"id": i, "text": f"t{i % 50}"} for i in range(100)]
    task = task_from_rows(rows, config(split={"by": "id"}))
    prompts = {side: task.splits[side]["prompt"].to_pylist() for side in SPLITS}
    shared = {side: sum(prompt in prompts["train"] for prompt in prompts[side]) for side in ("tune", "test")}
    assert min(shared.values()) > 0
    tune, test = (f"{count} of {len(prompts[side])} {side} rows" for side, count in shared.items())
    assert task.overlap().startswith(f"{tune} and {test} have a prompt that is in train too")
    assert task_from_rows(rows[:50], config(split={"by": "id"})).overlap() == ""
    assert task_from_rows(rows, config()).overlap() == ""
