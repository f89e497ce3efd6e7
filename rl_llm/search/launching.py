"""A whole search: checks, what its trials share, their course on Ray Tune, and what is left of it."""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray.cloudpickle
from ray import tune

from rl_llm.config import build_config
from rl_llm.config.yaml12 import write_yaml
from rl_llm.errors import Interrupted, RunFailed, UserError, option
from rl_llm.files import room_for, write_text
from rl_llm.imports import places
from rl_llm.launch.alone import one_at_a_time
from rl_llm.launch.preflight import Plan, describe, make_plan, refuse_unwritable
from rl_llm.launch.record import Note, prepare_base, reporting
from rl_llm.launch.signals import stop_between_steps, terminable
from rl_llm.process import absolute, own_modes
from rl_llm.runs import checkpoint
from rl_llm.runs.directory import LOCK, locked, refuse_held
from rl_llm.runs.forecasts import FORECAST
from rl_llm.runs.output import shielded
from rl_llm.runs.writer import write_summary
from rl_llm.runtime import connected
from rl_llm.runtime.cluster import slot_bundles, slots_that_fit
from rl_llm.search.config import SearchConfig, read_search
from rl_llm.search.console import SearchConsole, make_search_console
from rl_llm.search.course import Course
from rl_llm.search.following import Endings, Follower, Followers
from rl_llm.search.forecast import forecast
from rl_llm.search.forecasting import TABLE
from rl_llm.search.ledger import DECISIONS, Ledger
from rl_llm.search.plan import check_search, evaluation_every, make_course, make_space, trials_of, utility_of
from rl_llm.search.preparing import prepare, refuse_no_room
from rl_llm.search.reader import BASE, SEARCH
from rl_llm.search.samples import check_prompts
from rl_llm.search.sampling import read_samples, samples_of
from rl_llm.search.search import Search
from rl_llm.search.slot import STOP, Shared
from rl_llm.search.space import WEIGHTS, Point, Space
from rl_llm.search.trial import Trial
from rl_llm.search.tuning import STORAGE, Slots, run_on_tune
from rl_llm.tasks import Task
from rl_llm.values import to_json

GUESSES = 2
"""Points to try first that come from the forecast."""

# What a search that goes on may have otherwise: it changes no result.
FREE = re.compile(
    r"concurrent|max_failures|silent_s|run\.logging\.|run\.resources\.|"
    r"run\.(rewards\.components|evaluation\.metrics)\.[^.]+\.cache$"
)
THREADS = "run.resources.threads"  # floats follow it

Functions = Mapping[str, Callable[..., Any]]


@one_at_a_time
@own_modes()
@shielded()
def run_search(
    search: SearchConfig,
    path: Path,
    *,
    resume: bool = False,
    functions: Functions | None = None,
    task: Task | None = None,
    followers: Sequence[Follower] = (),
    console: SearchConsole | None = None,
) -> Search:
    """Search as configured in the directory `path`, and return what was found.

    Args:
        resume: go on where an earlier start in the directory has come to; begin where there was none.
        functions: reward functions given as they are, by component.
        task: prompts made already, in place of `run.task`.
        followers: beside the console, which is one too.

    Raises:
        UserError: something has to be changed first; nothing was started.
        RunFailed: the search could not go on, or every trial of it has failed.
        Interrupted: SIGINT or SIGTERM; resume to go on.
    """
    path = absolute(path)
    space, plan = plan_search(search, functions or {}, task)
    find_search(search, space, plan, path, resume)
    console = console or make_search_console()
    all_followers = Followers([Endings(), console, *followers], path)
    try:
        with room_for(path), locked(path):
            (path / STOP).unlink(missing_ok=True)
            shutil.rmtree(path / STORAGE, ignore_errors=True)  # of a start that was killed
            with connected(plan.config.resources, search.concurrent or 1), terminable():
                refuse_no_room(plan.config.resources)
                return _run(search, space, plan, path, all_followers)
    finally:
        console.close()


