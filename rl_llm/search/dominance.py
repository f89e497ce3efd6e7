"""Many weightings read on the same prompts: their intervals, and which are shown to be worse than another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rl_llm.rng import Purpose, stream
from rl_llm.search.compare import RESAMPLES

NOTHING = 1e-9  # spreads and differences below this are rounding
FRONT, UNDECIDED, DOMINATED, OUT_OF_REACH = "front", "cannot be told apart", "dominated", "short of the KL"
_ALIKE = 1e-4  # of the range of all weightings
_AT_ONCE = 512  # rows whose resampled means are held together

Interval = dict[str, float | None]
"""mean, low, high; None where there is no value."""


@dataclass(frozen=True)
class Bounds:
    """Means with their 95 % bounds, all of one shape; NaN where there is no value."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def at(self, *index: int) -> Interval:
        found = {name: float(getattr(self, name)[index]) for name in ("mean", "low", "high")}
        return {name: None if math.isnan(value) else value for name, value in found.items()}


def bootstrap(values: np.ndarray) -> Bounds:
    """Means of [..., P] over prompts with percentile-bootstrap bounds, all by the same resamples; NaN is left out.

    One matrix product for many rows: `compare.paired` for thousands of them would take minutes.
    """
    prompts = values.shape[-1]
    drawn = stream(0, Purpose.BOOTSTRAP, prompts).multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES)
    rows = values.reshape(-1, prompts)
    there = ~np.isnan(rows)
    filled, counts = np.where(there, rows, 0.0), drawn.T.astype(np.float64)
    mean = filled.sum(axis=1) / np.maximum(there.sum(axis=1), 1)
    low, high = np.empty(len(rows)), np.empty(len(rows))
    for start in range(0, len(rows), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        mass = there[part] @ counts
        # A resample without any of the prompts that have a value says nothing.
        means = np.where(mass > 0, (filled[part] @ counts) / np.maximum(mass, 1), mean[part, None])
        low[part], high[part] = np.quantile(means, [0.025, 0.975], axis=1)
    lost = ~there.any(axis=1)
    shape = values.shape[:-1]
    return Bounds(*(np.where(lost, np.nan, bound).reshape(shape) for bound in (mean, low, high)))


def verdicts(whole: np.ndarray, apart: np.ndarray, signs: Sequence[int], compared: np.ndarray) -> list[str]:
    """Each weighting's verdict.

    The weighting that is to dominate another is chosen on one half of the prompts, as the one whose lead is surest in
    the metric where it is least sure, and its lead is read on the other half; both ways, so that every prompt counts.

    Args:
        whole, apart: [W, M, P] metrics, tilted on all prompts and on each half by itself; halves alternate.
        signs: of each metric, 1 where it is better higher, -1 where lower.
        compared: bool [W], weightings that come as far as the others.
    """
    turned = np.array(signs)[:, None]
    whole, apart = whole * turned, apart * turned
    # A metric that no weighting moves is none to be better in.
    moves = np.ptp(np.nan_to_num(whole), axis=0).max(axis=1, initial=0.0) > NOTHING
    whole, apart = whole[:, moves], apart[:, moves]
    beaten = _rivals(whole, compared) >= 0
    chosen = [_rivals(apart[:, :, half::2], compared) for half in (0, 1)]
    lead = np.empty_like(apart)
    for half, rival in enumerate(chosen):
        read = slice(1 - half, None, 2)
        lead[:, :, read] = apart[rival][:, :, read] - apart[:, :, read]
    shown = (bootstrap(lead).low > 0).all(axis=1) & (np.min(chosen, axis=0) >= 0)
    return [
        OUT_OF_REACH if not compared[w] else FRONT if not beaten[w] else DOMINATED if shown[w] else UNDECIDED
        for w in range(len(compared))
    ]


def _rivals(values: np.ndarray, compared: np.ndarray) -> np.ndarray:
    """For each weighting the one that leads it in all metrics, the most surely, int [W]; -1 where there is none.

    Args:
        values: [W, M, P], better higher.
    """
    count, metrics, _ = values.shape
    if metrics == 0:
        return np.full(count, -1)
    least = np.full((count, count), np.inf)
    for rows in values.transpose(1, 0, 2):
        there = ~np.isnan(rows).any(axis=0)
        mean = rows[:, there].sum(axis=1) / max(there.sum(), 1)
        centred = rows[:, there] - mean[:, None]
        products = centred @ centred.T
        squares = np.diag(products)
        error = np.sqrt(np.maximum(squares[:, None] + squares - 2 * products, 0.0)) / max(there.sum(), 1)
        lead = mean[:, None] - mean
        # What the scale of the weights leaves, by the small numbers that divisions are kept from 0 with, is no lead.
        lead[np.abs(lead) <= _ALIKE * np.ptp(mean) + NOTHING] = 0.0
        least = np.minimum(least, lead / (error + NOTHING))
    least[~compared] = -np.inf
    return np.where(least.max(axis=0) > 0, least.argmax(axis=0), -1)
