"""From a search file to its course: the space, the points tried first, what runs beside it, and what has to fit."""

from collections.abc import Sequence
from itertools import combinations_with_replacement
from typing import Any

from rl_llm.config import TOKENS, UTILITY, RunConfig
from rl_llm.errors import UserError, did_you_mean
from rl_llm.rng import Purpose, stream
from rl_llm.search.config import SearchConfig, run_of
from rl_llm.search.course import Course, Entry, Plan
from rl_llm.search.dimensions import is_number
from rl_llm.search.ledger import Ledger
from rl_llm.search.schedulers import make_scheduler, rungs
from rl_llm.search.searchers import STARTUP, make_searcher
from rl_llm.search.space import WEIGHTS, Point, Space, put
from rl_llm.values import to_json

EQUAL, EVENEST, RECIPE = "equal", "evenest", "recipe"
CONTROLS = (EQUAL, EVENEST, RECIPE)
"""Sources of the control that finalists are compared with: equal weights; the simplex's mixture nearest to them, where
bounds or components outside it leave no equal ones; the run as it was configured, where there is no simplex."""
SINGLE, ONLY = "single-", "only-"
"""How names of controls begin that have one member of the simplex: by itself, or beside components outside it."""
# Denominator of the shares that soups have of single-reward models, by how many of these there are.
_DENOMINATORS = {2: 4, 3: 3}


def make_space(search: SearchConfig) -> Space:
    """The space of a search. Raises `UserError` as `Space`."""
    run = run_of(search)
    return Space(search.space, run.to_dict(), {**(utility_of(search, run) or {}), **search.objectives} or None)


def utility_of(search: SearchConfig, run: RunConfig) -> dict[str, float] | None:
    """What ranks trials, weight by metric: the search's own, else what the run's config names; None without one."""
    return search.utility or run.evaluation.utility


def trials_of(search: SearchConfig, space: Space) -> int:
    """How many trials a search has: as its file says, or as its grid has points. Raises `UserError` as `Space.grid`."""
    return len(space.grid()) if search.searcher == "grid" else search.trials


def check_search(search: SearchConfig, space: Space) -> None:
    """Raise `UserError` where parts of a search, each right by itself, do not go together."""
    run = space.base
    utility, known = utility_of(search, run), set(run.measured)
    for name in search.utility or {}:
        if name not in known:
            raise UserError(f"utility.{name}: no such metric; {did_you_mean(name, known)}")
    if search.utility == {} or (utility and not any(utility.values())):
        raise UserError("utility weighs nothing; give a metric a weight, such as utility: {chrf: 1}, or leave it out")
    for name in search.objectives:
        if name not in known | {UTILITY, TOKENS}:
            raise UserError(f"objectives.{name}: no such metric; {did_you_mean(name, known | {UTILITY, TOKENS})}")
    if utility is None:
        missing = "without a utility nothing ranks trials: give utility: {metric: weight}"
        if search.scheduler != "none":
            raise UserError(f"scheduler: {search.scheduler}: {missing}, or take scheduler: none, finalists: 0")
        if search.finalists:
            raise UserError(f"finalists: {search.finalists}: {missing}, or take finalists: 0")
        if search.searcher == "optuna" and (not search.objectives or UTILITY in search.objectives):
            raise UserError(f"searcher: optuna: {missing}, or objectives: {{metric: max or min}}")
    for path, spec in search.space.items():
        if "grid" in spec and search.searcher != "grid":
            raise UserError(f"space.{path}.grid: only searcher: grid goes through it; set that, or write choice")
    trials = trials_of(search, space)
    if search.searcher == "grid":
        if search.first:
            raise UserError("first: searcher: grid tries all of its points and no other; leave it out")
        if "trials" in search.model_fields_set and search.trials != trials:
            raise UserError(f"trials: {search.trials}, and the grid has {trials} points: write trials: {trials}")
    elif len(search.first) > trials:
        raise UserError(
            f"first: {len(search.first)} points, and there are {trials} trials; leave some out, or set "
            f"trials={len(search.first)} or more"
        )
    if "finalists" in search.model_fields_set and search.finalists > trials:
        raise UserError(f"finalists: {search.finalists} of {trials} trials; take finalists: {trials} or fewer")
    if search.scheduler == "pbt" and trials < 2:
        raise UserError("trials: 1: scheduler: pbt needs others to learn from; take 4 or more")


def evaluation_every(search: SearchConfig, run: RunConfig) -> int:
    """Steps between the evaluations of every trial, of whatever role: its levels are among them.

    A budget in tokens has its levels at the first evaluations at or past them, which come as the run's config says:
    how many steps a trial will have is not known before.

    Raises:
        UserError: too few steps.
    """
    return run.evaluation.every if search.tokens else rungs(search.scheduler, run.trainer.steps)[0]


