"""Points, decisions and roles of a search in words, for the terminal and the report."""

from collections.abc import Iterator
from typing import Any

from rl_llm.runs.text import is_number, short
from rl_llm.search.course import Entry
from rl_llm.search.plan import CONTROLS, EQUAL, EVENEST, ONLY, RECIPE, SINGLE
from rl_llm.search.space import Point


def policy_of(entry: Entry) -> str:
    """What an entry is a run of, whichever its seed: the trial of a finalist, the control that is run on many seeds."""
    several = entry.role == "finalist" or entry.source in CONTROLS
    return entry.source if several and entry.role != "trial" else entry.name


def title_of(policy: str) -> str:
    """The name of a policy as people read it."""
    if policy.startswith(SINGLE):
        return f"{policy.removeprefix(SINGLE)} alone"
    if policy.startswith(ONLY):
        return f"only {policy.removeprefix(ONLY)} of the simplex"
    return {EQUAL: "equal weights", EVENEST: "the evenest mixture", RECIPE: "the recipe as it is"}.get(policy, policy)


def knobs(point: Point) -> Iterator[tuple[str, Any]]:
    """Each setting of a point by its dotted path, members of a simplex one by one."""
    for path, value in point.items():
        if isinstance(value, dict):
            yield from ((f"{path}.{name}", share) for name, share in value.items())
        else:
            yield path, value


def point_text(point: Point) -> str:
    """`chrf 0.7, length 0.3, lr 0.001`: each setting by the last part of its path."""
    return ", ".join(f"{path.rsplit('.', 1)[-1]} {value_text(value)}" for path, value in knobs(point))


def value_text(value: Any) -> str:
    return short(value) if is_number(value) and not isinstance(value, bool) else str(value)


def decision_lines(line: dict[str, Any]) -> list[str]:
    """A line of decisions.jsonl in words; nothing for a report and for what follows from another line."""
    if "ask" in line:
        return [_asked(line)]
    if "level" in line:
        return [f"{name}: {_verdict(verdict)}" for name, verdict in line["verdicts"].items()]
    if "fail" in line:
        then = "tried again" if line["again"] else "given up"
        return [f"{line['fail']} failed, {then}: {line['reason']}"]
    if "finalists" in line:
        names = ", ".join(line["finalists"])
        return [f"finalists: {names}" if names else "no finalists"]
    return []


def _asked(line: dict[str, Any]) -> str:
    seed = "" if line["seed"] is None else f", seed {line['seed']}"
    role = "" if line["role"] == "trial" else f"{line['role']}, "
    return f"{line['ask']} ({role}{line['source']}{seed}): {point_text(line['point']) or 'the run as it is'}"


def _verdict(verdict: dict[str, Any]) -> str:
    what = {"go": "goes on", "stop": "stopped", "exploit": f"goes on as {verdict['donor']}"}[verdict["action"]]
    if verdict["point"]:
        what += f" with {point_text(verdict['point'])}"
    return ", ".join(part for part in (what, verdict["reason"]) if part)
