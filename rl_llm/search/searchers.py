"""Who proposes the next point."""

from dataclasses import dataclass
from typing import Protocol

from rl_llm.search.space import Point


@dataclass(frozen=True)
class Outcome:
    """What became of a trial.

    Attributes:
        state: "done", "stopped" (early) or "failed".
        point: that it ended with.
        metrics: means on the tune split at its best evaluation; None for a metric without a value.
        utility: mean there, None without one.
    """

    state: str
    point: Point
    metrics: dict[str, float | None]
    utility: float | None


class Searcher(Protocol):
    """Proposes points by number of the trial, and may learn from what became of them.

    What it answers depends on its settings and on what it has been told, not on how often it was asked: a searcher that
    is told the past of a killed search again goes on as that one would have.
    """

    name: str

    def ask(self, number: int, given: Point | None) -> Point | None:
        """The point of a trial: the given one, else its own; None where there are no more."""

    def asked(self, number: int, point: Point) -> None:
        """The trial has this point, and is under way."""

    def tell(self, number: int, outcome: Outcome) -> None:
        """The trial is over."""