def first_points(search: SearchConfig, space: Space, forecast: Sequence[Point]) -> list[tuple[str, Point]]:
    """(source, point) pairs that are tried before the searcher's own, each once, at most as many as there are trials.

    The user's own come first; then equal weights, the forecast's, and each face of the simplex. A grid has none. Paths
    that these do not name have the run's own value, or the nearest of the space. Where none is near they are drawn as
    the searcher's would be, and for population-based training always: it lives on members that differ.

    Raises:
        UserError: a point of the user's is not of the space.
    """
    if search.searcher == "grid":
        return []
    given = [("first", space.read(point, f"first[{i}]")) for i, point in enumerate(search.first)]
    equal = [(_equal(space), space.equal())] if space.simplex else []
    near = [{path: space.dimensions[path].nearest(value) for path, value in point.items()} for point in forecast]
    guessed = [("forecast", point) for point in near if None not in point.values()]
    faces = [
        (f"{'least' if point[WEIGHTS][name] else 'without'} {name}", point) for name, point in space.faces().items()
    ]
    own = {} if search.scheduler == "pbt" else space.nearest({})
    kept: list[tuple[str, Point]] = []
    for source, point in [*given, *equal, *guessed, *faces]:
        drawn = space.draw(stream(search.seed, Purpose.POINT, len(kept)))
        others = {path: drawn[path] if own.get(path) is None else own[path] for path in drawn}
        whole = {**others, **point}
        if whole not in [other for _, other in kept]:
            kept.append((source, whole))
    return kept[: search.trials]


def make_course(search: SearchConfig, space: Space, forecast: Sequence[Point], ledger: Ledger) -> Course:
    """The course of a search, where its ledger says it is.

    Args:
        forecast: points to try, the best first.

    Raises:
        UserError: parts of the search do not go together.
    """
    check_search(search, space)
    run = space.base
    seeds = [run.trainer.seed + number for number in range(1, search.seeds + 1)]
    trials = trials_of(search, space)
    plan = Plan(
        trials=trials,
        bracket=STARTUP if search.searcher == "optuna" else trials,
        firsts=first_points(search, space, forecast),
        controls=_controls(space, seeds if search.finalists else seeds[:1]) if search.controls else [],
        finalists=search.finalists,
        seeds=seeds,
        soups=soups,
        budget=search.tokens or run.trainer.steps,
        in_tokens=search.tokens is not None,
        overoptimized=search.overoptimized,
    )
    for source, point in [*plan.firsts, *((entry.name, entry.point) for entry in plan.controls)]:
        space.check(point, source)
    scheduler = make_scheduler(search, space, run.trainer.steps)
    ranked = utility_of(search, run) is not None
    return Course(plan, make_searcher(search, space), scheduler, ranked, ledger)


def _controls(space: Space, seeds: list[int]) -> list[Entry]:
    """Equal weights on the finalists' seeds and each single reward on one; without a simplex the run as it is."""
    if space.simplex is None:
        return [Entry(f"{RECIPE}-s{seed}", "control", {}, seed, source=RECIPE) for seed in seeds]
    source = _equal(space)
    equal = [Entry(f"{source}-s{seed}", "control", space.equal(), seed, source=source) for seed in seeds]
    singles = [
        Entry((SINGLE if len(_counting(space, point)) == 1 else ONLY) + name, "control", point, seeds[0], source=name)
        for name, point in space.singles().items()
    ]
    return [*equal, *singles]


def _equal(space: Space) -> str:
    """What the most equal weights of the simplex are."""
    counting = _counting(space, space.equal())
    return EQUAL if len({round(w, 9) if is_number(w) else to_json(w) for w in counting}) == 1 else EVENEST


def _counting(space: Space, point: Point) -> list[Any]:
    """The weights that are not 0 in a run at a point, those of components outside the simplex included."""
    return [weight for weight in put(space.settings, point)["rewards"]["weights"].values() if weight != 0]


def soups(done: Sequence[Entry]) -> list[Entry]:
    """Interpolations of single-reward models (rewarded soups, arXiv 2306.04488): a lattice of shares, corners left out.

    Args:
        done: controls; their names become those of the points.
    """
    names = [entry.name for entry in done if entry.name.startswith((SINGLE, ONLY))]
    parts = _DENOMINATORS.get(len(names), 2)
    mixed = [drawn for drawn in combinations_with_replacement(names, parts) if len(set(drawn)) > 1]
    return [
        Entry(
            f"soup-{i:02d}", "soup", {name: drawn.count(name) / parts for name in names if name in drawn}, source="soup"
        )
        for i, drawn in enumerate(mixed)
    ]
