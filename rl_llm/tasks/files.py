"""Where rows come from: JSON lines, CSV and Parquet files (gzipped or not), Hub data sets and rows in memory.

Whatever the origin, the result is a `Source`: a typed table of the good rows and a `BadRow` for each of the others.
CSV cells stay text (an empty one is a missing value); the other formats keep the types they have.
"""

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rl_llm.config import TaskConfig
from rl_llm.errors import UserError, did_you_mean

HUB = "hub:"
FORMATS = (".jsonl", ".csv", ".parquet")

# Bytes that are not UTF-8 are decoded to lone surrogates, so that they spoil their own row and no other.
_UNDECODABLE = re.compile("[\ud800-\udfff]")
_NOT_UTF8 = "bytes that are not UTF-8 text"

Parsed = tuple[int, dict[str, Any] | str]
"""A row's line, and the row or the reason why it is none."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used. `line` counts from 1 (the row's number where the source has no lines)."""

    source: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.reason}"


def describe_bad_rows(bad_rows: list[BadRow], first: int = 3) -> str:
    """One line: how many there are and the first of them."""
    shown = "; ".join(str(bad) for bad in bad_rows[:first])
    more = f"; and {len(bad_rows) - first} more" if len(bad_rows) > first else ""
    return f"{len(bad_rows)} bad row{'s' if len(bad_rows) > 1 else ''}: {shown}{more}"


@dataclass
class Source:
    """Rows as read.

    Attributes:
        name: what `BadRow.source` says.
        table: the data's columns; [N] good rows.
        ordinals: place of each good row among all rows of the source, from 0; [N].
        lines: line of each row of the source by its ordinal, bad ones too.
        bad_rows: the rows that are not in `table`.
    """

    name: str
    table: pa.Table
    ordinals: list[int]
    lines: list[int]
    bad_rows: list[BadRow]


def read_source(config: TaskConfig) -> Source:
    """Read `config.data`, a path or `hub:owner/name`: at most `config.rows` rows.

    Raises:
        UserError: nothing there, an unknown format, or a file that is broken as a whole.
    """
    if config.data.startswith(HUB):
        return _from_table(config.data, _load_hub(config), config.rows)
    path = Path(config.data).expanduser()
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if not path.is_file():
        siblings = [file.name for file in path.parent.glob("*") if any(f in file.name for f in FORMATS)]
        hint = did_you_mean(path.name, siblings) if siblings else f"there is no data file in {path.parent}"
        raise UserError(f"task.data: no file {config.data}; {hint}")
    if suffix not in FORMATS:
        raise UserError(f"task.data: {config.data} must end in one of {', '.join(FORMATS)} (.gz may follow)")
    data = _read_bytes(path)
    if suffix == ".parquet":
        try:
            table = pq.read_table(pa.BufferReader(data))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"task.data: {config.data} is not a readable Parquet file: {error}") from None
        return _from_table(config.data, table, config.rows)
    text = data.decode("utf-8-sig", "surrogateescape")
    parsed = _parse_jsonl(text) if suffix == ".jsonl" else _parse_csv(text, config.data)
    return source_of(config.data, parsed, config.rows)


def rows_in_memory(rows: Any, name: str, limit: int | None) -> Source:
    """Read an iterable of dicts or a `datasets.Dataset`."""
    # Who holds a Dataset has imported datasets already; importing it here would cost everyone else seconds.
    datasets = sys.modules.get("datasets")
    if datasets and isinstance(rows, datasets.Dataset):
        return _from_table(name, rows.with_format("arrow")[:], limit)
    if isinstance(rows, Mapping):
        kind = type(rows).__name__
        raise UserError(f"{name} is a {kind}; pass one split of it, e.g. dataset['train'], or a list of dicts")
    return source_of(name, enumerate(map(_check_row, rows), start=1), limit)


def _check_row(row: Any) -> dict[str, Any] | str:
    if not isinstance(row, dict):
        return f"the row is a {type(row).__name__}, not a dict"
    return row if all(isinstance(column, str) for column in row) else "a column's name is not text"


def source_of(name: str, parsed: Iterable[Parsed], limit: int | None) -> Source:
    """Collect parsed rows into columns of one type each; a value of another type than most makes its row bad."""
    rows: list[dict[str, Any]] = []
    ordinals: list[int] = []
    lines: list[int] = []
    bad_rows: list[BadRow] = []
    for ordinal, (line, row) in enumerate(islice(parsed, limit)):
        lines.append(line)
        if isinstance(row, str):
            bad_rows.append(BadRow(name, line, row))
        else:
            rows.append(row)
            ordinals.append(ordinal)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    misfits: dict[int, str] = {}
    for column in columns:
        misfits |= _misfits(name, column, [row.get(column) for row in rows])
    bad_rows += [BadRow(name, lines[ordinals[i]], reason) for i, reason in misfits.items()]
    kept = [i for i in range(len(rows)) if i not in misfits]
    return Source(
        name=name,
        table=pa.table({column: _column(name, column, [rows[i].get(column) for i in kept]) for column in columns}),
        ordinals=[ordinals[i] for i in kept],
        lines=lines,
        bad_rows=bad_rows,
    )


