"""Values of a component that are kept, and used again for rows that it is given the same inputs for.

Any number of workers share a folder without locks: each appends lines to a file of its own, and reads on in the files
of the others where it meets a row that it does not know. A killed worker leaves a torn line at most, which nobody
writes on behind, and what two workers have both computed is the same value.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from rl_llm.config import ComponentConfig
from rl_llm.rewards.component import FAILED, Component, Scores
from rl_llm.rewards.hooks import Log
from rl_llm.table import NOT_APPLICABLE, OK

log = logging.getLogger(__name__)

SCORES = "scores"
"""The folder of a run, or of a search, that caches lie in."""


def cache_folders(scores: Path, components: Mapping[str, ComponentConfig], code: Mapping[str, str]) -> dict[str, Path]:
    """The folder in `scores` of each component with `cache`, by name; with other arguments or code it is another one.

    Args:
        code: digests, see `Origin`. A component without one has no folder: nobody could tell when its values are stale.
    """
    folders = {}
    for name, spec in components.items():
        if spec.cache and code.get(name):
            digest = _digest([spec.use, json.dumps(spec.args, sort_keys=True, default=repr), code[name]]).hex()
            readable = re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)[:60]
            folders[name] = scores.absolute() / f"{readable}-{digest}"
    return folders


class Cache:
    """The values of a component in a folder; where it cannot be written, they are kept in this process alone."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._own = folder, f"{uuid.uuid4().hex}.jsonl"
        self._values: dict[bytes, float | None] = {}
        self._read: dict[str, int] = {}
        self._writes = True
        self._follow()

    def score(self, component: Component, table: pa.Table, max_steps: int = 0) -> Scores:
        """As `Component.score`; rows that are known are not asked, and of equal ones the first. Failures are not kept.

        The share of rows that were not asked is logged as "cached".
        """
        keys = _keys(component.inputs_of(table), table.num_rows)
        if not self._values.keys() >= set(keys):
            self._follow()
        first: dict[bytes, int] = {}
        for row, key in enumerate(keys):
            if key not in self._values:
                first.setdefault(key, row)
        asked = component.score(table.take(pa.array(first.values(), pa.int64())), max_steps)
        at = {key: place for place, key in enumerate(first)}
        self._keep({key: asked.values[place] for key, place in at.items() if asked.status[place] not in FAILED})
        shares = Log()
        shares.log_extra("cached", [first.get(key) != row for row, key in enumerate(keys)])
        return Scores(
            [asked.values[at[key]] if key in at else self._values[key] for key in keys],
            [asked.status[at[key]] if key in at else self._status(key) for key in keys],
            asked.seconds,
            asked.errors,
            {row: asked.retried[at[key]] for row, key in enumerate(keys) if at.get(key) in asked.retried},
            shares.logged,
        )

    def _status(self, key: bytes) -> str:
        return NOT_APPLICABLE if self._values[key] is None else OK

    def _keep(self, values: Mapping[bytes, float | None]) -> None:
        self._values.update(values)
        if not (values and self._writes):
            return
        lines = "".join(json.dumps([key.hex(), value]) + "\n" for key, value in values.items())
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Opened for each batch: storage that nodes share shows others what has been closed.
            with (self._folder / self._own).open("ab") as file:
                file.write(lines.encode())
        except OSError as error:
            self._writes = False  # what followed a torn line could not be read
            log.warning("scores are no longer kept in %s: %s", self._folder, error)

    def _follow(self) -> None:
        """Read what others have written since. What cannot be read is not known, and so asked."""
        names: list[str] = []
        with contextlib.suppress(OSError):
            names = os.listdir(self._folder)
        for name in names:
            if name.endswith(".jsonl") and name != self._own:
                with contextlib.suppress(OSError):
                    self._read_on(name)

    def _read_on(self, name: str) -> None:
        path, start = self._folder / name, self._read.get(name, 0)
        if path.stat().st_size <= start:
            return
        with path.open("rb") as file:
            file.seek(start)
            data = file.read()
        end = data.rfind(b"\n") + 1  # a line without an end waits for it
        self._values.update(_parsed(data[:end].splitlines()))
        self._read[name] = start + end


def _parsed(lines: Iterable[bytes]) -> dict[bytes, float | None]:
    """The values in whole lines, without those that are damaged."""
    values = {}
    for line in lines:
        with contextlib.suppress(ValueError, TypeError):
            key, value = json.loads(line)
            if value is None or isinstance(value, float):
                values[bytes.fromhex(key)] = value
    return values


def _keys(inputs: Mapping[str, list[Any]], rows: int) -> list[bytes]:
    """A digest of what a component is given for each row."""
    names = sorted(inputs)
    return [_digest([(name, inputs[name][row]) for name in names]) for row in range(rows)]


def _digest(values: Any) -> bytes:
    # Python's own form of plain values tells apart what JSON does not, such as a date and its text.
    return hashlib.blake2b(repr(values).encode(), digest_size=16).digest()
