"""A search as its user holds it."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from rl_llm.errors import UserError, option

SEARCH = "search.yaml"


class Search:
    """A search's directory.

    Raises:
        UserError: there is no search at `path`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / SEARCH).is_file():
            of_one = f"give the {option('output')} of a search"
            raise UserError(f"{self.path} is no search directory (no {SEARCH} in it); {of_one}")

    @cached_property
    def summary(self) -> dict[str, Any]:
        """summary.json; empty while the search is going on or after it was killed."""
        try:
            return dict(json.loads((self.path / "summary.json").read_bytes()))
        except (FileNotFoundError, ValueError):
            return {}

    def __repr__(self) -> str:
        return f"Search({str(self.path)!r}, {self.summary.get('status', 'running or killed')})"
