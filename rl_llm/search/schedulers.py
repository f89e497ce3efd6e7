"""Who goes on, and who is cut."""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from rl_llm.search.space import Point


@dataclass(frozen=True)
class Standing:
    """A trial at a level.

    Attributes:
        utility: [P] a value a prompt, NaN where there is none.
        price: generated tokens a step so far.
        spent: generated tokens so far.
        step: steps done.
        ended: whether it trains no further by itself.
    """

    name: str
    utility: np.ndarray
    price: float
    spent: int
    step: int
    point: Point
    ended: bool


@dataclass(frozen=True)
class Level:
    """What a scheduler decides on.

    Attributes:
        number: of the level among the scheduler's.
        waiting: trials that stand at it, none of them decided on.
        coming: trials that may still come to it.
        before: trials that have gone on from it already.
        slack: generated tokens left over from the levels before.
        budget: steps, or generated tokens, of a whole trial; in_tokens: which.
    """

    number: int
    waiting: list[Standing]
    coming: int
    before: list[Standing]
    slack: float
    budget: int
    in_tokens: bool


@dataclass(frozen=True)
class Verdict:
    """What is to become of a trial.

    Attributes:
        action: "go" on to the next level, "stop", or "exploit": go on from the donor's checkpoint, at `point`.
        reason: in words; for a difference also its mean and bounds.
    """

    action: Literal["go", "stop", "exploit"]
    reason: str = ""
    donor: str | None = None
    point: Point | None = None
    difference: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Decided:
    """Verdicts by trial, and the slack that is left for the next level."""

    verdicts: dict[str, Verdict]
    slack: float = 0.0


class Scheduler(Protocol):
    """Decides at levels, which are shares of a trial's budget; the last is 1.

    What it decides depends on its settings and on the level alone.
    """

    levels: tuple[float, ...]

    def decide(self, level: Level) -> Decided | None:
        """None: not before others have come."""
