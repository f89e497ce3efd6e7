from itertools import islice

import numpy as np
import pytest
from task_factory import all_rows

from rl_llm.config import TaskConfig
from rl_llm.tasks import load_task
from rl_llm.tasks.records import CITIES, JOBS, NAMES, NOTES, OMISSIONS, YEARS, generate, record


def test_the_generated_task_has_no_end_and_each_row_stands_alone() -> None:
    assert list(islice(generate(3), 50)) == [record(3, i) for i in range(50)]
    assert record(3, 10**12)["prompt"].startswith("name ")
    assert record(3, 0) != record(4, 0)
    small, large = (load_task(TaskConfig(rows=rows), seed=1) for rows in (200, 400))
    assert all_rows(small) == [row for row in all_rows(large) if row["prompt_id"] < 200]


def test_the_generated_task_is_the_same_everywhere() -> None:
    assert record(0, 0) == {
        "prompt": "name emil ; job singer ; city rome ; born 1990 =>",
        "name": "emil",
        "job": "singer",
        "city": "rome",
        "born": 1990,
        "reference": [
            "emil is a singer in rome , born in 1990 .",
            "emil , born in 1990 , is a singer in rome .",
            "born in 1990 , emil is a singer in rome .",
            "the singer emil from rome was born in 1990 .",
        ],
        "demonstration": "emil is in rome , the city of rome , born in 1990 , yes in 1990 .",
    }


def test_generated_prompts_determine_their_references() -> None:
    rows = list(islice(generate(0), 6000))
    references = {}
    for row in rows:
        assert references.setdefault(row["prompt"], row["reference"]) == row["reference"]
    assert len(references) > 0.98 * len(rows)
    assert len(NAMES) * len(JOBS) * len(CITIES) * len(YEARS) > 100_000
    assert all(row["prompt"].isascii() and row["demonstration"].isascii() for row in rows)


def test_demonstrations_are_wordy_yet_the_concise_form_is_among_them() -> None:
    rows = list(islice(generate(0), 4000))
    whole = [text for text in (row["demonstration"] for row in rows) if " is a " in text and " born " in text]
    lengths = [len(text.split()) for text in whole if " in " in text.replace("born in", "").replace("yes in", "")]
    concise = [len(row["reference"][0].split()) for row in rows]
    assert 1.5 <= np.mean(lengths) / np.mean(concise) <= 2.5
    assert max(lengths) <= 40
    assert all(8 <= len(text.split()) <= 14 for row in rows for text in row["reference"])
    assert any(row["demonstration"] == row["reference"][0] for row in rows)


def test_demonstrations_are_notes_now_and_then() -> None:
    demonstrations = [row["demonstration"] for row in islice(generate(0), 4000)]
    notes = [text for text in demonstrations if " : " in text]
    assert len(notes) / len(demonstrations) == pytest.approx(NOTES, abs=0.05)
    assert all(text.endswith(" .") and "  " not in text and " , ," not in text for text in demonstrations)
    assert not any(" is a " in text or "born in" in text for text in notes)


def test_demonstrations_leave_facts_out_by_the_habits_of_a_city_and_state_no_other() -> None:
    left_out: dict[str, list[list[bool]]] = {}
    for row in islice(generate(0), 12_000):
        words = set(row["demonstration"].split())
        assert row["name"] in words
        stated = words & {*JOBS, *map(str, YEARS)}  # a city's name may be a word: nice
        assert stated <= {row["job"], str(row["born"])}
        left_out.setdefault(row["city"], []).append([str(row[key]) not in words for key in ("job", "city", "born")])
    shares = np.array([np.mean(rows, axis=0) for rows in left_out.values()])
    assert shares.mean() == pytest.approx(OMISSIONS / 2, abs=0.08)
    assert shares.min() < 0.1 * OMISSIONS
    assert shares.max() > 0.9 * OMISSIONS


def test_the_default_task_is_the_generated_one() -> None:
    task = load_task(TaskConfig(), seed=0)
    assert task.name == "builtin:records"
    assert sum(table.num_rows for table in task.splits.values()) == 6000
    assert task.bad_rows == []
    assert task.fields == ["prompt", "name", "job", "city", "born", "reference", "demonstration"]
    assert all(len(targets) == 4 for _, targets in task.training_texts("reference"))
