"""Every knob of a run, typed and documented: one section a room.

A run is described by a YAML file (or a packaged recipe) and dotted overrides such as `learner.lr=1e-5`.
`load_config` turns them into a `RunConfig`; whatever is wrong becomes one `UserError` that names the right key.
"""

import importlib.resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import ValidationError, model_validator

from rl_llm.config.algorithm import (
    Aggregation,
    AlgorithmConfig,
    CorrectionConfig,
    KLConfig,
    ReferenceConfig,
    ValueConfig,
)
from rl_llm.config.base import MAY_CHANGE, MUST_STAY, Ramp, Scheduled, Section, value_at
from rl_llm.config.evaluation import TOKENS, UTILITY, EvaluationConfig
from rl_llm.config.learner import LearnerConfig
from rl_llm.config.overrides import apply_override, explain
from rl_llm.config.policy import LoraConfig, PolicyConfig, ScratchConfig, WarmStartConfig
from rl_llm.config.resources import ResourcesConfig
from rl_llm.config.rewards import (
    BoundConfig,
    ComponentConfig,
    ControllerConfig,
    GateConfig,
    RewardsConfig,
    expand_components,
)
from rl_llm.config.rollout import RolloutConfig
from rl_llm.config.task import SplitConfig, TaskConfig
from rl_llm.config.trainer import CheckpointConfig, LoggingConfig, TrainerConfig
from rl_llm.config.yaml12 import read_yaml, write_yaml
from rl_llm.errors import UserError, did_you_mean
from rl_llm.imports import look_in

__all__ = [
    "IMPORTS",
    "MAY_CHANGE",
    "MUST_STAY",
    "PROBE",
    "TOKENS",
    "UTILITY",
    "VERSIONS",
    "Aggregation",
    "AlgorithmConfig",
    "BoundConfig",
    "CheckpointConfig",
    "ComponentConfig",
    "ControllerConfig",
    "CorrectionConfig",
    "EvaluationConfig",
    "GateConfig",
    "KLConfig",
    "LearnerConfig",
    "LoggingConfig",
    "LoraConfig",
    "PolicyConfig",
    "Ramp",
    "ReferenceConfig",
    "ResourcesConfig",
    "RewardsConfig",
    "RolloutConfig",
    "RunConfig",
    "Scheduled",
    "ScratchConfig",
    "Section",
    "SplitConfig",
    "TaskConfig",
    "TrainerConfig",
    "ValueConfig",
    "WarmStartConfig",
    "build_config",
    "expand",
    "load_config",
    "read_config",
    "read_mapping",
    "recipes",
    "value_at",
]  # fmt: skip


class RunConfig(Section):
    task: TaskConfig = TaskConfig()
    policy: PolicyConfig = PolicyConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardsConfig
    algorithm: AlgorithmConfig = AlgorithmConfig()
    learner: LearnerConfig = LearnerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: Annotated[CheckpointConfig, MAY_CHANGE] = CheckpointConfig()
    logging: Annotated[LoggingConfig, MAY_CHANGE] = LoggingConfig()
    trainer: TrainerConfig = TrainerConfig()
    resources: Annotated[ResourcesConfig, MAY_CHANGE] = ResourcesConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        taken = {UTILITY, TOKENS} & (set(self.rewards.components) | set(self.evaluation.metrics))
        if taken:
            raise ValueError(f"{sorted(taken)} are measured of every policy; give the component another name")
        both = set(self.rewards.components) & set(self.evaluation.metrics)
        if both:
            raise ValueError(
                f"evaluation.metrics {sorted(both)} are reward components already; each is always evaluated"
            )
        known = set(self.rewards.components) | set(self.evaluation.metrics)
        for name in self.evaluation.utility or {}:
            if name not in known:
                raise ValueError(f"evaluation.utility.{name}: no such metric; {did_you_mean(name, known)}")
        if self.policy.model is None and not (self.warm_start.pretrain_steps or self.warm_start.supervised_steps):
            raise ValueError(
                "a model from scratch knows nothing: set policy.model, or warm_start.supervised_steps above 0"
            )
        return self

    @property
    def measured(self) -> dict[str, ComponentConfig]:
        """Every component an evaluation measures: those that train and those that do not."""
        return {**self.rewards.components, **self.evaluation.metrics}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, of which `build_config` makes the same config again."""
        return self.model_dump(mode="json", by_alias=True)

    def to_yaml(self) -> str:
        return write_yaml(self.to_dict())


VERSIONS, IMPORTS, PROBE = "versions", "imports", "probe"
"""What a run's config.yaml notes beside the config: the libraries it ran with, where modules of the user's were looked
for, how far the policy is from its model."""


def recipes() -> dict[str, Path]:
    """Packaged run configs by name."""
    folder = Path(str(importlib.resources.files("rl_llm") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_config(source: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """A run config from a YAML file or recipe name and overrides like `trainer.steps=50`.

    Raises:
        UserError: no such file or recipe, broken YAML, unknown key, wrong type or impossible combination.
    """
    return build_config(read_config(source), overrides, where=_find(source)[1])


def read_config(source: str | Path) -> dict[str, Any]:
    """The plain mapping in a YAML file or recipe, for `build_config`; modules that it names may lie beside the file.

    Raises `UserError` where there is none.
    """
    path, where = _find(source)
    raw = read_mapping(path, where, "sections such as 'task:' and 'rewards:'")
    if path == Path(source):
        look_in(path.parent, *raw.get(IMPORTS) or [])
    # A section whose keys are all commented out has its defaults; a run's own config.yaml also has notes.
    notes = (VERSIONS, IMPORTS, PROBE)
    return {name: {} if section is None else section for name, section in raw.items() if name not in notes}


def read_mapping(path: Path, where: str, needed: str) -> dict[str, Any]:
    """The mapping in a YAML file; messages call that `where`. Raises `UserError` naming what is `needed` instead."""
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of bytes that are not UTF-8 too
        raise UserError(f"{where}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{where}: {needed} are needed, found {_FOUND.get(type(raw), 'a value')}")
    return raw


_FOUND = {type(None): "nothing", list: "a list", str: "a text"}


def _find(source: str | Path) -> tuple[Path, str]:
    """The file of a config and what messages call it."""
    path, name = Path(source), str(source)
    if path.is_file():
        return path, name
    known = recipes()
    if name not in known:
        what = "file" if path.suffix or "/" in name else "recipe"
        raise UserError(f"no {what} {name!r}; {did_you_mean(name, known)} (recipes: {', '.join(known)})")
    return known[name], f"recipe {name}"


def build_config(raw: dict[str, Any], overrides: list[str] | tuple[str, ...] = (), where: str = "config") -> RunConfig:
    """Validate a plain mapping after applying dotted overrides to it. Raises `UserError` naming the key to change."""
    expand(raw, where)
    for override in overrides:
        apply_override(raw, override, RunConfig)
        expand(raw, f"override {override!r}")
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        lines = [explain(dict(problem), overrides, where, RunConfig) for problem in error.errors()]
        raise UserError("\n".join(dict.fromkeys(lines))) from None


def expand(raw: dict[str, Any], where: str) -> None:
    """Give components their long form, in place, so that keys lead into it. Raises `UserError` as `build_config`."""
    for section, key in (("rewards", "components"), ("evaluation", "metrics")):
        if isinstance(raw.get(section), dict) and key in raw[section]:
            try:
                raw[section][key] = expand_components(raw[section][key])
            except ValueError as error:
                raise UserError(f"{where}: {section}.{key}: {error}") from None
