"""Rewards of the generated problems of trap.py. Worker processes import them without torch."""

from typing import Any


def match(completions: list[str], word: list[str], **columns: Any) -> list[float]:
    """The share of words that are the prompt's."""
    found = [text.split() for text in completions]
    return [sum(w == asked for w in words) / max(len(words), 1) for words, asked in zip(found, word, strict=True)]


def near(completions: list[str], *, length: int, **columns: Any) -> list[float]:
    """Minus the distance of the number of words from `length`."""
    return [-float(abs(len(text.split()) - length)) for text in completions]


def different(completions: list[str], **columns: Any) -> list[float]:
    """How many different words there are. Of the ideal text there is one, so each more is a wrong one."""
    return [float(len(set(text.split()))) for text in completions]


def ideal(completions: list[str], word: list[str], *, length: int, **columns: Any) -> list[float]:
    """1 for the prompt's word `length` times and nothing else; less by the share of words that are wrong or missing."""
    scores = []
    for text, asked in zip(completions, word, strict=True):
        words = text.split()
        hits = min(sum(w == asked for w in words), length)
        scores.append(hits / max(len(words), length))
    return scores