def plan_search(search: SearchConfig, functions: Functions, task: Task | None = None) -> tuple[Space, Plan]:
    """The space, and the plan of the run that trials are made from. Raises `UserError` as they, and as the course."""
    space = make_space(search)
    check_search(search, space)
    settings = space.base.to_dict()
    every = evaluation_every(search, space.base)
    settings["evaluation"] |= {"every": every, "utility": utility_of(search, space.base), "controls": []}
    # A trial that waits goes on from a checkpoint of its evaluation; others may begin at it somewhat later.
    settings["checkpoint"] = {"every": every, "keep": max(settings["checkpoint"]["keep"], 2)}
    plan = make_plan(build_config(settings, where="run"), functions, task)
    make_course(search, space, [], Ledger())
    return space, plan


def dry_search(search: SearchConfig, output: Path | None, resume: bool) -> list[str]:
    """What a search would do, in lines, and everything checked that can be without starting anything."""
    space, plan = plan_search(search, {})
    if output is None:
        refuse_unwritable(Path("runs").absolute(), f"name an {option('output')}")
    else:
        refuse_held(absolute(output))
        find_search(search, space, plan, absolute(output), resume)
    return [write_yaml(resolved(search, space, plan)), *describe_search(search, space, plan)]


def describe_search(search: SearchConfig, space: Space, plan: Plan) -> list[str]:
    """The plan in lines."""
    bundles = slot_bundles(plan.config.resources)
    asks = " + ".join("{" + ", ".join(f"{name}: {amount:g}" for name, amount in b.items()) + "}" for b in bundles)
    lines = [line for line in describe(plan) if not line.startswith("rewards")]
    trials = trials_of(search, space)
    return [*lines, f"trials     {trials}, {search.searcher}, {search.scheduler}; each asks for {asks}"]


def find_search(search: SearchConfig, space: Space, plan: Plan, path: Path, resume: bool) -> None:
    """Raise `UserError` where a directory is something else's, or holds a search that this one does not go on with."""
    noted = path / SEARCH
    if not noted.is_file():
        left = {entry.name for entry in path.iterdir()} if path.is_dir() else {""} if path.exists() else set()
        if not left <= {LOCK}:
            raise UserError(f"{option('output')} {path} exists and is no search directory; name another one")
        refuse_unwritable(path, f"name another {option('output')}")
        return
    if not resume:
        raise UserError(
            f"{path} holds a search already; add {option('resume', 'True')} to go on with it, or name another "
            f"{option('output')}"
        )
    before, now = read_search(noted), resolved(search, space, plan)
    changed = [f"{key}: {old} -> {new}" for key, old, new in _differences(before, now)]
    if changed:
        raise UserError(
            f"{path} is a search with other settings, so it cannot be resumed with these: {'; '.join(changed)}. Take "
            f"the change back or name another {option('output')}"
        )


def resolved(search: SearchConfig, space: Space, plan: Plan) -> dict[str, Any]:
    """A search file that stands by itself: the run's settings are in it, with every default."""
    own = search.model_dump(mode="json", exclude={"recipe"})
    given = {key: value for key, value in own.items() if value not in (None, {})}
    return {**given, "trials": trials_of(search, space), "run": plan.config.to_dict()}


def _differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
    elif old != new and (key == THREADS or not FREE.match(key)):
        yield key, old, new


def _run(search: SearchConfig, space: Space, plan: Plan, path: Path, followers: Followers) -> Search:
    for line in describe_search(search, space, plan):
        followers.message(line)
    write_text(path / SEARCH, write_yaml(resolved(search, space, plan)))
    summary: dict[str, Any] = {"status": "failed", "reason": ""}
    course = None
    try:
        base, course = _begin(search, space, plan, path, followers)
        _go(search, plan, base, path, course, followers)
        summary["status"] = "finished"
    except UserError:  # nothing was started, and how an earlier start has ended stands
        summary.clear()
        raise
    except Interrupted:
        summary |= {"status": "interrupted", "reason": "asked to stop"}
        raise
    except KeyboardInterrupt:
        summary |= {"status": "interrupted", "reason": "stopped at once; the last checkpoints stand"}
        raise Interrupted("stopped at once, with the last checkpoints kept") from None
    except BaseException as error:
        summary["reason"] = str(error) if isinstance(error, RunFailed) else f"{type(error).__name__}: {error}"
        raise
    finally:
        if summary:
            reached = Search(path).course
            summary["finalists"] = reached.finalists or []
            summary["trials"] = {entry.name: entry.state for entry in reached.entries.values()}
            write_summary(path, summary)
        if summary and course is not None:
            followers.end(summary)
            _report(path, base if summary["status"] == "finished" else None, followers)
    return Search(path)


