"""What the components share: reading completions and references."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Form = TypeVar("Form")


def ngrams(items: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]


def text_of(completion: Any) -> str:
    """The text of a completion, which is a string or a list of messages (one that only calls a tool has none)."""
    return completion if isinstance(completion, str) else "\n".join(message["content"] or "" for message in completion)


def against_references(
    completions: Sequence[Any],
    reference: Sequence[Any],
    form: Callable[[str], Form],
    score: Callable[[Form, list[Form]], float],
) -> list[float | None]:
    """`score(text, references)` of each completion, texts in the form compared; None where the row has no reference.

    A row's reference is one string or number, or a list of them with gaps allowed.
    """
    out: list[float | None] = []
    for completion, given in zip(completions, reference, strict=True):
        several = given if isinstance(given, list | tuple) else [given]
        references = [form(str(one)) for one in several if one is not None]
        out.append(score(form(text_of(completion)), references) if references else None)
    return out
