"""What the components share: reading completions and references."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

from rl_llm.rewards.registry import Takes
from rl_llm.values import as_text, texts_of

References = Annotated[Sequence[Any], Takes(texts_of)]
"""A column of references: a text a row, or several, as `reference_texts` reads them."""

Form = TypeVar("Form")


def ngrams(items: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]


def text_of(completion: Any) -> str:
    """The text of a completion, which is a string or a list of messages (one that only calls a tool has none)."""
    if isinstance(completion, str):
        return completion
    return "\n".join(message.get("content") or "" for message in completion)


def reference_texts(value: Any) -> list[str]:
    """The right answers of a row, as `texts_of` reads them; a fraction that is whole is right as 12 and as 12.0."""
    several = value if isinstance(value, list | tuple) else [value]
    # Nobody knows any more which of them was meant: frames and Parquet keep 12 beside a gap as 12.0.
    return texts_of(value) + [str(one) for one in several if isinstance(one, float) and as_text(one) != str(one)]


def against_references(
    completions: Sequence[Any],
    reference: Sequence[Any],
    form: Callable[[str], Form],
    score: Callable[[Form, list[Form]], float],
) -> list[float | None]:
    """`score(text, references)` of each completion, texts in the form compared; None where the row has no reference."""
    out: list[float | None] = []
    for completion, given in zip(completions, reference, strict=True):
        references = [form(text) for text in reference_texts(given)]
        out.append(score(form(text_of(completion)), references) if references else None)
    return out