def _begin(search: SearchConfig, space: Space, plan: Plan, path: Path, followers: Followers) -> tuple[str, Course]:
    """What all trials share, made where it is not there yet: the base policy's folder, and the course where it is."""
    found, _ = checkpoint.find(path / BASE / "checkpoints")
    base = prepare_base(plan, path / BASE, found, followers.message)
    samples = search.forecast if _can_forecast(search, space, plan, followers.message) else 0
    prepare(plan, base, path, samples, followers.message)
    guesses = _guesses(search, space, plan, path, samples)
    ledger = Ledger(path / DECISIONS)
    followers.began_with(len(ledger.lines))
    course = make_course(search, space, guesses, ledger)
    # One of an earlier start would say of a search under way that it had ended.
    (path / "summary.json").unlink(missing_ok=True)
    followers.start(course)
    return base, course


def _report(path: Path, base: str | None, followers: Followers) -> None:
    """The report; with a `base`, models of the front are exported before."""
    with reporting(path, followers.message):
        found = Search(path)
        if base is not None:
            found.export(base, followers.message)
        found.report()


def _go(search: SearchConfig, plan: Plan, base: str, path: Path, course: Course, followers: Followers) -> None:
    """From where the course is to its end."""
    resources = plan.config.resources
    shared = Shared(
        path=path,
        settings=plan.config.to_dict(),
        plan=replace(plan, tokenizer=None),
        base=base,
        ranked=course.ranked,
        tokens=search.tokens,
        silent_s=search.silent_s,
    )
    # As bytes: where modules of the user's lie has to be known before anything of them is unpickled.
    trainable = tune.with_parameters(Trial, places=places(), shared=ray.cloudpickle.dumps(shared))
    concurrent = search.concurrent or max(slots_that_fit(resources), 1)
    slots = Slots(course, path, concurrent, search.max_failures, resources.wait_s, followers.look)
    with _no_stop_file(path), stop_between_steps(slots):
        run_on_tune(slots, trainable, slot_bundles(resources))
    if slots.stopping:
        raise Interrupted("stopped and saved")
    failed = [entry for entry in course.of("trial") if entry.state == "failed"]
    if failed and len(failed) == len(course.of("trial")):
        raise RunFailed(f"every trial has failed; the first, {failed[0].name}: {failed[0].reason}")


@contextmanager
def _no_stop_file(path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        (path / STOP).unlink(missing_ok=True)


# The forecast.


def _can_forecast(search: SearchConfig, space: Space, plan: Plan, note: Note) -> bool:
    if not search.forecast or space.simplex is None or search.searcher == "grid":
        return False
    try:
        check_prompts(min(plan.task.splits["tune"].num_rows, plan.config.evaluation.prompts))
    except UserError as error:
        note(f"note       no forecast: {error}")
        return False
    return True


def _guesses(search: SearchConfig, space: Space, plan: Plan, path: Path, samples: int) -> list[Point]:
    """Points that the forecast would try first, the best first."""
    table = read_samples(path / TABLE, plan, samples) if samples else None
    if table is None or space.simplex is None:
        return []
    found = forecast(samples_of(table), plan.config, list(space.simplex.members), utility_of(search, space.base))
    write_text(path / FORECAST, to_json(found.to_dict()) + "\n")
    nearest = [space.nearest({WEIGHTS: weights})[WEIGHTS] for weights in found.best_points(GUESSES)]
    return [{WEIGHTS: weights} for weights in nearest if weights is not None]
