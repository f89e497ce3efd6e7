"""Where rows come from: JSON lines, CSV and Parquet files (gzipped or not), Hub data sets and rows in memory.

Whatever the origin, the result is a `Source`: a table of the good rows and a `BadRow` for each of the others. CSV cells
stay text; an empty one, and pandas' `NaN` and `nan`, are missing values. In the other formats each value keeps the type
it has in its row, and what is no finite number is a missing value.
"""

import contextlib
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
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from rl_llm.columns import column_of, normal_column
from rl_llm.config import TaskConfig
from rl_llm.errors import UserError, did_you_mean
from rl_llm.values import kind_of, plain

HUB = "hub:"
FORMATS = (".jsonl", ".csv", ".parquet")
MISSING = ("", "NaN", "nan")
"""Cells of a CSV file that hold no value."""

# Bytes that are not UTF-8 are decoded to lone surrogates, so that they spoil their own row and no other.
_UNDECODABLE = re.compile("[\ud800-\udfff]")
_NOT_UTF8 = "bytes that are not UTF-8 text"

Parsed = tuple[int, dict[str, Any] | str]
"""A row's line, and the row or the reason why it is none."""

Column: TypeAlias = pa.ChunkedArray | list[Any]
"""A column as a source has it: of Arrow, or the rows' values as `plain` makes them."""


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
        table: the data's columns as `rl_llm.columns` has them; [N] good rows.
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
    """Read an iterable of dicts, a `datasets.Dataset`, or a frame of pandas or another library that speaks Arrow."""
    # Who holds a Dataset has imported datasets already; importing it here would cost everyone else seconds.
    datasets, pandas = sys.modules.get("datasets"), sys.modules.get("pandas")
    if datasets and isinstance(rows, datasets.Dataset):
        return _from_table(name, rows.with_format("arrow")[:], limit)
    if pandas and isinstance(rows, pandas.DataFrame):
        return _from_pandas(name, rows, limit)
    if hasattr(rows, "__arrow_c_stream__"):
        return _from_table(name, pa.table(rows), limit)
    if isinstance(rows, Mapping):
        kind = type(rows).__name__
        raise UserError(f"{name} is a {kind}; pass one split of it, e.g. dataset['train'], or a list of dicts")
    return source_of(name, enumerate(map(_check_row, rows), start=1), limit)


def _check_row(row: Any) -> dict[str, Any] | str:
    if not isinstance(row, dict):
        return f"the row is a {type(row).__name__}, not a dict"
    return row if all(isinstance(column, str) for column in row) else "a column's name is not text"


def source_of(name: str, parsed: Iterable[Parsed], limit: int | None) -> Source:
    """Collect parsed rows into columns; a value of another kind than most makes its row bad."""
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
    names = dict.fromkeys(column for row in rows for column in row)
    columns = {column: [plain(row.get(column)) for row in rows] for column in names}
    return _gather(name, columns, ordinals, lines, bad_rows)


def _from_table(name: str, table: pa.Table, limit: int | None) -> Source:
    _refuse_duplicates(name, table.column_names)
    table = table.slice(0, limit)
    ordinals, lines = list(range(table.num_rows)), list(range(1, table.num_rows + 1))
    return _gather(name, {column: table[column] for column in table.column_names}, ordinals, lines, [])


def _from_pandas(name: str, frame: Any, limit: int | None) -> Source:
    for column in frame.columns:
        if not isinstance(column, str):
            raise UserError(f"{name}: the column name {column!r} is not text; rename the columns")
    _refuse_duplicates(name, list(frame.columns))
    frame = frame.iloc[:limit]
    ordinals, lines = list(range(len(frame))), list(range(1, len(frame) + 1))
    return _gather(name, {column: _series(frame[column]) for column in frame.columns}, ordinals, lines, [])


def _series(series: Any) -> Column:
    # Arrow would make one type of an object column, fractions of its whole numbers say, or refuse it.
    if series.dtype != object:
        with contextlib.suppress(pa.ArrowException):
            return pa.Table.from_pandas(series.to_frame(), preserve_index=False).column(0)
    return [plain(value) for value in series]


def _gather(
    name: str, columns: Mapping[str, Column], ordinals: list[int], lines: list[int], bad_rows: list[BadRow]
) -> Source:
    misfits: dict[int, str] = {}
    for column, values in columns.items():
        if isinstance(values, list):
            misfits |= _misfits(name, column, values)
    kept = [i for i in range(len(ordinals)) if i not in misfits]
    table = {}
    for column, values in columns.items():
        if isinstance(values, list):
            table[column] = column_of([values[i] for i in kept])
        else:
            table[column] = normal_column(values).take(pa.array(kept, pa.int64()))
    bad_rows = [*bad_rows, *(BadRow(name, lines[ordinals[i]], reason) for i, reason in misfits.items())]
    return Source(name, pa.table(table), [ordinals[i] for i in kept], lines, bad_rows)


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
    return row if isinstance(row, dict) else f"not a JSON object but {kind_of(row)}"


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
            yield line, {column: None if cell in MISSING else cell for column, cell in zip(header, cells, strict=True)}


def _refuse_duplicates(name: str, columns: list[str]) -> None:
    twice = [column for column, count in Counter(columns).items() if count > 1]
    if twice:
        raise UserError(f"{name} has two columns named {twice[0]!r}; rename one")


def _misfits(name: str, column: str, values: list[Any]) -> dict[int, str]:
    """Places of the values that are of another kind than most, or that no column holds, each with the reason."""
    kinds = {i: kind_of(value) for i, value in enumerate(values) if value is not None}
    if not kinds:
        return {}
    [(common, count)] = Counter(kinds.values()).most_common(1)
    out = {i: f", where other rows hold {common}" for i, kind in kinds.items() if kind != common}
    if not _fits([value for i, value in enumerate(values) if i not in out]):
        unfit = [i for i, value in enumerate(values) if i not in out and not _fits([value])]
        if len(unfit) == count:
            raise UserError(f"{name}: column {column!r} holds {common} that no table can store; remove or convert it")
        out |= dict.fromkeys(unfit, " that no table can store")
    return {i: f"column {column!r} holds {kinds[i]} ({values[i]!r:.40}){reason}" for i, reason in out.items()}


def _fits(values: list[Any]) -> bool:
    try:
        column_of(values)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
