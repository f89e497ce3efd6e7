"""Agreement with short reference answers."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from rl_llm.rewards.registry import reward
from rl_llm.rewards.text import References, against_references
from rl_llm.rewards.words import AnswerRule, answer_words


@reward("exact_match", range=(0, 1))
def exact_match(
    completions: Sequence[Any],
    reference: References,
    *,
    normalize: Literal["answer", "squad", False] = "answer",
    language: str = "en",
    **columns: Any,
) -> list[float | None]:
    """1 where the completion is one of the references, else 0.

    By the rule `answer` case, spacing, punctuation and (`language: en`) articles do not count, while signs, decimal
    points, fractions and symbols do; by the rule `squad` they do not. With `false` every character counts, but for the
    whitespace around the text: whether a completion begins with a space is the tokenizer's affair.
    """

    def form(text: str) -> Any:
        return answer_words(text, normalize, language) if normalize else text.strip()

    return against_references(completions, reference, form, lambda text, references: float(text in references))


@reward("token_f1", range=(0, 1))
def token_f1(
    completions: Sequence[Any],
    reference: References,
    *,
    normalize: AnswerRule = "answer",
    language: str = "en",
    **columns: Any,
) -> list[float | None]:
    """F1 of the words shared with the best reference by the rules of `exact_match`, 0 to 1.

    Scripts without spaces count by character, as CMRC 2018 does (arXiv 1810.07366). Two empty answers score 1.
    """

    def form(text: str) -> Counter[str]:
        return Counter(answer_words(text, normalize, language))

    return against_references(
        completions, reference, form, lambda text, references: max(_f1(text, one) for one in references)
    )


def _f1(given: Counter[str], wanted: Counter[str]) -> float:
    if not given and not wanted:
        return 1.0
    return 2 * (given & wanted).total() / (given.total() + wanted.total())
