"""The Python face: one call that trains, one that forecasts, one that searches."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from rl_llm.config import RunConfig, build_config, read_config
from rl_llm.errors import UserError, did_you_mean
from rl_llm.launch.preflight import FUNCTION, ROWS
from rl_llm.launch.training import run_training
from rl_llm.runs.callbacks import Callback
from rl_llm.runs.directory import run_directory
from rl_llm.runs.run import Run
from rl_llm.search.config import SearchConfig, build_search, read_search, run_of
from rl_llm.search.following import Follower
from rl_llm.search.forecast import Forecast
from rl_llm.search.forecasting import SAMPLES, run_forecast, settings_of
from rl_llm.search.launching import run_search
from rl_llm.search.search import Search
from rl_llm.tasks import Task, task_from_rows

Reward = str | Callable[..., Any]
Dataset = str | PathLike[str] | Iterable[Mapping[str, Any]]

SHORT = {"steps": ("trainer", "steps"), "seed": ("trainer", "seed"), "learning_rate": ("learner", "lr")}


def train(
    model: str | PathLike[str] | None = None,
    dataset: Dataset | None = None,
    rewards: Reward | Sequence[Reward] | Mapping[str, Reward] | None = None,
    weights: Mapping[str, float] | None = None,
    *,
    combine: str | None = None,
    recipe: str | PathLike[str] | None = None,
    output: str | PathLike[str] | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> Run:
    """Train a policy and return its run. Works in a script and in a notebook cell.

    Args:
        model: a Hugging Face folder or Hub name; None where the recipe builds one.
        dataset: a file, "hub:owner/name", "builtin:records", rows (dicts), a `datasets.Dataset` or a frame of pandas or
            another library that speaks Arrow.
        rewards: one or more components by id, "package.module:function", or functions with TRL's signature; a mapping
            names them.
        weights: lambda by component; 1 where not given.
        combine: "sum_then_normalize" or "normalize_then_sum".
        recipe: a packaged recipe or YAML file to start from.
        output: the run directory; default: runs/<time>.
        resume: go on with the run in `output`.
        callbacks: follow the run.
        settings: any other, sections as mappings: `rollout={"max_new_tokens": 32}`, `trainer={"steps": 50}`;
            `steps=50` and `seed=1` for short, `learning_rate` for `learner.lr`.

    Raises:
        UserError: something has to be changed first; nothing was started.
        RunFailed: the run could not go on.
    """
    raw = {} if recipe is None else read_config(Path(recipe))
    config, functions, task = _configured(train, raw, model, dataset, rewards, weights, combine, settings)
    with run_directory(None if output is None else Path(output)) as path:
        return run_training(config, path, resume=resume, functions=functions, task=task, callbacks=callbacks)


def search(
    source: str | PathLike[str] | None = None,
    *,
    model: str | PathLike[str] | None = None,
    dataset: Dataset | None = None,
    rewards: Reward | Sequence[Reward] | Mapping[str, Reward] | None = None,
    output: str | PathLike[str] | None = None,
    resume: bool = False,
    followers: Sequence[Follower] = (),
    **settings: Any,
) -> Search:
    """Search which weights, or any other settings, give the best policy. Works in a script and in a notebook cell.

    Args:
        source: a YAML file such as those of tune_configs/; None where `settings` say everything.
        model, dataset, rewards: as for `train`; they replace those of the run that trials are made from.
        output: the search's directory; default: runs/<file>-<time>.
        resume: go on with the search in `output`.
        followers: who follows it.
        settings: of a search file: `space={"rewards.weights": {"simplex": ["chrf", "length"]}}`, `recipe="quickstart"`,
            `run={"trainer": {"steps": 90}}`, `trials=12`, `utility={"chrf": 1}`, ...

    Raises:
        UserError: something has to be changed first; nothing was started.
        RunFailed: the search could not go on, or every trial of it has failed.
    """
    raw = {} if source is None else read_search(Path(source))
    for name, value in settings.items():
        if name not in SearchConfig.model_fields:
            hint = did_you_mean(name, [*SearchConfig.model_fields, *inspect.signature(search).parameters])
            raise UserError(f"search(): there is no {name!r}; {hint}")
        raw[name] = value
    functions, rows = _taken(_section(raw, "run"), model, dataset, rewards)
    config = build_search(raw)
    task = None if rows is None else task_from_rows(rows, run_of(config).task)
    stem = "search" if source is None else Path(source).stem
    with run_directory(None if output is None else Path(output), f"{stem}-") as path:
        return run_search(config, path, resume=resume, functions=functions, task=task, followers=followers)


def forecast(
    model: str | PathLike[str] | None = None,
    dataset: Dataset | None = None,
    rewards: Reward | Sequence[Reward] | Mapping[str, Reward] | None = None,
    weights: Mapping[str, float] | None = None,
    *,
    combine: str | None = None,
    recipe: str | PathLike[str] | None = None,
    samples: int = SAMPLES,
    kl: float | None = None,
    output: str | PathLike[str] | None = None,
    **settings: Any,
) -> Forecast:
    """Say before any training what each weighting of the rewards would come to, from the base policy's samples.

    Args:
        recipe: a packaged recipe, a YAML file or a run directory to start from.
        samples: completions a tune prompt.
        kl: nats a completion at which weightings are compared; default: 1, or half of log(samples / 4) where less.
        output: directory for forecast.parquet, .json and .html; default: the run's own, or runs/forecast-<time>.

    The other arguments are those of `train`.

    Raises:
        UserError: something has to be changed first; nothing was sampled.
        RunFailed: a reward failed beyond what its configuration allows.
    """
    raw, run = ({}, None) if recipe is None else settings_of(Path(recipe))
    config, functions, task = _configured(forecast, raw, model, dataset, rewards, weights, combine, settings)
    with run_directory(run if output is None else Path(output), "forecast-") as path:
        return run_forecast(config, path, print, samples=samples, kl=kl, functions=functions, task=task)


def _configured(
    caller: Callable[..., Any],
    raw: dict[str, Any],
    model: str | PathLike[str] | None,
    dataset: Dataset | None,
    rewards: Reward | Sequence[Reward] | Mapping[str, Reward] | None,
    weights: Mapping[str, float] | None,
    combine: str | None,
    settings: Mapping[str, Any],
) -> tuple[RunConfig, dict[str, Callable[..., Any]], Task | None]:
    """The config that arguments make of plain settings, with the functions and the rows among them."""
    for name, value in settings.items():
        if name not in RunConfig.model_fields and name not in SHORT:
            hint = did_you_mean(name, [*RunConfig.model_fields, *SHORT, *inspect.signature(caller).parameters])
            raise UserError(f"{caller.__name__}(): there is no {name!r}; {hint}")
        section, values = (SHORT[name][0], {SHORT[name][1]: value}) if name in SHORT else (name, value)
        _section(raw, section).update(_mapping(section, values))
    functions, rows = _taken(raw, model, dataset, rewards)
    if weights is not None:
        _section(raw, "rewards")["weights"] = dict(weights)
    if combine is not None:
        _section(raw, "rewards")["combine"] = combine
    config = build_config(raw, where=f"{caller.__name__}()")
    return config, functions, None if rows is None else task_from_rows(rows, config.task)


def _taken(
    raw: dict[str, Any],
    model: str | PathLike[str] | None,
    dataset: Dataset | None,
    rewards: Reward | Sequence[Reward] | Mapping[str, Reward] | None,
) -> tuple[dict[str, Callable[..., Any]], Any]:
    """Put these into the plain settings of a run; returns the functions and the rows among them, None without rows."""
    if model is not None:
        _section(raw, "policy")["model"] = str(model)
    functions: dict[str, Callable[..., Any]] = {}
    if rewards is not None:
        _section(raw, "rewards").update({"components": _components(rewards, functions), "weights": {}})
    if isinstance(dataset, str | PathLike):
        _section(raw, "task")["data"] = str(dataset)
    elif dataset is not None:
        _section(raw, "task")["data"] = ROWS
        return functions, dataset
    return functions, None


def _section(raw: dict[str, Any], name: str) -> dict[str, Any]:
    return _mapping(name, raw.setdefault(name, {}))


def _mapping(name: str, values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise UserError(f"{name} is a section, such as {name}={{...}}, not {values!r}")
    return values


def _components(rewards: Any, functions: dict[str, Callable[..., Any]]) -> dict[str, Any]:
    """The config's components; functions among them are put aside under their names."""
    if isinstance(rewards, str) or callable(rewards):
        rewards = [rewards]
    if not isinstance(rewards, Mapping):
        named = {}
        for item in rewards:
            name = item.rsplit(":", 1)[-1] if isinstance(item, str) else getattr(item, "__name__", type(item).__name__)
            if name in named:
                raise UserError(f"two rewards are called {name!r}; give a mapping name: reward")
            named[name] = item
        rewards = named
    components: dict[str, Any] = {}
    for name, item in rewards.items():
        if callable(item):
            functions[name] = item
            components[name] = {"use": FUNCTION + name}
        else:
            components[name] = item
    return components
