"""JSON lines: written strictly, flushed line by line, read whole after a kill; and files of one object."""

import json
import os
from pathlib import Path
from typing import Any

from rl_llm.errors import UserError
from rl_llm.files import replacing, sync
from rl_llm.values import to_json

# Evaluations that a run makes when its steps are done; a resumed run makes them again.
MADE_AT_THE_END = ("after", "supervised", "soup")


def _line(row: dict[str, Any]) -> bytes:
    # A lone surrogate, which UTF-8 has no bytes for, becomes the escape that JSON has for it.
    return (to_json(row) + "\n").encode("utf-8", "backslashreplace")


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


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no file, or it is broken."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


class JsonlWriter:
    """Appends objects to a JSON-lines file, a line each, flushed at once so that readers and a kill find it whole.

    Args:
        path: the file; made when missing.
        last_step: lines whose `step` is above this are dropped on opening, and so is a broken last line: a resumed run
            writes them again. The default starts the file anew.
    """

    def __init__(self, path: Path, last_step: int = -1) -> None:
        kept = [row for row in read_jsonl(path) if row["step"] <= last_step and row.get("label") not in MADE_AT_THE_END]
        with replacing(path) as aside:
            aside.write_bytes(b"".join(_line(row) for row in kept))
        self._path, self._file = path, path.open("ab", buffering=0)

    def write(self, row: dict[str, Any]) -> None:
        """Append a whole line, or where there is no room for it nothing."""
        line, start = _line(row), self._file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[self._file.write(line) :]
        except BaseException:
            self._file.truncate(start)
            raise

    def sync(self) -> None:
        """Have all that was written on disk."""
        sync(self._path)

    def close(self) -> None:
        self._file.close()
