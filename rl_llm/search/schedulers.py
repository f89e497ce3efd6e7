"""Who goes on, and who is cut."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from rl_llm.errors import UserError
from rl_llm.rng import Purpose, stream
from rl_llm.search.compare import mean_of, paired
from rl_llm.search.config import SearchConfig
from rl_llm.search.space import Point, Space


@dataclass(frozen=True)
class Standing:
    """A trial at a level.

    Attributes:
        utility: [P] a value a prompt at its best evaluation, NaN where there is none.
        now: [P] the same at its last one.
        price: generated tokens a step so far.
        spent: generated tokens so far.
        step: steps done.
        ended: whether it trains no further by itself.
    """

    name: str
    utility: np.ndarray
    now: np.ndarray
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
        before: trials of any bracket that have been decided on at it, as they stood then.
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


LEAST_STEPS = 9
SHARES = (1 / 9, 1 / 3, 1.0)
_TIED = 0.9  # confidence of the intervals that tie
_SLACK = 0.1


class Plain:
    """Every trial is trained to the end."""

    def __init__(self, levels: tuple[float, ...] = (1.0,)) -> None:
        self.levels = levels

    def decide(self, level: Level) -> Decided | None:
        return _all_go(level)


class Halving:
    """Synchronous successive halving (arXiv 1502.07943), factor 3, that does not cut what it cannot tell apart.

    Of m trials at a level the best k = ceil(m / 3) by mean utility go on. A trial below is tied where the 90 % interval
    of its difference to the k-th, paired by prompts, contains 0. Tied ones go on, the best first, until one's tokens to
    the next level are more than there is of slack: a tenth of what the levels so far add to plain halving's plan, less
    what has been spent of it. The plan has all trials up to the first level and the k best from level to level, each at
    its own tokens a step. A trial that has ended by itself costs nothing more. The interval covers prompts, not seeds.
    """

    def __init__(self, levels: tuple[float, ...] = SHARES) -> None:
        self.levels = levels

    def decide(self, level: Level) -> Decided | None:
        if level.coming:
            return None
        if level.number == len(self.levels) - 1:
            return _all_go(level)
        ranked = sorted(level.waiting, key=lambda trial: -_mean(trial))
        best = math.ceil(len(ranked) / 3)
        last = ranked[best - 1]
        planned = sum(self._cost(trial, level) for trial in ranked[:best])
        planned += sum(trial.spent for trial in ranked) if level.number == 0 else 0
        slack, open_ = level.slack + _SLACK * planned, True
        verdicts = {trial.name: Verdict("go", f"among the best {best} of {len(ranked)}") for trial in ranked[:best]}
        for trial in ranked[best:]:
            difference = paired(trial.utility, last.utility, _TIED)
            _, low, high = difference
            to_last = f"{_shown(difference)} to {last.name}, number {best} of {len(ranked)}"
            if not low <= 0 <= high:
                verdicts[trial.name] = Verdict("stop", f"below: {to_last}", difference=difference)
                continue
            cost = self._cost(trial, level)
            open_ = open_ and cost <= slack
            if open_ or cost == 0:
                said = f"tied: {to_last}; {cost:,.0f} of {slack:,.0f} tokens of slack"
                verdicts[trial.name] = Verdict("go", said, difference=difference)
                slack -= cost
            else:
                said = f"tied: {to_last}; {slack:,.0f} tokens of slack do not pay for {cost:,.0f}"
                verdicts[trial.name] = Verdict("stop", said, difference=difference)
        return Decided({trial.name: verdicts[trial.name] for trial in level.waiting}, slack)

    def _cost(self, trial: Standing, level: Level) -> float:
        """Tokens from where a trial is to the next level."""
        if trial.ended:
            return 0.0
        there = self.levels[level.number + 1] * level.budget
        return max(there - trial.spent, 0.0) if level.in_tokens else max(there - trial.step, 0.0) * trial.price


class ASHA:
    """Asynchronous successive halving (arXiv 1810.05934) in the variant that stops and never pauses.

    On its arrival at a level a trial goes on if it is in the best third of all that have come there so far. Nobody
    waits, and who comes early has it easier: with one trial at a time order decides.
    """

    def __init__(self, levels: tuple[float, ...] = SHARES) -> None:
        self.levels = levels

    def decide(self, level: Level) -> Decided | None:
        if level.number == len(self.levels) - 1:
            return _all_go(level)
        come, verdicts = list(level.before), {}
        for trial in level.waiting:
            come.append(trial)
            place = 1 + sum(_mean(other) > _mean(trial) for other in come)
            best = math.ceil(len(come) / 3)
            reason = f"number {place} of {len(come)} that have come, {best} go on"
            verdicts[trial.name] = Verdict("go" if place <= best else "stop", reason)
        return Decided(verdicts)


class PBT:
    """Population-based training (arXiv 1711.09846) in synchronous generations.

    At each level the worst quarter by utility, as it is now, goes on from checkpoints of the best quarter, each at a
    point near that of its donor. Equals keep their order. Trials that have ended by themselves are no donors.

    Args:
        moved: a point near another, see `Space.moved`.
        seed: of donors and moves.
    """

    def __init__(
        self, moved: Callable[[Point, np.random.Generator], Point], seed: int, levels: tuple[float, ...]
    ) -> None:
        self.moved, self.seed, self.levels = moved, seed, levels

    def decide(self, level: Level) -> Decided | None:
        if level.coming:
            return None
        if level.number == len(self.levels) - 1:
            return _all_go(level)
        ranked = sorted(level.waiting, key=lambda trial: -_mean_of(trial.now))
        quarter = max(len(ranked) // 4, 1) if len(ranked) > 1 else 0
        donors = [trial for trial in ranked[:quarter] if not trial.ended]
        verdicts = {trial.name: Verdict("go") for trial in level.waiting}
        for place, trial in enumerate(ranked[len(ranked) - quarter :] if donors else [], start=1):
            generator = stream(self.seed, Purpose.PERTURBATION, level.number << 32 | place)
            donor = donors[generator.integers(len(donors))]
            difference = paired(trial.now, donor.now)
            verdicts[trial.name] = Verdict(
                "exploit",
                f"in the worst quarter: {_shown(difference)} to {donor.name}",
                donor.name,
                self.moved(donor.point, generator),
                difference,
            )
        return Decided(verdicts)


def rungs(kind: str, steps: int) -> tuple[int, tuple[float, ...]]:
    """Steps between evaluations, and a scheduler's levels as shares of the steps: each is an evaluation.

    Raises:
        UserError: too few steps for the levels to be apart.
    """
    every = max(1, round(steps / 9))
    if kind == "none":
        return every, (1.0,)
    if steps < LEAST_STEPS:
        raise UserError(
            f"trainer.steps {steps}: scheduler: {kind} decides at ninths of a trial; take at least "
            f"run.trainer.steps={LEAST_STEPS}, or scheduler: none"
        )
    if kind == "pbt":
        return every, (*(step / steps for step in range(every, steps, every)), 1.0)
    return every, (every / steps, 3 * every / steps, 1.0)


def levels_of(search: SearchConfig, steps: int) -> tuple[float, ...]:
    """Where the scheduler of a search decides, as shares of a trial; a budget in tokens has its levels at ninths.

    Raises:
        UserError: too few steps.
    """
    if not search.tokens:
        return rungs(search.scheduler, steps)[1]
    ninths = tuple(number / 9 for number in range(1, 9))
    return {"none": (1.0,), "pbt": (*ninths, 1.0)}.get(search.scheduler, SHARES)


def make_scheduler(search: SearchConfig, space: Space, steps: int) -> Scheduler:
    """The scheduler that a search file names, for trials of so many steps.

    Raises:
        UserError: too few steps, or a space that it cannot serve.
    """
    levels = levels_of(search, steps)
    if search.scheduler == "pbt":
        space.check_live()
        return PBT(space.moved, search.seed, levels)
    if search.scheduler == "none":
        return Plain(levels)
    return Halving(levels) if search.scheduler == "halving" else ASHA(levels)


def _all_go(level: Level) -> Decided:
    return Decided({trial.name: Verdict("go") for trial in level.waiting}, level.slack)


def _mean(trial: Standing) -> float:
    return _mean_of(trial.utility)


def _mean_of(utility: np.ndarray) -> float:
    """-inf without a value."""
    mean = mean_of(utility)
    return -math.inf if mean is None else mean


def _shown(difference: tuple[float, float, float]) -> str:
    return "difference {:+.4g} ({:+.4g} to {:+.4g})".format(*difference)
