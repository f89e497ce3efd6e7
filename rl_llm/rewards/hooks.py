"""What TRL hands a reward beside the data: the state of the run, and two ways to log numbers."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any


def as_python(value: Any) -> Any:
    """A value with numpy's and torch's scalars as Python's."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


@dataclass(frozen=True)
class RunState:
    """The part of TRL's `trainer_state` that there is here.

    Attributes:
        global_step: learner updates behind the policy that wrote the completions.
        max_steps: steps of the run; both are 0 outside of one.
    """

    global_step: int = 0
    max_steps: int = 0


class Log:
    """Numbers that a reward logs, as sums and counts by name."""

    def __init__(self) -> None:
        self.logged: dict[str, tuple[float, int]] = {}

    def log_metric(self, name: str, value: Any) -> None:
        """A number for all completions of a call."""
        self.log_extra(name, [value])

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        """A value a completion; those that are no finite numbers are left out."""
        numbers = [float(value) for value in map(as_python, values) if isinstance(value, Real) and math.isfinite(value)]
        if numbers:
            self.add({str(column): (sum(numbers), len(numbers))})

    def add(self, logged: Mapping[str, tuple[float, int]]) -> None:
        for name, (total, count) in logged.items():
            before, so_far = self.logged.get(name, (0.0, 0))
            self.logged[name] = (before + total, so_far + count)
