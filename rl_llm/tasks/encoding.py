"""From prompts to their tokens: text with the tokenizer's own marks, messages through its chat template."""

import inspect
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rl_llm.config import TaskConfig
from rl_llm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]

# What of `apply_chat_template` is a choice of the user's; all else decides what its caller gets.
OPEN_ARGUMENTS = ("tools", "documents", "chat_template", "kwargs")


def encode_texts(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], continued: bool) -> list[list[int]]:
    """Token ids of each text, with each of the tokenizer's opening marks once, whether or not the text has it too.

    Args:
        continued: whether the policy writes on where a text ends: then the tokenizer's own end token is left out.
    """
    if not texts:
        return []
    batch = tokenizer(list(texts), verbose=False, return_special_tokens_mask=True)
    encoded = []
    for ids, added in zip(batch["input_ids"], batch["special_tokens_mask"], strict=True):
        if continued and added and added[-1] and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        opening = added.index(0) if 0 in added else 0
        if opening and ids[opening : 2 * opening] == ids[:opening]:
            ids = ids[opening:]
        encoded.append(ids)
    return encoded


def encode_messages(
    tokenizer: "PreTrainedTokenizerBase", conversations: Sequence[Messages], config: TaskConfig, continued: bool
) -> list[list[int] | str]:
    """Token ids of each conversation up to where the answer begins, or why the template refuses it.

    Args:
        continued: whether the policy writes on where the prompt ends: then no end token stands there.

    Raises:
        UserError: the template takes no such argument as `task.chat_args` has, or no system message for `task.system`.
    """
    args = config.chat_args
    _check_arguments(tokenizer, args)
    system = _takes_system(tokenizer, args)
    if config.system is not None and not system:
        raise UserError(
            "task.system: the tokenizer's chat template has no system role; remove task.system and put its text into "
            "task.prompt or the first message"
        )
    encoded: list[list[int] | str] = []
    for messages in conversations:
        if config.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": config.system}, *messages]
        if not system and any(message["role"] == "system" for message in messages):
            encoded.append("the tokenizer's chat template has no system role; put its text into the first message")
            continue
        # Templates refuse what they were not made for (two user messages in a row, arguments of another type).
        try:
            ids = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **args))
        except _refusals() as error:
            encoded.append(f"the chat template refuses the messages: {error}")
            continue
        while continued and ids and ids[-1] == tokenizer.eos_token_id:
            ids.pop()
        encoded.append(ids)
    return encoded


def _check_arguments(tokenizer: "PreTrainedTokenizerBase", args: dict[str, Any]) -> None:
    try:
        template = tokenizer.get_chat_template(args.get("chat_template"), args.get("tools"))
    except ValueError as error:
        raise UserError(f"the tokenizer's chat template: {error}") from None
    ours = set(inspect.signature(tokenizer.apply_chat_template).parameters) - set(OPEN_ARGUMENTS)
    for name in args:
        if name in ours:
            raise UserError(f"task.chat_args: {name!r} is no choice of the chat template's; remove it")
        # The template ignores what it does not know, and a mistyped argument would change nothing.
        if name != "chat_template" and not re.search(rf"\b{re.escape(name)}\b", template):
            raise UserError(f"task.chat_args: the tokenizer's chat template takes no argument {name!r}")


def _takes_system(tokenizer: "PreTrainedTokenizerBase", args: dict[str, Any]) -> bool:
    """Whether a system message reaches the prompt: some templates refuse it, others leave it out and say nothing."""
    user, mark = {"role": "user", "content": "hello"}, "a system message"
    try:
        tokenizer.apply_chat_template([user], tokenize=False, **args)
    except _refusals():
        return True  # it minds something else, which its rows will tell
    try:
        text = tokenizer.apply_chat_template([{"role": "system", "content": mark}, user], tokenize=False, **args)
    except _refusals():
        return False
    return mark in str(text)


def _refusals() -> tuple[type[Exception], ...]:
    from jinja2 import TemplateError

    return TemplateError, TypeError, ValueError
