"""Whether one policy is better than another: differences on the same prompts, with their intervals."""

from collections.abc import Sequence

import numpy as np

from rl_llm.rng import Purpose, stream
from rl_llm.runs.results import Interval

RESAMPLES = 2000


def paired(ours: np.ndarray, theirs: np.ndarray, confidence: float = 0.95, seed: int = 0) -> tuple[float, float, float]:
    """Mean of `ours - theirs` and its percentile-bootstrap bounds, resampled over prompts and, where given, seeds.

    Args:
        ours, theirs: [P] a value a prompt, or [S, P] a row a seed; NaN where there is none. Seeds of the two sides are
            drawn independently of each other, prompts together.

    Returns:
        mean, low, high; all NaN where no prompt has a value on both sides.
    """
    mean, drawn = _differences(ours, theirs, seed)
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail]) if len(drawn) else (float("nan"),) * 2
    return mean, float(low), float(high)


def p_value(ours: np.ndarray, theirs: np.ndarray, seed: int = 0) -> float:
    """Two-sided p of no difference, by inverting the percentile intervals of `paired`; NaN without a prompt.

    At least 1 / (RESAMPLES / 2 + 0.5), since so many resamples see no smaller one (Davison & Hinkley 1997, 4.2).
    """
    _, drawn = _differences(ours, theirs, seed)
    if len(drawn) == 0:
        return float("nan")
    beyond = min((drawn <= 0).sum(), (drawn >= 0).sum())
    return float(min(1.0, 2 * (beyond + 1) / (len(drawn) + 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number, in their order: step-down Bonferroni (Holm 1979)."""
    order = np.argsort(p_values)
    factors = len(p_values) - np.arange(len(p_values))
    corrected = np.maximum.accumulate(np.array(p_values, dtype=np.float64)[order] * factors)
    out = np.empty(len(p_values))
    out[order] = np.minimum(corrected, 1.0)
    return out.tolist()


def over_seeds(values: np.ndarray, confidence: float = 0.95, seed: int = 0) -> tuple[float, float, float]:
    """Mean of [S, P] values, NaN where there is none, and its bounds, resampled over prompts and seeds."""
    return paired(values, np.where(np.isnan(values), np.nan, 0.0), confidence, seed)


def as_interval(bounds: tuple[float, float, float]) -> Interval:
    """Mean and bounds as files have them, None for NaN."""
    mean, low, high = (None if np.isnan(bound) else float(bound) for bound in bounds)
    return {"mean": mean, "low": low, "high": high}


def _differences(ours: np.ndarray, theirs: np.ndarray, seed: int) -> tuple[float, np.ndarray]:
    """Mean difference and its resamples, none where no prompt has a value on both sides."""
    ours, theirs = np.atleast_2d(ours), np.atleast_2d(theirs)
    there = ~(np.isnan(ours).any(axis=0) | np.isnan(theirs).any(axis=0))
    ours, theirs = ours[:, there], theirs[:, there]
    count = ours.shape[1]
    if count == 0:
        return float("nan"), np.empty(0)
    generator = stream(seed, Purpose.BOOTSTRAP, count)
    prompts = generator.integers(count, size=(RESAMPLES, count))
    drawn = _resampled(ours, prompts, generator) - _resampled(theirs, prompts, generator)
    return float(ours.mean() - theirs.mean()), drawn


def _resampled(values: np.ndarray, prompts: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """[B] means of [S, P] values over drawn prompts [B, P] and as many drawn seeds as there are."""
    seeds = len(values)
    if seeds == 1:
        return values[0][prompts].mean(axis=1)
    by_seed = np.stack([row[prompts].mean(axis=1) for row in values])
    drawn = generator.integers(seeds, size=(len(prompts), seeds))
    return by_seed[drawn, np.arange(len(prompts))[:, None]].mean(axis=1)


def column(values: Sequence[float | None] | np.ndarray) -> np.ndarray:
    """float64 [P], NaN for None."""
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def mean_of(values: Sequence[float | None] | np.ndarray) -> float | None:
    """Mean over the values there are, None where there is none."""
    numbers = column(values)
    there = numbers[~np.isnan(numbers)]
    return float(there.mean()) if len(there) else None
