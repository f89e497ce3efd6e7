"""The utility that ranks policies: held-out metrics in spreads of the policy before training."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

CLIP = 10.0


def base_statistics(values: Mapping[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """Mean and spread (standard deviation over prompts; 1 where that is 0) of each metric's values, NaN left out."""
    found = {}
    for name, column in values.items():
        there = column[~np.isnan(column)]
        spread = float(there.std()) if len(there) else 0.0
        # Equal values have a spread of rounding errors, which would make a mountain of any change.
        found[name] = (float(there.mean()) if len(there) else 0.0, spread if spread > 1e-9 else 1.0)
    return found


def in_spreads(values: np.ndarray, mean: float, spread: float) -> np.ndarray:
    """A metric's values as a utility sees them: distances from the base policy's mean in its spreads, clipped."""
    return np.clip((values - mean) / spread, -CLIP, CLIP)


@dataclass
class Utility:
    """Sum over held-out metrics of weight x clipped (metric - base mean) / base spread, a number a prompt.

    The base statistics are those of the policy before training on the tune split; they and the weights never change
    within a run, so utilities of its policies compare. The untrained policy is at about 0 by construction.

    Attributes:
        weights: by metric.
        base: mean and spread (standard deviation over prompts; 1 where that is 0) by metric, once measured.
    """

    weights: dict[str, float]
    base: dict[str, tuple[float, float]]

    def measure_base(self, values: dict[str, np.ndarray]) -> None:
        """Take the base statistics from the untrained policy's values per prompt, of metrics without a weight too."""
        self.base |= base_statistics(values)

    def per_prompt(self, values: dict[str, np.ndarray]) -> np.ndarray:
        """[N]; a metric without a value for a prompt adds nothing there, a prompt without any is NaN."""
        terms = np.stack([weight * in_spreads(values[name], *self.base[name]) for name, weight in self.weights.items()])
        return np.where(np.isnan(terms).all(axis=0), np.nan, np.nansum(terms, axis=0))
