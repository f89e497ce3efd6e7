"""Sentiment by word list."""

import functools
from collections.abc import Sequence
from typing import Any

from rl_llm.rewards.registry import reward
from rl_llm.rewards.text import text_of
from rl_llm.rewards.words import shown


@reward("sentiment", range=(-1, 1))
def sentiment(completions: Sequence[Any], **columns: Any) -> list[float]:
    """VADER's compound score of the completion, -1 (negative) to 1 (positive); English only.

    It adds up words, so repeating one wins: "great" fifty times scores 0.9997. Mix it with `vocab: {kind: repetition}`
    or measure with it what is trained by another component. Text without a word it knows scores 0.
    """
    analyzer = _analyzer()
    return [analyzer.polarity_scores(shown(text_of(completion)))["compound"] for completion in completions]


@functools.cache
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
