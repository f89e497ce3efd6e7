"""Digests of what a run is made from: they change with what matters, and with nothing else."""

import functools
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from rl_llm.config import TaskConfig
from rl_llm.launch import origin
from rl_llm.launch.origin import code_digest, file_digest, model_digests
from rl_llm.launch.warm_start import _fingerprint
from rl_llm.tasks import load_task, task_from_rows

SPLIT = {"by": "id", "tune": 0.2, "test": 0.2}


def test_digest_of_rows_is_of_what_they_hold(tmp_path: Path) -> None:
    def digest(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        file = tmp_path / name
        file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return load_task(TaskConfig(data=str(file), prompt="{text}", split=SPLIT), seed=0).digest()

    rows = tiny.rows()
    first = digest(rows)
    assert digest([dict(reversed(row.items())) for row in rows], "again.jsonl.gz") == first
    assert task_from_rows(rows, TaskConfig(prompt="{text}", split=SPLIT)).digest() == first
    assert digest([{**row, "colour": "grey"} if row["id"] == "7" else row for row in rows]) != first
    assert digest([*rows, {**rows[0], "id": "48"}]) != first
    assert digest([rows[1], rows[0], *rows[2:]]) != first


def test_digest_of_a_large_file_sees_a_change_all_over_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origin, "BLOCK", 16)
    monkeypatch.setattr(origin, "BLOCKS", 4)
    file = tmp_path / "weights"

    def digest(content: bytes) -> str:
        file.write_bytes(content)
        return file_digest(file)

    small, large = bytes(64), bytes(1000)
    for where in range(64):
        assert digest(small[:where] + b"x" + small[where + 1 :]) != digest(small)
    assert digest(b"x" * 1000) != digest(large) != digest(large + bytes(1))
    assert digest(b"x" + large[1:]) != digest(large) != digest(large[:-1] + b"x")
    os.utime(file, (0, 0))
    assert file_digest(file) == digest(file.read_bytes())


def test_digests_of_a_model_are_of_the_files_that_make_it(tmp_path: Path) -> None:
    kept = ["model-00001-of-00002.safetensors", "config.json", "tokenizer.json", "special_tokens_map.json", "vocab.txt"]
    for name in [*kept, "README.md", "optimizer.pt", "training_args.bin"]:
        (tmp_path / name).write_text(name)
    assert sorted(model_digests(str(tmp_path))) == sorted(kept)


def test_digests_of_an_adapter_are_of_what_it_was_made_for_too(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    (base / "model.safetensors").write_bytes(b"weights")
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    before = model_digests(str(adapter)), _fingerprint(str(adapter))
    assert list(before[0]) == ["adapter_config.json", "base/model.safetensors"]
    (base / "model.safetensors").write_bytes(b"other weights")
    assert model_digests(str(adapter)) != before[0]
    assert _fingerprint(str(adapter)) != before[1]


def test_digests_of_a_model_of_the_hub_are_of_what_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(origin, "try_to_load_from_cache", lambda model, file: str(tmp_path / file))
    assert list(model_digests("owner/model")) == ["config.json"]
    monkeypatch.setattr(origin, "try_to_load_from_cache", lambda model, file: None)
    assert model_digests("owner/model") == {}


def typed(source: str) -> Callable[..., Any]:
    """A function as one typed into a prompt, of which no text is kept."""
    space: dict[str, Any] = {}
    exec(source, space)
    return space["score"]


class Scorer:
    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        return [1.0] * len(completions)


def test_digest_of_code_given_in_python_is_of_its_text_or_what_it_was_compiled_to() -> None:
    def digest(function: Callable[..., Any]) -> str:
        return code_digest("function:score", function)

    one, two = (f"def score(completions, **columns):\n    return [{n} for c in completions]\n" for n in (1.0, 2.0))
    assert digest(typed(one)) == digest(typed("\n\n" + one)) != digest(typed(two))
    assert digest(functools.partial(typed(one), k=1)) == digest(typed(one))
    assert digest(Scorer()) == digest(Scorer) not in (digest(tiny.rows), "")
    assert digest(len) == ""


def test_digest_of_named_code_is_of_its_file_and_of_ours_the_version() -> None:
    assert code_digest("tiny_rewards:match") == code_digest("tiny_rewards:hanging") != ""
    assert code_digest("chrf") == code_digest("length")
    assert code_digest("chrf").startswith("rl-llm ")
