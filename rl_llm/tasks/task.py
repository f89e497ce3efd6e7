"""A task: prompts with their fields, divided into train, tune and test.

    source -> columns (mapped) -> prompts (template or messages) -> splits (hash) -> prompt_ids (tokenizer)

A row that cannot be used at any of these stations becomes a `BadRow`: skipped or fatal as configured, never lost.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from rl_llm.columns import values_of
from rl_llm.config import SplitConfig, TaskConfig
from rl_llm.errors import UserError, did_you_mean
from rl_llm.table import FIELD, mark_conversational, ragged
from rl_llm.tasks import records
from rl_llm.tasks.encoding import encode_messages, encode_texts
from rl_llm.tasks.files import BadRow, Source, describe_bad_rows, read_source, rows_in_memory, source_of
from rl_llm.tasks.prompts import BRACES, PromptBuilder, rename_columns, require_scalar, template_columns
from rl_llm.values import as_text, texts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "tune", "test")
BUILTIN = "builtin:"
DEFAULT_ROWS = 6000

# Held at once as Python's own values, which take many times the room of a table.
DIGESTED_ROWS = 10_000

# Arguments of a reward function that mean the policy's own output; data under these names needs another one.
RESERVED = ("prompts", "completions", "completion_ids")


@dataclass
class Task:
    """Prompts to act on.

    Attributes:
        name: the file, Hub data set or generator.
        conversational: prompts are lists of messages, for the policy and for rewards.
        splits: a table for each of "train", "tune" and "test" (or one, "all"), in the order of the source. Columns:
            `prompt_id` int64 (the row's place in the source, from 0), `prompt` string (messages as JSON in a
            conversational task), `field/<name>` for each column of the data and each mapped one, and after `tokenize`
            `prompt_ids` list<int32>.
        bad_rows: the rows that are in no split, by line.
        fields: names under which rewards see the data: its columns and the mapped ones, but for `RESERVED`.
    """

    name: str
    conversational: bool
    splits: dict[str, pa.Table]
    bad_rows: list[BadRow]
    fields: list[str]
    config: TaskConfig
    lines: list[int]

    def tokenize(self, tokenizer: "PreTrainedTokenizerBase", continued: bool = True) -> None:
        """Add `prompt_ids` to each split, in place; rows over `max_prompt_tokens` become bad rows.

        Args:
            continued: `Policy.continues`: no end token that the tokenizer or its chat template adds closes a prompt.

        Raises:
            UserError: messages without a chat template or with what it does not take, a bad row with
                `on_bad_row: fail`, or a split left empty.
        """
        splits: dict[str, pa.Table] = {}
        bad_rows = list(self.bad_rows)
        for side, table in self.splits.items():
            encoded = self._encode(tokenizer, table["prompt"].to_pylist(), continued)
            for prompt_id, ids in zip(table["prompt_id"].to_pylist(), encoded, strict=True):
                if isinstance(ids, str):
                    bad_rows.append(BadRow(self.name, self.lines[prompt_id], ids))
            kept = table.filter(pa.array([not isinstance(ids, str) for ids in encoded]))
            if "prompt_ids" in kept.column_names:
                kept = kept.drop_columns("prompt_ids")
            prompt_ids = pa.array([ids for ids in encoded if not isinstance(ids, str)], type=pa.list_(pa.int32()))
            splits[side] = kept.append_column("prompt_ids", prompt_ids)
        _note_bad_rows(bad_rows, self.config)
        for side, table in splits.items():
            if not table.num_rows:
                raise UserError(
                    f"no row of {self.name} is left in {side}: {describe_bad_rows(bad_rows)}; "
                    f"mend the rows or raise task.max_prompt_tokens ({self.config.max_prompt_tokens})"
                )
        self.splits, self.bad_rows = splits, bad_rows

    def digest(self) -> str:
        """Of the rows on each side: their places, prompts and fields. Tokens are left out."""
        digest = hashlib.blake2b(digest_size=16)
        for side, table in self.splits.items():
            for name in ("prompt_id", "prompt", *sorted(FIELD + name for name in self.fields)):
                for start in range(0, table.num_rows, DIGESTED_ROWS):
                    values = table[name].slice(start, DIGESTED_ROWS).to_pylist()
                    digest.update(json.dumps([side, name, values], sort_keys=True, default=repr).encode())
        return digest.hexdigest()

    def training_texts(self, target: str) -> list[tuple[str, list[str]]]:
        """`(prompt, targets)` of each train row that has a target, for training a tokenizer or a warm start.

        Args:
            target: a field with a text a row, or several, as `texts_of` reads them.
        """
        if target not in self.fields:
            raise UserError(f"{self.name} has no field {target!r}; {did_you_mean(target, self.fields)}")
        rows = zip(self.splits["train"]["prompt"].to_pylist(), self._texts(target), strict=True)
        texts = [(prompt, [text for text in targets if text]) for prompt, targets in rows if any(targets)]
        if not texts:
            raise UserError(f"field {target!r} of {self.name} is empty in every train row; name another target")
        return texts

    def targets(self, target: str) -> tuple[list[np.ndarray], list[list[str]]]:
        """Prompts (tokens) of the tokenized train split, and the texts to imitate that each row has in a field."""
        return ragged(self.splits["train"]["prompt_ids"]), self._texts(target)

    def _texts(self, target: str) -> list[list[str]]:
        train = self.splits["train"]
        texts = []
        for prompt_id, value in zip(train["prompt_id"].to_pylist(), values_of(train[FIELD + target]), strict=True):
            try:
                texts.append(texts_of(value))
            except ValueError as error:
                raise UserError(f"{self.place(prompt_id)}: the target {target!r} is {error}") from None
        return texts

    def place(self, prompt_id: int) -> str:
        """Where a row is, for messages: the source and the line."""
        return f"{self.name}:{self.lines[prompt_id]}"

    def overlap(self) -> str:
        """What to tell of held-out rows whose prompt is trained on too; empty where there is none."""
        if self.config.split.by == "prompt" or "train" not in self.splits:
            return ""
        trained = set(self.splits["train"]["prompt"].to_pylist())
        shared = {}
        for side in ("tune", "test"):
            prompts = self.splits[side]["prompt"].to_pylist()
            if count := sum(prompt in trained for prompt in prompts):
                shared[side] = f"{count} of {len(prompts)} {side} rows"
        if not shared:
            return ""
        return (
            f"{' and '.join(shared.values())} have a prompt that is in train too, so they are not held out; "
            f"task.split.by: prompt keeps equal prompts on one side (now: {self.config.split.by})"
        )

    def _encode(
        self, tokenizer: "PreTrainedTokenizerBase", prompts: list[str], continued: bool
    ) -> list[list[int] | str]:
        """Token ids of each prompt, or why it cannot be used."""
        encoded: list[list[int] | str]
        if self.conversational or self.config.chat:
            if not (tokenizer.chat_template or self.config.chat_args.get("chat_template")):
                remedy = "use a chat model" if self.conversational else "use a chat model, or set task.chat: false"
                raise UserError(f"{self.name} sends messages, but the tokenizer has no chat template; {remedy}")
            conversations = [
                json.loads(prompt) if self.conversational else [{"role": "user", "content": prompt}]
                for prompt in prompts
            ]
            encoded = encode_messages(tokenizer, conversations, self.config, continued)
        else:
            encoded = list(encode_texts(tokenizer, prompts, continued))
        limit = self.config.max_prompt_tokens
        for i, ids in enumerate(encoded):
            if not ids:
                encoded[i] = "the tokenizer makes no token of the prompt"
            elif not isinstance(ids, str) and len(ids) > limit:
                encoded[i] = f"the prompt has {len(ids)} tokens, task.max_prompt_tokens is {limit}"
        return encoded


def load_task(config: TaskConfig, seed: int) -> Task:
    """Read or generate the task that `config.data` names; `seed` matters to generated ones only.

    Raises:
        UserError: what the file, the mapping, the template or the splits lack; a bad row with `on_bad_row: fail`.
    """
    if not config.data.startswith(BUILTIN):
        return _build(read_source(config), config)
    if config.data != f"{BUILTIN}records":
        raise UserError(f"task.data: no generator {config.data!r}; did you mean '{BUILTIN}records'?")
    rows = enumerate(records.generate(seed), start=1)
    return _build(source_of(config.data, rows, config.rows or DEFAULT_ROWS), config)


def load_prompts(config: TaskConfig, rewarded: bool = True) -> Task:
    """Every row of the data under the one split "all"; raises as `load_task`.

    Args:
        rewarded: rewards will read the rows too. Else the mapped columns may be missing, and one that the template
            names may go by either name.
    """
    source = read_source(config)
    if not rewarded:
        there = source.table.column_names
        prompt = rename_columns(config.prompt, {new: old for new, old in config.columns.items() if old in there})
        config = config.model_copy(update={"prompt": prompt, "columns": {}})
    return _build(source, config, divide=False)


def task_from_rows(rows: Iterable[dict[str, Any]], config: TaskConfig, name: str = "rows") -> Task:
    """A task from rows in memory: dicts, a `datasets.Dataset` or a frame; `config.data` is not read.

    Raises:
        UserError: as `load_task`.
    """
    return _build(rows_in_memory(rows, name, config.rows), config)


def _build(source: Source, config: TaskConfig, divide: bool = True) -> Task:
    if not source.ordinals:
        found = f"every row is bad; {describe_bad_rows(source.bad_rows)}" if source.bad_rows else "there are no rows"
        raise UserError(f"{source.name}: {found}")
    columns = _columns(source, config)
    for name in template_columns(config.prompt):
        _require("task.prompt", name, columns, source.name, remedy=f"; {BRACES}")
    split_by = None if config.split.by == "prompt" else config.split.by
    if split_by:
        _require("task.split.by", split_by, columns, source.name)
    used = dict.fromkeys([*template_columns(config.prompt), *config.columns, *([split_by] if split_by else [])])
    values = {name: values_of(columns[name]) for name in used}
    builder = PromptBuilder(config.prompt, values)
    for key, given in (("system", config.system is not None), ("chat_args", bool(config.chat_args))):
        if given and not (builder.conversational or config.chat):
            raise UserError(f"task.{key} needs a chat prompt; set task.chat: true or remove it")
    if split_by:
        require_scalar(f"task.split.by: column {split_by!r}", values[split_by])
    kept: list[int] = []
    prompts: list[str] = []
    splits_of: list[str] = []
    bad_rows = list(source.bad_rows)
    for i, ordinal in enumerate(source.ordinals):
        row = {name: column[i] for name, column in values.items()}
        missing = [config.columns.get(name, name) for name, value in row.items() if value is None]
        problem = f"column {missing[0]!r} is missing or empty" if missing else builder.problem(row)
        if problem:
            bad_rows.append(BadRow(source.name, source.lines[ordinal], problem))
            continue
        kept.append(i)
        prompts.append(builder.prompt(row))
        splits_of.append(split_of(as_text(row[split_by]) if split_by else prompts[-1], config.split))
    _note_bad_rows(bad_rows, config)
    if not kept:
        raise UserError(f"{source.name}: every row is bad; {describe_bad_rows(bad_rows)}")

    table = pa.table(
        {
            "prompt_id": pa.array([source.ordinals[i] for i in kept], type=pa.int64()),
            "prompt": pa.array(prompts, type=pa.string()),
            **{FIELD + name: column.take(pa.array(kept)) for name, column in columns.items()},
        }
    )
    if builder.conversational:
        table = mark_conversational(table)
    splits = {"all": table}
    if divide:
        splits = {side: table.filter(pa.array([s == side for s in splits_of])) for side in SPLITS}
        _refuse_empty_side(source.name, splits, config.split)
    fields = [name for name in columns if name not in RESERVED]
    return Task(source.name, builder.conversational, splits, bad_rows, fields, config, source.lines)


def _columns(source: Source, config: TaskConfig) -> dict[str, pa.ChunkedArray]:
    """The data's columns and the mapped ones; a mapped name hides a column of the same name."""
    data = {name: source.table[name] for name in source.table.column_names}
    mapped: dict[str, pa.ChunkedArray] = {}
    for name, column in config.columns.items():
        if name in RESERVED:
            raise UserError(f"task.columns: rewards get the policy's own {name!r} under that name; choose another")
        _require(f"task.columns.{name}", column, data, source.name)
        mapped[name] = data[column]
    return {**data, **mapped}


