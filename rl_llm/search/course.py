"""The course of a search: who is asked, who goes on, who is cut, what comes last.

A `Course` knows nothing of Ray. All it is stands in its ledger: each decision is a line, written before it is acted on,
and `_apply` is the one place where a line changes anything. So a course that is made from the lines of a killed search
is where that one was, and goes on by deciding what it had not decided yet.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from rl_llm.search.compare import column, mean_of, paired
from rl_llm.search.ledger import Ledger
from rl_llm.search.schedulers import Level, Scheduler, Standing
from rl_llm.search.searchers import Outcome, Searcher
from rl_llm.search.space import Point

Role = Literal["trial", "control", "finalist", "soup"]
State = Literal["going", "waiting", "done", "stopped", "failed"]

OVER: tuple[State, ...] = ("done", "stopped", "failed")
# What runs first where there is room for one: the search itself, then its result, then what it is compared with.
ORDER: tuple[Role, ...] = ("trial", "finalist", "control", "soup")
ASKED = ("role", "point", "seed", "source", "bracket")
"""What of an entry its line has."""


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
        since: the step after which it has had its point; reports up to it are of another one.
        stood: its step at each level that it has been decided on at.
        ended: why it trains no further by itself, empty where it would.
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
    since: int = -1
    stood: list[int] = field(default_factory=list)
    failures: int = 0
    ended: str = ""
    reason: str = ""
    told: bool = False

    @property
    def own(self) -> list[Report]:
        """Reports of its present point."""
        return [report for report in self.reports if report.step > self.since]

    @property
    def best(self) -> Report | None:
        """Its best evaluation by utility, the first of equals; the last one without a utility."""
        return _best(self.own)

    @property
    def utility(self) -> np.ndarray:
        """[P] of its best evaluation, NaN where there is none."""
        best = self.best
        return column([] if best is None else best.utility)


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
    overoptimized: int = 0


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
        self._apply(self.ledger.write(line))

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
                    before=[
                        self._standing(entry, entry.stood[number]) for entry in trials if len(entry.stood) > number
                    ],
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

    def _standing(self, entry: Entry, until: int | None = None) -> Standing:
        """Where a trial is, or where it was at a step."""
        reports = [report for report in entry.own if until is None or report.step <= until]
        last, best = reports[-1], _best(reports)
        return Standing(
            entry.name,
            column([] if best is None else best.utility),
            column(last.utility),
            price=last.tokens / max(last.step, 1),
            spent=last.tokens,
            step=last.step,
            point=entry.point,
            ended=bool(entry.ended),
        )

    def _tell(self) -> bool:
        """Tell the searcher of a trial that is over; whether there was one."""
        for entry in self.of("trial"):
            if entry.state in OVER and not entry.told:
                best = entry.best
                self._note(tell=entry.name, state=entry.state, metrics={} if best is None else best.metrics)
                return True
        return False

    # What follows is asked one by one: a kill may come between any two.

    def _ask(self) -> bool:
        """Ask for a control, or a trial of the bracket, or of the next one when all are told; whether there was one."""
        for control in self.plan.controls:
            if self._asked(control):
                return True
        trials = self.of("trial")
        number = len(trials)
        if number >= self.plan.trials:
            return False
        if number % self.plan.bracket == 0 and any(not entry.told for entry in trials):
            return False
        source, given = self.plan.firsts[number] if number < len(self.plan.firsts) else ("", None)
        point = self.searcher.ask(number, given)
        bracket = number // self.plan.bracket
        return self._asked(
            Entry(f"t{number:02d}", "trial", point, source=source or self.searcher.name, bracket=bracket)
        )

    def _finish(self) -> bool:
        """Mix soups when the controls are over, and choose finalists when the search is; whether there was one."""
        controls = self.of("control")
        if all(entry.state in OVER for entry in controls):
            for soup in self.plan.soups([entry for entry in controls if entry.state == "done"]):
                if self._asked(soup):
                    return True
        if self.finalists is None:
            if any(not entry.told for entry in self.of("trial")):
                return False
            # Those that came furthest first: of few trials halving leaves one, and a second is to be run again too.
            known = [
                entry for entry in self.of("trial") if entry.state != "failed" and mean_of(entry.utility) is not None
            ]
            best = sorted(known, key=lambda entry: (-len(entry.stood), -(mean_of(entry.utility) or 0.0)))
            best = best if self.ranked else []
            self._note(finalists=[entry.name for entry in best[: self.plan.finalists]])
            return True
        for seed in self.plan.seeds:
            for name in self.finalists:
                point = self.entries[name].point
                if self._asked(Entry(f"final-{name}-s{seed}", "finalist", point, seed, source=name)):
                    return True
        return False

    def _asked(self, entry: Entry) -> bool:
        """Ask for a trial, unless it has been asked for already; whether it was."""
        if entry.name in self.entries:
            return False
        self._note(ask=entry.name, **{key: getattr(entry, key) for key in ASKED})
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
            steps = entry.reports[-1].step if entry.reports else 0
            outcome = Outcome(line["state"], entry.point, line["metrics"], mean_of(entry.utility), steps)
            self.searcher.tell(number, outcome)
        elif "fail" in line:
            entry = self.entries[line["fail"]]
            entry.failures += 1
            if not line["again"]:
                entry.state, entry.reason = "failed", line["reason"]
        elif "finalists" in line:
            self.finalists = line["finalists"]

    def _apply_ask(self, line: dict[str, Any]) -> None:
        entry = Entry(line["ask"], **{key: line[key] for key in ASKED})
        self.entries[entry.name] = entry
        if entry.role == "trial":
            self.searcher.asked(int(entry.name.removeprefix("t")), entry.point)

    def _apply_report(self, line: dict[str, Any]) -> None:
        entry = self.entries[line["report"]]
        report = Report(**{key: value for key, value in line.items() if key != "report"})
        # A trial that was killed repeats what it had not saved, with the same numbers.
        entry.reports = [*(earlier for earlier in entry.reports if earlier.step < report.step), report]
        entry.donor, entry.ended = None, report.ended
        if report.failed:
            entry.state, entry.reason = "failed", report.failed
        elif self.ranked and report.mean is None:
            entry.state, entry.reason = "failed", f"no utility at step {report.step}: no prompt has a value"
        elif entry.role != "trial":
            entry.state, entry.reason = ("done", report.ended) if report.ended else ("going", "")
        if entry.role != "trial" or entry.state == "failed":
            return
        if self._overoptimized(entry):
            entry.ended = entry.ended or "its reward rose while its utility fell"
        entry.state = "waiting" if entry.ended or self._reached(entry) else "going"

    def _apply_level(self, line: dict[str, Any]) -> None:
        self.slack[line["bracket"]] = line["slack"]
        for name, verdict in line["verdicts"].items():
            entry, action = self.entries[name], verdict["action"]
            entry.stood.append(entry.reports[-1].step)
            if action == "stop":
                entry.state, entry.reason = "stopped", verdict["reason"]
            elif entry.level == len(self.scheduler.levels) - 1:
                entry.state, entry.reason = "done", entry.ended or "finished"
            else:
                entry.level += 1
                if action == "exploit":
                    self._exploit(entry, self.entries[verdict["donor"]], verdict["point"])
                # Who trains no further stands at the next level with what it has.
                entry.state = "waiting" if entry.ended or self._reached(entry) else "going"

    def _exploit(self, entry: Entry, donor: Entry, point: Point) -> None:
        step = donor.reports[-1].step
        entry.point, entry.donor, entry.since, entry.ended = point, (donor.name, step), step, ""
        entry.reports = [report for report in entry.reports if report.step <= step]

    def _reached(self, entry: Entry) -> bool:
        """Whether a trial is at its level, or past it."""
        last = entry.own[-1:]
        share = self.scheduler.levels[entry.level] * (1 - 1e-9)  # shares are rounded
        return any((r.tokens if self.plan.in_tokens else r.step) >= share * self.plan.budget for r in last)

    def _overoptimized(self, entry: Entry) -> bool:
        """Whether over the last evaluations the training reward has risen and the utility fallen, by intervals."""
        span, reports = self.plan.overoptimized, entry.own
        if not span or not self.ranked or len(reports) <= span:
            return False
        then, now = reports[-1 - span], reports[-1]
        fallen = paired(column(now.utility), column(then.utility))[2] < 0
        return fallen and _risen(column(then.reward), column(now.reward))


def _best(reports: Sequence[Report]) -> Report | None:
    ranked = [report for report in reports if report.mean is not None]
    if not ranked:
        return reports[-1] if reports else None
    return max(ranked, key=lambda report: report.mean or 0.0)


def _risen(then: np.ndarray, now: np.ndarray) -> bool:
    """Whether the mean of one stretch of steps is above that of another beyond the 95 % interval of the difference."""
    if min(len(then), len(now)) < 2:
        return False
    error = np.sqrt(then.var(ddof=1) / len(then) + now.var(ddof=1) / len(now))
    return bool(now.mean() - then.mean() > 1.96 * error)
