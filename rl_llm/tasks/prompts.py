"""From a row's columns to its prompt: a template such as "Summarize: {text}", or a column of messages as it is."""

import json
import re
from typing import Any

from rl_llm.errors import UserError
from rl_llm.values import as_text, is_scalar, kind_of

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")

BRACES = "braces that are text, as in JSON, are doubled: {{ and }}"

Row = dict[str, Any]


def template_columns(template: str) -> list[str]:
    """The columns a template names; `{{` and `}}` stand for braces."""
    return [name for name in _PLACEHOLDER.findall(template) if name]


def rename_columns(template: str, names: dict[str, str]) -> str:
    """The template over the columns' new names, `{old: new}`."""
    return _PLACEHOLDER.sub(lambda match: f"{{{names.get(match[1], match[1])}}}" if match[1] else match[0], template)


class PromptBuilder:
    """Makes a row's prompt, or says why it has none.

    Args:
        template: text with {column}; the prompt is conversational where it is one column of messages and no more.
        values: each column that the template names, a value a row.

    Raises:
        UserError: a column in the template that holds neither text, numbers nor, alone, messages; or braces of which
            some are doubled and some are not.
    """

    def __init__(self, template: str, values: dict[str, list[Any]]) -> None:
        # JSON around a column, {"a": {"b": "{text}"}}, would lose one brace of its last two.
        left = _PLACEHOLDER.sub(lambda match: "" if match[1] else match[0][0], template)
        if template.count("{") == template.count("}") and left.count("{") != left.count("}"):
            raise UserError(f"task.prompt: some of its braces are doubled and become one; {BRACES}")
        self.template = template
        self.columns = template_columns(template)
        self.conversational = len(self.columns) == 1 and (
            template.strip() == f"{{{self.columns[0]}}}" and any(map(_is_messages, values[self.columns[0]]))
        )
        if not self.conversational:
            for name in self.columns:
                require_scalar(
                    f"task.prompt (which may be a column of messages only alone): column {name!r}", values[name]
                )

    def problem(self, row: Row) -> str:
        """Why the row has no prompt; empty where it has one."""
        if self.conversational:
            return _bad_messages(row[self.columns[0]])
        # A template whose columns are all blank asks nothing, whatever text stands around them.
        parts = [as_text(row[name]) for name in self.columns] or [self.template]
        return "" if any(part.strip() for part in parts) else "empty prompt"

    def prompt(self, row: Row) -> str:
        """The filled-in template, or the messages as JSON. It depends on the row alone, not on its neighbours."""
        if self.conversational:
            # In a source of one type a column, keys that only other rows have are null here: they are left out.
            messages = _without_null(row[self.columns[0]])
            return json.dumps(messages, ensure_ascii=False, sort_keys=True)
        return _PLACEHOLDER.sub(lambda match: as_text(row[match[1]]) if match[1] else match[0][0], self.template)


def require_scalar(what: str, values: list[Any]) -> None:
    for value in values:
        if not is_scalar(value):
            raise UserError(f"{what} holds {kind_of(value)}, but text or numbers are needed; name another column")


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and any(
        isinstance(item, dict) and {"role", "content"} <= set(item) for item in value
    )


def _bad_messages(messages: list[Any]) -> str:
    last: Row = {"role": "", "content": ""}
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            return "a message needs a role and a content, both text"
        last = message
    if not last["content"].strip():
        return "empty prompt"
    if last["role"] == "assistant":
        return "the last message is the assistant's own; a prompt ends before the answer"
    return ""


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value