def _require(where: str, name: str, columns: dict[str, pa.ChunkedArray], source: str, remedy: str = "") -> None:
    if name not in columns:
        known = f"{did_you_mean(name, columns)} (columns: {', '.join(columns) or 'none'})"
        raise UserError(f"{where}: {source} has no column {name!r}; {known}{remedy}")


def split_of(key: str, split: SplitConfig) -> str:
    """The side a row is on, from its key alone: other rows, their order and the process play no part."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    share = int.from_bytes(digest, "big") / 2**64
    if share < split.test:
        return "test"
    return "tune" if share < split.test + split.tune else "train"


def _note_bad_rows(bad_rows: list[BadRow], config: TaskConfig) -> None:
    bad_rows.sort(key=lambda bad: bad.line)
    if bad_rows and config.on_bad_row == "fail":
        raise UserError(f"{describe_bad_rows(bad_rows)}; mend them or set task.on_bad_row: skip")


def _refuse_empty_side(name: str, splits: dict[str, pa.Table], split: SplitConfig) -> None:
    rows = sum(table.num_rows for table in splits.values())
    for side, table in splits.items():
        if not table.num_rows:
            remedy = "lower task.split.tune and task.split.test" if side == "train" else f"raise task.split.{side}"
            raise UserError(
                f"the {side} side of {name} is empty: {rows} rows were divided by the hash of {split.by!r} "
                f"with tune {split.tune} and test {split.test}; {remedy}, add rows, or split by another column"
            )
