"""The course of a search: who is asked, who goes on, who is cut, what comes last.

A `Course` knows nothing of Ray. All it is stands in its ledger: each decision is a line, written before it is acted on,
and `_apply` is the one place where a line changes anything. So a course that is made from the lines of a killed search
is where that one was, and goes on by deciding what it had not decided yet.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from rl_llm.search.compare import mean_of, paired
from rl_llm.search.ledger import Ledger
from rl_llm.search.schedulers import Level, Scheduler, Standing
from rl_llm.search.searchers import Outcome, Searcher
from rl_llm.search.space import Point

Role = Literal["trial", "control", "finalist", "soup"]
State = Literal["going", "waiting", "done", "stopped", "failed"]

OVER: tuple[State, ...] = ("done", "stopped", "failed")
# What runs first where there is room for one: the search itself, then its result, then what it is compared with.
ORDER: tuple[Role, ...] = ("trial", "finalist", "control", "soup")


@dataclass(frozen=True)
class Report:
    """What a trial tells at an evaluation. Plain JSON.

    Attributes:
        step: steps done.
        tokens: generated so far, in rollouts and in evaluations.
        seconds: that the trial has taken so far.
        utility: a value a prompt of the tune split, [P], None where there is none; empty without a utility.
        metrics: means over these prompts by metric.
        reward: the mean training reward of each step since the last report.
        ended: why the trial trains no further by itself ("finished", "stopped_early"), empty where it would.
        failed: why it cannot, empty where it can.
    """

    step: int
    tokens: int
    seconds: float
    utility: list[float | None]
    metrics: dict[str, float | None]
    reward: list[float] = field(default_factory=list)
    ended: str = ""
    failed: str = ""

    @property
    def mean(self) -> float | None:
        """Of the utility; None without a value."""
        return mean_of(self.utility)


@dataclass
class Entry:
    """A trial of any role, as far as it has come.

    Attributes:
        name: also of its run directory.
        point: what of the run's settings it has; for a soup the share of each control by its name.
        seed: its trainer.seed; None for that of the search's run.
        source: who proposed the point.
        bracket: trials of one are compared with each other.
        level: number of the level that it is on the way to, or waits at.
        donor: the trial whose checkpoint it goes on from next, with the step of that.
        reason: why it is over.
    """

    name: str
    role: Role
    point: Point
    seed: int | None = None
    source: str = ""
    bracket: int = 0
    level: int = 0
    state: State = "going"
    reports: list[Report] = field(default_factory=list)
    donor: tuple[str, int] | None = None
    failures: int = 0
    reason: str = ""
    told: bool = False

    @property
    def best(self) -> Report | None:
        """Its best evaluation by utility, the first of equals; the last one without a utility."""
        ranked = [report for report in self.reports if report.mean is not None]
        if not ranked:
            return self.reports[-1] if self.reports else None
        return max(ranked, key=lambda report: report.mean or 0.0)

    @property
    def utility(self) -> np.ndarray:
        """[P] of its best evaluation, NaN where there is none."""
        best = self.best
        return np.array([] if best is None else [np.nan if u is None else u for u in best.utility], dtype=np.float64)


@dataclass(frozen=True)
class Plan:
    """How many of everything, and in which order.

    Attributes:
        trials: to be searched.
        bracket: trials asked together; the next ones when all of these are told.
        firsts: (source, point) pairs to try before the searcher's own.
        controls: asked at the beginning, run where there is room.
        finalists: best trials to be run again, each on all of `seeds`.
        soups: the trials to be asked when the controls are done, made of them.
        budget: steps, or generated tokens, that a trial has in all.
        in_tokens: whether the budget is in tokens.
        overoptimized: see `SearchConfig`.
    """

    trials: int
    bracket: int
    firsts: list[tuple[str, Point]]
    controls: list[Entry]
    finalists: int
    seeds: list[int]
    soups: Callable[[Sequence[Entry]], list[Entry]]
    budget: int
    in_tokens: bool = False
    overoptimized: int | None = None


class Course:
    """Where a search is. Feed it `report` and `fail`; ask it what is `going`, and whether it is `over`.

    Args:
        ranked: whether there is a utility; without one nothing is compared and nobody is a finalist.
        ledger: of an earlier start, or empty.
    """

    def __init__(self, plan: Plan, searcher: Searcher, scheduler: Scheduler, ranked: bool, ledger: Ledger) -> None:
        self.plan, self.searcher, self.scheduler, self.ranked, self.ledger = plan, searcher, scheduler, ranked, ledger
        self.entries: dict[str, Entry] = {}
        self.slack: dict[int, float] = {}
        self.finalists: list[str] | None = None
        self.exhausted = False
        for line in ledger.lines:
            self._apply(line)
        self._decide()

    # What others see.

    @property
    def going(self) -> list[Entry]:
        """Trials with something to do, the most urgent first."""
        going = [entry for entry in self.entries.values() if entry.state == "going"]
        # Who copies another's checkpoint goes before that one makes newer ones.
        return sorted(going, key=lambda entry: (ORDER.index(entry.role), entry.donor is None, -entry.level))

    @property
    def over(self) -> bool:
        """Whether everything that was to be done is."""
        return all(entry.state in OVER for entry in self.entries.values())

    def of(self, role: Role) -> list[Entry]:
        return [entry for entry in self.entries.values() if entry.role == role]

    def report(self, name: str, report: Report) -> State:
        """Take a trial's report and decide what follows from it; returns what becomes of the trial now."""
        self._note(report=name, **asdict(report))
        self._decide()
        return self.entries[name].state

    def fail(self, name: str, reason: str, again: bool) -> None:
        """A trial has crashed or hung; `again`: it is tried again from its last checkpoint."""
        self._note(fail=name, reason=reason, again=again)
        self._decide()

    # Decisions.

    def _note(self, **line: Any) -> None:
        self.ledger.write(line)
        self._apply(line)

    def _decide(self) -> None:
        """Decide all that can be decided now."""
        while self._schedule() or self._tell() or self._ask() or self._finish():
            pass

    def _schedule(self) -> bool:
        """Let the scheduler decide on trials that wait; whether it did."""
        trials = self.of("trial")
        for bracket in sorted({entry.bracket for entry in trials}):
            members = [entry for entry in trials if entry.bracket == bracket]
            for number in range(len(self.scheduler.levels)):
                waiting = [entry for entry in members if entry.state == "waiting" and entry.level == number]
                if not waiting:
                    continue
                level = Level(
                    number,
                    [self._standing(entry) for entry in waiting],
                    coming=sum(entry.state == "going" and entry.level <= number for entry in members)
                    + sum(entry.state == "waiting" and entry.level < number for entry in members),
                    before=[self._standing(entry) for entry in members if entry.level > number],
                    slack=self.slack.get(bracket, 0.0),
                    budget=self.plan.budget,
                    in_tokens=self.plan.in_tokens,
                )
                decided = self.scheduler.decide(level)
                if decided is not None:
                    verdicts = {name: asdict(verdict) for name, verdict in decided.verdicts.items()}
                    self._note(level=number, bracket=bracket, slack=decided.slack, verdicts=verdicts)
                    return True
        return False

    def _standing(self, entry: Entry) -> Standing:
        last = entry.reports[-1]
        return Standing(
            entry.name,
            entry.utility,
            price=last.tokens / max(last.step, 1),
            spent=last.tokens,
            step=last.step,
            point=entry.point,
            ended=bool(last.ended),
        )

    def _tell(self) -> bool:
        """Tell the searcher of a trial that is over; whether there was one."""
        for entry in self.of("trial"):
            if entry.state in OVER and not entry.told:
                best = entry.best
                self._note(tell=entry.name, state=entry.state, metrics={} if best is None else best.metrics)
                return True
        return False

    def _ask(self) -> bool:
        """Ask for the next bracket of trials, controls with the first; whether somebody was asked."""
        trials = self.of("trial")
        if not self.entries:
            for control in self.plan.controls:
                self._note(ask=control.name, **_asked(control))
        elif any(not entry.told for entry in trials):
            return False
        if self.exhausted or len(trials) >= self.plan.trials:
            return False
        bracket = max((entry.bracket for entry in trials), default=-1) + 1
        for number in range(len(trials), min(len(trials) + self.plan.bracket, self.plan.trials)):
            source, given = self.plan.firsts[number] if number < len(self.plan.firsts) else ("", None)
            point = self.searcher.ask(number, given)
            if point is None:
                self._note(exhausted=number)
                break
            entry = Entry(f"t{number:02d}", "trial", point, source=source or self.searcher.name, bracket=bracket)
            self._note(ask=entry.name, **_asked(entry))
        return True

    def _finish(self) -> bool:
        """Choose finalists when the search is over, and mix soups when the controls are; whether either was done."""
        controls = self.of("control")
        if not self.of("soup") and all(entry.state in OVER for entry in controls):
            soups = self.plan.soups([entry for entry in controls if entry.state == "done"])
            for soup in soups:
                self._note(ask=soup.name, **_asked(soup))
            if soups:
                return True
        if self.finalists is not None or any(not entry.told for entry in self.of("trial")):
            return False
        done = [entry for entry in self.of("trial") if entry.state == "done" and mean_of(entry.utility) is not None]
        best = sorted(done, key=lambda entry: -(mean_of(entry.utility) or 0.0)) if self.ranked else []
        chosen = best[: self.plan.finalists]
        self._note(finalists=[entry.name for entry in chosen])
        for seed in self.plan.seeds:
            for entry in chosen:
                again = Entry(f"final-{entry.name}-s{seed}", "finalist", entry.point, seed, source=entry.name)
                self._note(ask=again.name, **_asked(again))
        return True

    # What a line changes.

    def _apply(self, line: dict[str, Any]) -> None:
        if "ask" in line:
            self._apply_ask(line)
        elif "report" in line:
            self._apply_report(line)
        elif "level" in line:
            self._apply_level(line)
        elif "tell" in line:
            entry = self.entries[line["tell"]]
            entry.told = True
            number = int(entry.name.removeprefix("t"))
            self.searcher.tell(number, Outcome(line["state"], entry.point, line["metrics"], mean_of(entry.utility)))
        elif "fail" in line:
            entry = self.entries[line["fail"]]
            entry.failures += 1
            if not line["again"]:
                entry.state, entry.reason = "failed", line["reason"]
        elif "finalists" in line:
            self.finalists = line["finalists"]
        elif "exhausted" in line:
            self.exhausted = True

    def _apply_ask(self, line: dict[str, Any]) -> None:
        entry = Entry(line["ask"], **{key: line[key] for key in ("role", "point", "seed", "source", "bracket")})
        self.entries[entry.name] = entry
        if entry.role == "trial":
            self.searcher.asked(int(entry.name.removeprefix("t")), entry.point)

    def _apply_report(self, line: dict[str, Any]) -> None:
        entry = self.entries[line["report"]]
        report = Report(**{key: value for key, value in line.items() if key != "report"})
        # A trial that was killed repeats what it had not saved, with the same numbers.
        entry.reports = [*(earlier for earlier in entry.reports if earlier.step < report.step), report]
        entry.donor = None
        if report.failed:
            entry.state, entry.reason = "failed", report.failed
        elif self.ranked and report.mean is None:
            entry.state, entry.reason = "failed", f"no utility at step {report.step}: no prompt has a value"
        elif entry.role != "trial":
            entry.state, entry.reason = ("done", report.ended) if report.ended else ("going", "")
        elif report.ended or self._spent(report) >= self.scheduler.levels[entry.level] * self.plan.budget:
            entry.state = "waiting"
        elif self._overoptimized(entry):
            entry.state, entry.reason = "stopped", "its reward rose while its utility fell"

    def _apply_level(self, line: dict[str, Any]) -> None:
        self.slack[line["bracket"]] = line["slack"]
        for name, verdict in line["verdicts"].items():
            entry, action = self.entries[name], verdict["action"]
            ended = entry.reports[-1].ended
            if action == "stop":
                entry.state, entry.reason = "stopped", verdict["reason"]
                continue
            entry.level += 1
            if entry.level == len(self.scheduler.levels):
                entry.level -= 1
                entry.state, entry.reason = "done", ended or "finished"
            elif ended and action != "exploit":
                entry.state = "waiting"  # it is trained no further, and stands at the next level with what it has
            else:
                entry.state = "going"
            if action == "exploit":
                donor = self.entries[verdict["donor"]]
                entry.point, entry.donor = verdict["point"], (donor.name, donor.reports[-1].step)

    def _spent(self, report: Report) -> int:
        return report.tokens if self.plan.in_tokens else report.step

    def _overoptimized(self, entry: Entry) -> bool:
        """Whether over the last evaluations the training reward has risen and the utility fallen, by intervals."""
        span = self.plan.overoptimized
        if span is None or not self.ranked or len(entry.reports) <= span:
            return False
        then, now = entry.reports[-1 - span], entry.reports[-1]
        fallen = paired(_column(now.utility), _column(then.utility))[2] < 0
        return fallen and _risen(np.array(then.reward), np.array(now.reward))


def _asked(entry: Entry) -> dict[str, Any]:
    return {key: getattr(entry, key) for key in ("role", "point", "seed", "source", "bracket")}


def _column(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _risen(then: np.ndarray, now: np.ndarray) -> bool:
    """Whether the mean of one stretch of steps is above that of another beyond the 95 % interval of the difference."""
    if min(len(then), len(now)) < 2:
        return False
    error = np.sqrt(then.var(ddof=1) / len(then) + now.var(ddof=1) / len(now))
    return bool(now.mean() - then.mean() > 1.96 * error)