def _from_table(name: str, table: pa.Table, limit: int | None) -> Source:
    _refuse_duplicates(name, table.column_names)
    table = table.slice(0, limit).replace_schema_metadata(None)
    return Source(name, table, list(range(table.num_rows)), list(range(1, table.num_rows + 1)), [])


def _load_hub(config: TaskConfig) -> pa.Table:
    import datasets

    name = config.data.removeprefix(HUB)
    # Network, cache, access rights and several parsers may fail in there, each with exceptions of its own.
    try:
        dataset = datasets.load_dataset(name, config.hub_subset, split=config.hub_split)
    except Exception as error:
        cause = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"task.data: could not load {config.data} (subset {config.hub_subset}, split {config.hub_split}): {cause}; "
            f"check the name, task.hub_subset, task.hub_split and the network, or give a file"
        ) from None
    return dataset.with_format("arrow")[: config.rows]


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"task.data: cannot read {path}: {error}") from None


def _parse_jsonl(text: str) -> Iterator[Parsed]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _parse_json(line)


def _parse_json(line: str) -> dict[str, Any] | str:
    if _UNDECODABLE.search(line):
        return _NOT_UTF8
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return row if isinstance(row, dict) else f"not a JSON object but {_kind(row)}"


def _parse_csv(text: str, name: str) -> Iterator[Parsed]:
    # The module's own limit of 128 kB a cell is below what a long document needs.
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    # Strict: a stray quote is an error where it stands instead of a cell that runs on unseen.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # An open quote swallows the lines up to the next one, so the whole stretch is named.
            cells = []
            problem = f"broken CSV from here to line {reader.line_num}: {error}"
            if header is None:
                raise UserError(f"{name}:{line}: {problem}") from None
            yield line, problem
        if not cells:
            continue
        if header is None:
            header = cells
            _refuse_duplicates(name, header)
            if _UNDECODABLE.search("".join(header)):
                raise UserError(f"{name}: the header has {_NOT_UTF8}; save the file as UTF-8")
        elif len(cells) != len(header):
            yield line, f"{len(cells)} cells where the header has {len(header)}"
        elif _UNDECODABLE.search("".join(cells)):
            yield line, _NOT_UTF8
        else:
            yield line, {column: cell or None for column, cell in zip(header, cells, strict=True)}


def _refuse_duplicates(name: str, columns: list[str]) -> None:
    twice = [column for column, count in Counter(columns).items() if count > 1]
    if twice:
        raise UserError(f"{name} has two columns named {twice[0]!r}; rename one")


def _misfits(name: str, column: str, values: list[Any]) -> dict[int, str]:
    """Places of the values that cannot share a column with the most common kind, each with the reason."""
    if _array(values) is not None:
        return {}
    kinds = [None if value is None else _kind(value) for value in values]
    common = Counter(kind for kind in kinds if kind is not None).most_common(1)[0][0]
    candidates = (value for value, kind in zip(values, kinds, strict=True) if kind == common)
    example = next((value for value in candidates if _array([value]) is not None), None)
    if example is None:
        raise UserError(f"{name}: column {column!r} holds {common} that no table can store; remove or convert it")
    return {
        i: f"column {column!r} holds {_kind(value)} ({value!r:.40}) that does not fit the {common} of other rows"
        for i, value in enumerate(values)
        if _array([example, value]) is None
    }


def _column(name: str, column: str, values: list[Any]) -> pa.Array:
    array = _array(values)
    if array is None:
        raise UserError(f"{name}: column {column!r} differs in structure from row to row; make it alike, or remove it")
    # Parquet, which rollouts are written to, has no type for an object without keys.
    return pa.array([_null_empty(value) for value in values]) if _has_empty_object(array.type) else array


def _array(values: list[Any]) -> pa.Array | None:
    try:
        return pa.array(values)
    except (pa.ArrowException, ValueError, OverflowError):
        return None


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true/false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, list):
        kinds = sorted({_kind(item) for item in value if item is not None})
        return f"a list of {' and '.join(kinds)}" if kinds else "an empty list"
    if isinstance(value, dict):
        return "an object with " + ", ".join(f"{key}: {_kind(value[key])}" for key in sorted(value))
    return "null" if value is None else f"a {type(value).__name__}"


def _has_empty_object(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind) and kind.num_fields == 0:
        return True
    return any(_has_empty_object(kind.field(i).type) for i in range(kind.num_fields))


def _null_empty(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _null_empty(item) for key, item in value.items()} or None
    return [_null_empty(item) for item in value] if isinstance(value, list) else value
