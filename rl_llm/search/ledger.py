"""decisions.jsonl: what a search has decided, and on what; a line is on disk before anybody acts on it."""

import json
from pathlib import Path
from typing import Any

from rl_llm.files import replacing, sync
from rl_llm.runs.jsonl import read_jsonl
from rl_llm.values import to_json

DECISIONS = "decisions.jsonl"


class Ledger:
    """The lines of a search, in their order. A last line that a kill cut short was not acted on, and is dropped.

    Args:
        path: the file; None keeps the lines in memory, for a search that is only replayed.

    Raises:
        UserError: a line before the last one is broken.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = [] if path is None else read_jsonl(path)
        if path is not None:
            with replacing(path) as aside:
                aside.write_text("".join(to_json(line) + "\n" for line in self.lines), encoding="utf-8")

    def write(self, line: dict[str, Any]) -> dict[str, Any]:
        """Add a line, on disk when this returns; returns it as it will be read again."""
        text = to_json(line)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
            sync(self.path)
        self.lines.append(json.loads(text))
        return self.lines[-1]
