"""Trials that train nothing: what they report follows from their point, their seed and the step alone."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rl_llm.rng import Purpose, stream
from rl_llm.search.config import SearchConfig, build_search
from rl_llm.search.course import Course, Entry, Report
from rl_llm.search.ledger import Ledger
from rl_llm.search.plan import make_course, make_space
from rl_llm.search.schedulers import rungs
from rl_llm.search.space import Space
from rl_llm.values import to_json

PROMPTS = 16
RUN: dict[str, Any] = {
    "rewards": {"components": ["chrf", "length", "vocab"]},
    "policy": {"model": "nowhere"},
    "trainer": {"steps": 9},
}
SIMPLEX = {"rewards.weights": {"simplex": ["chrf", "length", "vocab"]}}

Change = Callable[[Report], Report]


def make_search(**settings: Any) -> SearchConfig:
    """A search of 6 trials with a utility; keys go over it, `run` section by section."""
    run = {**RUN, **settings.pop("run", {})}
    base = {"run": run, "space": SIMPLEX, "trials": 6, "utility": {"chrf": 1}, "finalists": 1, "seeds": 1}
    return build_search({**base, **settings})


def course_of(search: SearchConfig, lines: Sequence[Mapping[str, Any]] = (), space: Space | None = None) -> Course:
    ledger = Ledger()
    ledger.lines = [dict(line) for line in lines]
    return make_course(search, space or make_space(search), [], ledger)


def quality(point: Mapping[str, Any]) -> float:
    """Best where chrf has 0.6 of the weight."""
    weights = point.get("rewards.weights", {})
    return 1 - (weights.get("chrf", 0.5) - 0.6) ** 2 if weights else 0.5


def next_report(search: SearchConfig, entry: Entry, spread: float = 0.1) -> Report:
    """What a trial tells at its next evaluation."""
    steps = search.run["trainer"]["steps"]
    every, _ = rungs(search.scheduler, steps)
    done = entry.donor[1] if entry.donor else entry.reports[-1].step if entry.reports else 0
    step = min(done + every, steps)
    if entry.role == "soup":
        step = done
    who = zlib.crc32(to_json([entry.point, entry.seed, entry.name]).encode())
    noise = stream(who, Purpose.BOOTSTRAP, step).normal(size=PROMPTS)
    utility = quality(entry.point) * step / steps + spread * noise
    price = 100 + who % 50
    over = step >= steps or entry.role == "soup"
    return Report(
        step,
        tokens=price * step,
        seconds=float(step),
        utility=utility.tolist(),
        metrics={"chrf": float(utility.mean()), "length": float(-utility.std())},
        reward=[float(step)] * 3,
        ended="finished" if over else "",
    )


def drive(
    search: SearchConfig,
    course: Course,
    pick: Callable[[list[Entry]], Entry] = lambda going: going[0],
    changes: Mapping[str, Change] | None = None,
    reports: int = 1000,
) -> Course:
    """Run what is going, a report at a time, until the course is over or there are as many as asked for.

    Args:
        changes: made to reports, by trial.
    """
    for _ in range(reports):
        going = course.going
        if not going:
            assert course.over
            return course
        entry = pick(going)
        report = next_report(search, entry)
        change = (changes or {}).get(entry.name)
        course.report(entry.name, report if change is None else change(report))
    assert reports < 1000, "the course comes to no end"
    return course


def in_order_of(generator: np.random.Generator) -> Callable[[list[Entry]], Entry]:
    """Any of those that are going may be the next to report."""
    return lambda going: going[generator.integers(len(going))]


def decisions(course: Course) -> list[str]:
    """What was decided, whenever: all lines but those of reports, in an order of their own."""
    return sorted(to_json(line) for line in course.ledger.lines if "report" not in line)
