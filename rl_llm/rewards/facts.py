"""Whether a completion states the facts of its row."""

from collections.abc import Mapping, Sequence
from typing import Any

from rl_llm.rewards.registry import Takes, reward
from rl_llm.rewards.text import reference_texts, text_of
from rl_llm.rewards.words import answer_words
from rl_llm.values import as_text, texts_of

Value = tuple[str, ...]


@reward("facts", range=(0, 1))
class Facts:
    """Share of the columns whose value is stated; where n other values of a column are stated too, 1 / (1 + n) of it.

    So a fact that is left out or wrong is worth 0, and one beside a wrong value 1/2: naming several values never pays
    more than naming the likeliest. Words are those of `exact_match` by the rule `answer`: case does not count, and a
    value is stated as whole words, in its order. Where values overlap, the longest is the one stated: "New York" states
    no "York". A list in a column is several right answers, one of which is enough; a row without a value in a column is
    judged by its others. What is said of a value, such as "not in Rome", is not understood.

    Args:
        columns: of the data, whose values are the facts.
        choices: all values a column can have, by column. Without them every number is a value of a column that has a
            number, and a column that has a text has no other values: listing all cities would cost nothing. What is a
            fact of the row in one column is wrong in none.
        language: "en" ignores articles and reads 1,000 as 1000.

    Raises:
        ValueError: choices of something that is not among the columns, or no columns.
    """

    def __init__(
        self, *, columns: list[str], choices: dict[str, list[Any]] | None = None, language: str = "en"
    ) -> None:
        if not columns:
            raise ValueError("columns: name at least one")
        for name in choices or {}:
            if name not in columns:
                raise ValueError(f"choices.{name}: {name!r} is not among the columns {columns}")
        self.reads_columns = dict.fromkeys(columns, Takes(texts_of))
        self.language = language
        self.choices = {name: self._values(map(as_text, given)) for name, given in (choices or {}).items()}

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        rows = zip(*(columns[name] for name in self.reads_columns), strict=True)
        return [
            self._score(text_of(completion), dict(zip(self.reads_columns, row, strict=True)))
            for completion, row in zip(completions, rows, strict=True)
        ]

    def _values(self, texts: Any) -> set[Value]:
        return {tuple(answer_words(text, "answer", self.language)) for text in texts} - {()}

    def _score(self, text: str, row: Mapping[str, Any]) -> float | None:
        facts = {name: right for name, value in row.items() if (right := self._values(reference_texts(value)))}
        if not facts:
            return None
        all_right = set().union(*facts.values())
        found = _stated(answer_words(text, "answer", self.language), all_right.union(*self.choices.values()))
        wrong = found - all_right
        numbers = {value for value in wrong if _is_number(value)}
        scores = []
        for name, right in facts.items():
            others = numbers if any(map(_is_number, right)) else set()
            if name in self.choices:
                others = wrong & self.choices[name]
            scores.append(1 / (1 + len(others)) if found & right else 0.0)
        return sum(scores) / len(scores)


def _stated(words: Sequence[str], known: set[Value]) -> set[Value]:
    """The known values in a text, the longest first where they overlap, and the numbers that are part of none."""
    lengths = sorted({len(value) for value in known}, reverse=True)
    found, i = set(), 0
    while i < len(words):
        here = [value for n in lengths if (value := tuple(words[i : i + n])) in known] or [(words[i],)]
        if here[0] in known or _is_number(here[0]):
            found.add(here[0])
        i += len(here[0])
    return found


def _is_number(value: Value) -> bool:
    return len(value) == 1 and any(map(str.isdigit, value[0])) and not any(map(str.isalpha, value[0]))
