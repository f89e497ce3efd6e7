"""The shape of a completion: how long it is, how varied, and whether it matches a pattern. No reference is needed."""

import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from rl_llm.rewards.registry import reward
from rl_llm.rewards.text import ngrams, text_of
from rl_llm.rewards.words import shown, words


@reward("constant", range=(1, 1))
def constant(completions: Sequence[Any], **columns: Any) -> list[float]:
    """1 for everything: the control with nothing to learn from."""
    return [1.0] * len(completions)


@reward("length", range=(-math.inf, 1))
class Length:
    """Length of the completion: minus the count (`penalty`), or 1 at a `target` or inside a `window` and less outside.

    Args:
        mode: "penalty", "target" or "window".
        unit: what is counted; tokens include the end token.
        target: length worth 1 with mode "target".
        min, max: bounds of the window, either may be left out.
        tolerance: distance from the target or window at which the value has fallen to 0, in a straight line;
            by default the target, or the window's upper bound (lower, where it has no upper).

    Raises:
        ValueError: settings that do not go together.
    """

    def __init__(
        self,
        *,
        mode: Literal["penalty", "target", "window"] = "penalty",
        unit: Literal["words", "tokens", "characters"] = "words",
        target: float | None = None,
        min: float | None = None,
        max: float | None = None,
        tolerance: float | None = None,
    ) -> None:
        if (mode == "target") != (target is not None):
            raise ValueError("mode 'target' and a target: <length> go together")
        if (mode == "window") != (min is not None or max is not None):
            raise ValueError("mode 'window' and a min: or max: <length> go together")
        self.mode, self.unit = mode, unit
        self.reads_tokens = unit == "tokens"
        self.low = target if target is not None else min or 0.0
        self.high = target if target is not None else math.inf if max is None else max
        if self.low > self.high:
            raise ValueError(f"min {self.low:g} exceeds max {self.high:g}")
        self.tolerance = tolerance if tolerance is not None else self.high if self.high < math.inf else self.low
        if mode != "penalty" and self.tolerance <= 0:
            raise ValueError("tolerance must be above 0")

    def __call__(
        self, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float]:
        if self.reads_tokens:
            counts = [len(ids) for ids in completion_ids]
        else:
            parts = shown if self.unit == "characters" else words
            counts = [len(parts(text_of(completion))) for completion in completions]
        if self.mode == "penalty":
            return [-float(count) for count in counts]
        outside = [max(self.low - count, count - self.high, 0.0) for count in counts]
        return [max(1.0 - distance / self.tolerance, 0.0) for distance in outside]


@reward("overlong", range=(-1, 0))
def overlong(
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    *,
    limit: Annotated[int, Field(ge=1)],
    buffer: Annotated[int, Field(ge=1)],
    **columns: Any,
) -> list[float]:
    """Soft overlong punishment of DAPO, equation 13 (arXiv 2503.14476), in tokens with the end token.

    0 up to `limit - buffer` tokens, then in a straight line to -1 at `limit`, and -1 beyond.
    """
    return [max(min((limit - buffer - len(ids)) / buffer, 0.0), -1.0) for ids in completion_ids]


@reward("vocab", range=(-1, math.inf))
def vocab(
    completions: Sequence[Any],
    *,
    kind: Literal["words", "repetition", "distinct"] = "words",
    n: Annotated[int, Field(ge=1)] = 2,
    **columns: Any,
) -> list[float]:
    """Variety of words: how many different ones (`words`), minus the share of repeated n-grams, or distinct-n.

    - `words`: number of different words; a mixture that wants few gives it a negative weight or scale;
    - `repetition`: minus the share of n-grams that occurred before (seq-rep-n, arXiv 1908.04319), -1 to 0;
    - `distinct`: different n-grams over the number of words (distinct-n, arXiv 1510.03055), 0 to 1.
    """
    return [float(_variety(words(text_of(completion)), kind, n)) for completion in completions]


def _variety(found: list[str], kind: str, n: int) -> float:
    if kind == "words":
        return len(set(found))
    grams = ngrams(found, n)
    if kind == "distinct":
        return len(set(grams)) / max(len(found), 1)
    return len(set(grams)) / len(grams) - 1 if grams else 0.0


@reward("regex", range=(0, 1))
def regex(
    completions: Sequence[Any],
    *,
    pattern: re.Pattern[str],
    match: Literal["search", "full"] = "search",
    want: bool = True,
    **columns: Any,
) -> list[float]:
    """1 where the pattern is found, else 0; `want: false` turns it round.

    With `match: full` it has to be the whole text, with the whitespace around it or without: whether a completion
    begins with a space is the tokenizer's affair.
    """
    pattern = re.compile(pattern)

    def found(text: str) -> bool:
        if match == "search":
            return pattern.search(text) is not None
        return any(pattern.fullmatch(one) is not None for one in (text, text.strip()))

    return [float(found(text_of(completion)) == want) for completion in completions]
