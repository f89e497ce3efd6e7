"""Agreement with short reference answers."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rl_llm.rewards.registry import reward
from rl_llm.rewards.text import against_references, answer_words


@reward("exact_match", range=(0, 1))
def exact_match(
    completions: Sequence[Any],
    reference: Sequence[Any],
    *,
    normalize: bool = True,
    language: str = "en",
    **columns: Any,
) -> list[float | None]:
    """1 where the completion is one of the references, else 0.

    `normalize` compares by the rules of SQuAD: case, punctuation, spacing and (`language: en`) articles do not count.
    """

    def form(text: str) -> Any:
        return answer_words(text, language) if normalize else text

    return against_references(
        completions, reference, lambda text, references: float(any(form(text) == form(one) for one in references))
    )


@reward("token_f1", range=(0, 1))
def token_f1(
    completions: Sequence[Any], reference: Sequence[Any], *, language: str = "en", **columns: Any
) -> list[float | None]:
    """F1 of the words shared with the best reference by the rules of SQuAD, 0 to 1.

    Chinese and Japanese count by character, as CMRC 2018 does (arXiv 1810.07366). Two empty answers score 1.
    """
    return against_references(
        completions, reference, lambda text, references: max(_f1(text, one, language) for one in references)
    )


def _f1(text: str, reference: str, language: str) -> float:
    given, wanted = Counter(answer_words(text, language)), Counter(answer_words(reference, language))
    if not given and not wanted:
        return 1.0
    return 2 * (given & wanted).total() / (given.total() + wanted.total())
