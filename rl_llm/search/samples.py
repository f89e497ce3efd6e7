"""Scored samples of the base policy: all that a forecast is made from."""

from dataclasses import dataclass

import numpy as np

from rl_llm.errors import UserError

LEAST_SAMPLES, LEAST_PROMPTS = 8, 8


@dataclass(frozen=True)
class Samples:
    """Scored samples of the base policy, the n of a prompt one after the other.

    Attributes:
        values: raw values of every component and metric, float64 [P * n], NaN where a sample has none.
        groups: int [P * n], the samples of a prompt share a number.
        base: mean and spread a metric that utilities refer to, see `Utility`; of a run's first evaluation.

    Raises:
        ValueError: groups that are not of one size or not in one piece.
    """

    values: dict[str, np.ndarray]
    groups: np.ndarray
    base: dict[str, tuple[float, float]]

    def __post_init__(self) -> None:
        starts = np.flatnonzero(np.diff(self.groups, prepend=self.groups[:1] - 1))
        sizes = np.diff(starts, append=len(self.groups))
        if len(np.unique(self.groups)) != len(starts) or len(set(sizes)) != 1:
            raise ValueError("samples come in groups of one size, each in one piece")

    @property
    def shape(self) -> tuple[int, int]:
        """Prompts and samples a prompt."""
        prompts = len(np.unique(self.groups))
        return prompts, len(self.groups) // prompts

    def half(self, number: int) -> "Samples":
        """Every other prompt, from the first or the second; together they are all."""
        prompts, n = self.shape
        kept = np.repeat(np.arange(prompts) % 2 == number, n)
        return Samples({name: column[kept] for name, column in self.values.items()}, self.groups[kept], self.base)


def check_prompts(prompts: int) -> None:
    """Raise `UserError` where nothing could be told from so few."""
    if prompts < LEAST_PROMPTS:
        raise UserError(
            f"{prompts} tune prompts: intervals over so few say nothing, {LEAST_PROMPTS} are needed and 128 are usual; "
            "raise evaluation.prompts, task.rows or task.split.tune"
        )
