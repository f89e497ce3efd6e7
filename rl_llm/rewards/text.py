"""What the components share: reading completions and references, and cutting text of any script into words."""

import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

# Han, kana and their extensions: scripts written without spaces, where a character stands for a word.
_UNSPACED = (
    (0x3040, 0x30FF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)


class _CharacterTable(dict[int, str]):
    """A `str.translate` table, filled as characters are met, after which `split` gives the words."""

    def __init__(self, punctuation: str) -> None:
        self.punctuation = punctuation

    def __missing__(self, code: int) -> str:
        # str.isalnum and \w leave out the vowel signs of Indic scripts, so words are cut at what is no part of them.
        category = unicodedata.category(chr(code))
        if category[0] in "PS":
            out = self.punctuation
        elif category[0] == "Z" or category == "Cc":
            out = " "
        elif any(low <= code <= high for low, high in _UNSPACED):
            out = f" {chr(code)} "
        else:
            out = chr(code)
        self[code] = out
        return out


_PUNCTUATION_SPLITS = _CharacterTable(" ")
_PUNCTUATION_VANISHES = _CharacterTable("")
_ARTICLES = {"a", "an", "the"}


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; Chinese and Japanese one character a word."""
    return text.lower().translate(_PUNCTUATION_SPLITS).split()


def answer_words(text: str, language: str) -> list[str]:
    """Words by the rules of SQuAD (arXiv 1606.05250): punctuation vanishes, and in English ("en") articles too."""
    found = text.lower().translate(_PUNCTUATION_VANISHES).split()
    return [word for word in found if word not in _ARTICLES] if language == "en" else found


def ngrams(items: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]


def text_of(completion: Any) -> str:
    """The text of a completion, which is a string or a list of messages."""
    return completion if isinstance(completion, str) else "\n".join(message["content"] for message in completion)


def against_references(
    completions: Sequence[Any], reference: Sequence[Any], score: Callable[[str, list[str]], float]
) -> list[float | None]:
    """`score(text, references)` of each completion; None where the row has no reference.

    A row's reference is one string or number, or a list of them with gaps allowed.
    """
    out: list[float | None] = []
    for completion, given in zip(completions, reference, strict=True):
        several = given if isinstance(given, list | tuple) else [given]
        references = [str(one) for one in several if one is not None]
        out.append(score(text_of(completion), references) if references else None)
    return out
