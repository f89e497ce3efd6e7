"""Small tasks for tests, and ways to look into them."""

import json
from pathlib import Path
from typing import Any

from rl_llm.config import TaskConfig
from rl_llm.tasks import SPLITS, Task


def facts(count: int) -> list[dict[str, Any]]:
    return [{"text": f"text {i}", "summary": f'short, "{i}"\nand more'} for i in range(count)]


def config(data: Path | str = "unused", **settings: Any) -> TaskConfig:
    return TaskConfig(**{"data": str(data), "prompt": "Shorten: {text}", **settings})


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def as_lines(rows: list[dict[str, Any]]) -> list[str]:
    return [json.dumps(row) for row in rows]


def all_rows(task: Task) -> list[dict[str, Any]]:
    rows = [{"side": side, **row} for side in SPLITS for row in task.splits[side].to_pylist()]
    return sorted(rows, key=lambda row: row["prompt_id"])


def side_by_prompt(task: Task) -> dict[str, str]:
    return {row["prompt"]: row["side"] for row in all_rows(task)}


def reasons(task: Task) -> dict[int, str]:
    return {bad.line: bad.reason for bad in task.bad_rows}
