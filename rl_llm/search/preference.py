"""A utility from choices between two answers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rl_llm.config.yaml12 import write_yaml
from rl_llm.rng import Purpose, stream
from rl_llm.runs.results import Interval
from rl_llm.search.compare import as_interval

RIDGE = 1.0
DRAWS = 500
_STEPS = 25


@dataclass(frozen=True)
class Preference:
    """What somebody's choices say.

    Attributes:
        weights: a utility: weight by metric, their sizes adding up to 1.
        bounds: of each weight, 95 % over choices.
        choices: that they were fitted to.
        agreed: share of other choices that it foresees, with 95 % bounds; None for all of it without such choices.
        held_out: how many of these there were, equals left out.
    """

    weights: dict[str, float]
    bounds: dict[str, Interval]
    choices: int
    agreed: Interval
    held_out: int

    @property
    def sure(self) -> list[str]:
        """Metrics whose weight is shown to be above or below 0."""
        return [name for name, bound in self.bounds.items() if (bound["low"] or 0.0) * (bound["high"] or 0.0) > 0]

    @property
    def confirmed(self) -> bool:
        """Whether it foresees other choices better than a coin."""
        return (self.agreed["low"] or 0.0) > 0.5

    def to_yaml(self) -> str:
        """To put into a search file."""
        return write_yaml({"utility": {name: round(weight, 3) for name, weight in self.weights.items()}})


def fit(
    differences: np.ndarray, choices: np.ndarray, others: np.ndarray, other_choices: np.ndarray, names: Sequence[str]
) -> Preference:
    """Fit a utility to choices, and see whether it foresees others.

    Args:
        differences: [N, M] metrics of the first answer less those of the second, in spreads of the base policy.
        choices: [N], 1 where the first was chosen, 0 for the second, 0.5 for neither.
        others, other_choices: the same of choices that have no part in the fit.
        names: of the metrics.
    """
    weights = bradley_terry(differences, choices)
    count = len(choices)
    generator = stream(0, Purpose.BOOTSTRAP, count)
    drawn = [generator.integers(count, size=count) for _ in range(DRAWS if count else 0)]
    fitted = np.array([_scaled(bradley_terry(differences[rows], choices[rows])) for rows in drawn])
    fitted = fitted.reshape(len(drawn), len(names))
    low, high = np.quantile(fitted, [0.025, 0.975], axis=0) if count else np.zeros((2, len(names)))
    scaled = _scaled(weights)
    told = other_choices != 0.5
    lead = others[told] @ weights
    right = np.where(lead == 0, 0.5, (lead > 0) == (other_choices[told] == 1))
    return Preference(
        dict(zip(names, scaled.tolist(), strict=True)),
        {name: as_interval((scaled[k], low[k], high[k])) for k, name in enumerate(names)},
        count,
        wilson(float(right.sum()), int(told.sum())),
        int(told.sum()),
    )


def bradley_terry(differences: np.ndarray, choices: np.ndarray) -> np.ndarray:
    """Weights w, [M], for which P(first is chosen) = 1 / (1 + exp(-w' difference)) fits best, held near 0 by a ridge.

    Bradley & Terry 1952 with the log of a strength linear in the metrics: logistic regression without a constant, as
    first and second are drawn by lot. The ridge is a normal prior with a standard deviation of 1 for each weight, which
    keeps it finite where choices could be foreseen without a fault. Found by Newton's method.
    """
    weights = np.zeros(differences.shape[1])
    for _ in range(_STEPS):
        chance = 1 / (1 + np.exp(-np.clip(differences @ weights, -30, 30)))
        gradient = differences.T @ (choices - chance) - RIDGE * weights
        curvature = (differences * (chance * (1 - chance))[:, None]).T @ differences + RIDGE * np.eye(len(weights))
        step = np.linalg.solve(curvature, gradient)
        weights = weights + step
        if np.abs(step).max(initial=0.0) < 1e-9:
            break
    return weights


def wilson(right: float, count: int) -> Interval:
    """A share with its 95 % score interval (Wilson 1927), which holds for few and for none wrong too."""
    if count == 0:
        return {"mean": None, "low": None, "high": None}
    z, share = 1.959964, right / count
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return as_interval((share, float(centre - half), float(centre + half)))


def _scaled(weights: np.ndarray) -> np.ndarray:
    """Sizes that add up to 1; choices say nothing of a utility's scale."""
    size = np.abs(weights).sum()
    return weights / size if size else weights
