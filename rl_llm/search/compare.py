"""Whether one policy is better than another: differences on the same prompts, with their intervals."""

from collections.abc import Sequence

import numpy as np

from rl_llm.rng import Purpose, stream

RESAMPLES = 2000


def paired(ours: np.ndarray, theirs: np.ndarray, confidence: float = 0.95, seed: int = 0) -> tuple[float, float, float]:
    """Mean of `ours - theirs` and its percentile-bootstrap bounds, resampled over prompts and, where given, seeds.

    Args:
        ours, theirs: [P] a value a prompt, or [S, P] a row a seed; NaN where there is none. Seeds of the two sides are
            drawn independently of each other, prompts together.

    Returns:
        mean, low, high; all NaN where no prompt has a value on both sides.
    """
    ours, theirs = np.atleast_2d(ours), np.atleast_2d(theirs)
    there = ~(np.isnan(ours).any(axis=0) | np.isnan(theirs).any(axis=0))
    ours, theirs = ours[:, there], theirs[:, there]
    count = ours.shape[1]
    if count == 0:
        return (float("nan"),) * 3
    generator = stream(seed, Purpose.BOOTSTRAP, count)
    prompts = generator.integers(count, size=(RESAMPLES, count))
    means = _resampled(ours, prompts, generator) - _resampled(theirs, prompts, generator)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(ours.mean() - theirs.mean()), float(low), float(high)


def _resampled(values: np.ndarray, prompts: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """[B] means of [S, P] values over drawn prompts [B, P] and as many drawn seeds as there are."""
    seeds = len(values)
    if seeds == 1:
        return values[0][prompts].mean(axis=1)
    by_seed = np.stack([row[prompts].mean(axis=1) for row in values])
    drawn = generator.integers(seeds, size=(len(prompts), seeds))
    return by_seed[drawn, np.arange(len(prompts))[:, None]].mean(axis=1)


def mean_of(values: Sequence[float | None] | np.ndarray) -> float | None:
    """Mean over the values there are, None where there is none."""
    column = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    there = column[~np.isnan(column)]
    return float(there.mean()) if len(there) else None
