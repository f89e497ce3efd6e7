"""Overlap with reference texts: BLEU, chrF and TER by sacrebleu, ROUGE by rouge-score.

Each scores a completion by itself, so that a mean over samples is no corpus score. Where a metric cuts words at spaces,
scripts without spaces are cut by character.
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from rl_llm.rewards.registry import reward
from rl_llm.rewards.text import References, against_references
from rl_llm.rewards.words import shown, spaced, words

BleuTokenizer = Literal["13a", "intl", "char", "zh", "ja-mecab", "ko-mecab", "flores101", "flores200", "none"]
Smoothing = Literal["exp", "floor", "add-k", "none"]
RougeKind = Annotated[Literal["1", "2", "L"], BeforeValidator(str)]


@reward("bleu", range=(0, 1))
def bleu(
    completions: Sequence[Any],
    reference: References,
    *,
    tokenize: BleuTokenizer = "13a",
    smooth_method: Smoothing = "exp",
    lowercase: bool = False,
    **columns: Any,
) -> list[float | None]:
    """Sentence BLEU: n-gram precision up to four words against the references, 0 to 1.

    N-gram orders that a short text cannot have are left out (`effective_order`), else anything below four words is 0.
    Japanese and Korean words need `ja-mecab` and `ko-mecab` (extras of sacrebleu).
    """
    scorer = _bleu_scorer(tokenize, smooth_method, lowercase)
    return against_references(
        completions,
        reference,
        spaced if tokenize in ("13a", "intl", "zh") else shown,
        lambda text, references: min(scorer.sentence_score(text, references).score / 100, 1.0),
    )


@functools.cache
def _bleu_scorer(tokenize: str, smooth_method: str, lowercase: bool) -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(effective_order=True, tokenize=tokenize, smooth_method=smooth_method, lowercase=lowercase)


@reward("chrf", range=(0, 1))
def chrf(
    completions: Sequence[Any],
    reference: References,
    *,
    word_order: int = 0,
    lowercase: bool = False,
    **columns: Any,
) -> list[float | None]:
    """chrF2: F-score of character n-grams against the best reference, 0 to 1; `word_order: 2` makes it chrF++."""
    from sacrebleu.metrics import CHRF

    scorer = functools.partial(CHRF, word_order=word_order, lowercase=lowercase)
    alone = scorer()

    def score_alone(text: str, refs: list[str]) -> float:
        return float(alone.sentence_score(text, refs).score / 100)

    out: list[float | None] = []
    for _, group in itertools.groupby(zip(completions, reference, strict=True), key=operator.itemgetter(1)):
        texts, given = zip(*group, strict=True)
        if len(texts) > 1:
            out += _chrf_of_group(texts, given, scorer)
        else:
            out += against_references(texts, given, spaced, score_alone)
    return out


def _chrf_of_group(texts: Sequence[Any], reference: Sequence[Any], scorer: Callable[..., Any]) -> list[float | None]:
    # The samples of a group share their references, whose n-grams are a third of the work; keeping them costs a
    # twentieth where they are read once.
    keeping = functools.cache(lambda *refs: scorer(references=[[text] for text in refs]))
    return against_references(
        texts, reference, spaced, lambda text, refs: keeping(*refs).corpus_score([text], None).score / 100
    )


@reward("ter", range=(-math.inf, 0))
def ter(
    completions: Sequence[Any],
    reference: References,
    *,
    normalized: bool = False,
    no_punct: bool = False,
    asian_support: bool = False,
    case_sensitive: bool = False,
    **columns: Any,
) -> list[float | None]:
    """Minus the translation edit rate: 0 for the reference itself, -1 for as many edits as it has words.

    Unbounded below, so `clip: [-1, 0]` goes well with it; some seconds a sample beyond 500 words.
    """
    scorer = _ter_scorer(normalized, no_punct, asian_support, case_sensitive)
    return against_references(
        completions, reference, spaced, lambda text, references: -scorer.sentence_score(text, references).score / 100
    )


@functools.cache
def _ter_scorer(normalized: bool, no_punct: bool, asian_support: bool, case_sensitive: bool) -> Any:
    from sacrebleu.metrics import TER

    return TER(normalized=normalized, no_punct=no_punct, asian_support=asian_support, case_sensitive=case_sensitive)


@reward("rouge", range=(0, 1))
def rouge(
    completions: Sequence[Any], reference: References, *, kind: RougeKind = "L", **columns: Any
) -> list[float | None]:
    """ROUGE F1 against the best reference, 0 to 1; `kind` is 1 or 2 (n-grams) or L (longest common subsequence).

    Words are cut in any script. The cost of L grows with the square of the length.
    """
    scorer, key = _rouge_scorer(kind), f"rouge{kind}"
    return against_references(
        completions,
        reference,
        str,
        lambda text, references: float(scorer.score_multi(references, text)[key].fmeasure),
    )


class _Words:
    # rouge-score's own tokenizer keeps [a-z0-9] only, and gives 0 for identical Chinese.
    def tokenize(self, text: str) -> list[str]:
        return words(text)


@functools.cache
def _rouge_scorer(kind: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([f"rouge{kind}"], tokenizer=_Words())
