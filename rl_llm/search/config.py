"""A search as a file: what a trial is made of, what varies, who asks, who stops, what ranks."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from rl_llm.config import RunConfig, Section, build_config, expand, read_config, read_mapping, recipes
from rl_llm.config.overrides import apply_override, explain
from rl_llm.errors import UserError
from rl_llm.imports import look_in
from rl_llm.search.samples import LEAST_SAMPLES

Direction = Literal["max", "min"]
MOST_TRIALS = 1000
"""Each decision looks at all of them."""


class SearchConfig(Section):
    """The keys of a search file."""

    recipe: str | None = Field(None, description="recipe or YAML file that every trial is made from")
    run: dict[str, Any] = Field(
        {},
        description="settings of a run that replace the recipe's; the same keys",
        examples=["{trainer: {steps: 90}}"],
    )
    space: dict[str, dict[str, Any]] = Field(
        description="dotted path of a run's setting: {simplex | uniform | loguniform | int | choice | grid: ...}",
        examples=["{learner.lr: {loguniform: [1.0e-5, 1.0e-3]}}"],
    )
    searcher: Literal["random", "grid", "optuna"] = "random"
    objectives: dict[str, Direction] = Field(
        {}, description="metrics that optuna improves; default: the utility", examples=["{chrf: max, tokens: min}"]
    )
    scheduler: Literal["halving", "asha", "pbt", "none"] = "halving"
    trials: int = Field(12, ge=1, le=MOST_TRIALS)
    tokens: int | None = Field(
        None, ge=1, description="generated tokens, evaluations included, that end a trial before its trainer.steps"
    )
    utility: dict[str, float] | None = Field(
        None,
        description="metric: weight; what ranks trials. Default: the run's evaluation.utility",
        examples=["{chrf: 1.0}"],
    )
    first: list[dict[str, Any]] = Field(
        [], description="points to try first, beside those that are tried anyway", examples=["[{learner.lr: 1.0e-4}]"]
    )
    forecast: int = Field(64, ge=0, description="samples a prompt of the forecast that gives first points; 0: none")
    finalists: int = Field(3, ge=0, description="best trials that are run again on fresh seeds; these are the result")
    seeds: int = Field(3, ge=1, description="fresh seeds of each finalist, and of equal weights beside them")
    controls: bool = Field(True, description="run equal weights and each single reward beside the search")
    overoptimized: int = Field(
        3, ge=0, description="evaluations over which reward rises and utility falls that end a trial; 0: none do"
    )
    concurrent: int | None = Field(None, ge=1, description="trials at once; default: as many as there is room for")
    max_failures: int = Field(1, ge=0, description="times that a trial which has crashed or hung is tried again")
    silent_s: float = Field(1800, gt=0, description="seconds without a finished step after which a trial hangs")
    seed: int = Field(0, ge=0, description="of the points drawn; trials have the run's own trainer.seed")

    @field_validator("utility", "objectives")
    @classmethod
    def _no_reward(cls, names: dict[str, Any] | None) -> dict[str, Any] | None:
        if names and (said := _by_the_reward(names)):
            raise ValueError(said)
        return names

    @field_validator("forecast")
    @classmethod
    def _enough(cls, samples: int) -> int:
        if 0 < samples < LEAST_SAMPLES:
            raise ValueError(f"so few samples a prompt tell nothing; take {LEAST_SAMPLES} or more, or 0 for none")
        return samples

    @model_validator(mode="after")
    def _consistent(self) -> "SearchConfig":
        if self.recipe is None and not self.run:
            raise ValueError("recipe, or a whole run under `run`, is needed: what trials are made from")
        if not self.space:
            raise ValueError("space names no setting that varies")
        if self.objectives and self.searcher != "optuna":
            raise ValueError(f"objectives are for searcher: optuna; {self.searcher} looks at no result")
        if self.scheduler == "pbt" and self.searcher != "random":
            raise ValueError("scheduler: pbt moves the points itself; searcher has to be random")
        return self


def _by_the_reward(names: Iterable[str]) -> str:
    """Why metrics cannot rank, where the reward is among them."""
    for name in names:
        if name == "reward" or name.startswith("reward/"):
            return (
                f"{name!r}: ranked by the weighted reward, each weighting would be judged by its own yardstick, "
                "and easy components would win; name metrics, each with a weight of its own"
            )
    return ""


def load_search(source: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> SearchConfig:
    """A search from a YAML file and overrides such as `trials=4` or `run.trainer.steps=9`.

    Raises:
        UserError: no such file, broken YAML, an unknown key, a wrong type.
    """
    return build_search(read_search(source), overrides, where=str(source))


def read_search(source: str | Path) -> dict[str, Any]:
    """The plain mapping in a search file; modules that its run names may lie beside it.

    Raises `UserError` where there is none, or a run's file.
    """
    path = Path(source)
    if not path.is_file():
        known = recipes()
        hint = f"write one with recipe: {source}" if str(source) in known else "write one"
        raise UserError(f"no search file {str(source)!r}; {hint}, tune_configs/ has examples")
    raw = read_mapping(path, str(path), "keys such as 'recipe:' and 'space:'")
    if "space" not in raw and set(raw) & set(RunConfig.model_fields):
        raise UserError(f"{path} is a run's file; a search is another, with recipe: {path} and what varies under space")
    look_in(path.parent)
    return {key: value for key, value in raw.items() if value is not None}  # a null stands for the default


def build_search(
    raw: dict[str, Any], overrides: list[str] | tuple[str, ...] = (), where: str = "search()"
) -> SearchConfig:
    """Validate a plain mapping after applying overrides to it. Raises `UserError` naming the key to change."""
    for override in overrides:
        apply_override(raw, override, SearchConfig)
    try:
        return SearchConfig.model_validate(raw)
    except ValidationError as error:
        lines = [explain(dict(problem), overrides, where, SearchConfig) for problem in error.errors()]
        raise UserError("\n".join(dict.fromkeys(lines))) from None


def run_settings(search: SearchConfig) -> dict[str, Any]:
    """The plain settings of a run that points are put into: the recipe's, with `run` over them.

    Raises `UserError` where the recipe is a search, or the run would be ranked by its reward.
    """
    base = {} if search.recipe is None else read_config(search.recipe)
    if "space" in base:
        raise UserError(f"recipe: {search.recipe} is a search's file; name the recipe that it names, or a run's file")
    expand(base, str(search.recipe))
    settings = _merged(base, search.run)
    evaluation = settings.get("evaluation")
    utility = evaluation.get("utility") if isinstance(evaluation, dict) else None
    if isinstance(utility, dict) and (said := _by_the_reward(map(str, utility))):
        raise UserError(f"run: evaluation.utility: {said}")
    return settings


def run_of(search: SearchConfig) -> RunConfig:
    """The config that every trial is made from. Raises `UserError` as `build_config`."""
    return build_config(run_settings(search), where="run")


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(under)
    for key, value in over.items():
        there = out.get(key)
        out[key] = _merged(there, value) if isinstance(there, dict) and isinstance(value, dict) else value
    return out
