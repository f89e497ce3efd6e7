"""JSON lines: written strictly, flushed line by line, read whole after a kill."""

import json
import os
from pathlib import Path
from typing import IO, Any

from rl_llm.errors import UserError
from rl_llm.values import to_json

# Evaluations that a run makes when its steps are done; a resumed run makes them again.
MADE_AT_THE_END = ("after", "supervised")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, none if it is not there yet; a last line cut short by a kill is left out.

    Raises:
        UserError: a line before the last one is broken, which no kill explains.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UserError(f"{path}:{number}: not valid JSON; repair or remove this line") from None
    return rows


class JsonlWriter:
    """Appends objects to a JSON-lines file, a line each, flushed at once so that readers and a kill find it whole.

    Args:
        path: the file; made when missing.
        last_step: lines whose `step` is above this are dropped on opening, and so is a broken last line: a resumed run
            writes them again. The default starts the file anew.
    """

    def __init__(self, path: Path, last_step: int = -1) -> None:
        kept = [row for row in read_jsonl(path) if row["step"] <= last_step and row.get("label") not in MADE_AT_THE_END]
        aside = path.with_name(path.name + ".tmp")
        aside.write_text("".join(to_json(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(aside, path)
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(to_json(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
