"""Every knob of a run, typed and documented: one section a room.

A run is described by a YAML file (or a packaged recipe) and dotted overrides such as `learner.lr=1e-5`.
`load_config` turns them into a `RunConfig`; whatever is wrong becomes one `UserError` that names the right key.
"""

import importlib.resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from rl_llm.config.algorithm import (
    Aggregation,
    AlgorithmConfig,
    CorrectionConfig,
    KLConfig,
    LearnerConfig,
    ReferenceConfig,
    ValueConfig,
)
from rl_llm.config.base import Ramp, Scheduled, Section, value_at
from rl_llm.config.rewards import ComponentConfig, Components, GateConfig, RewardsConfig, expand_components
from rl_llm.errors import UserError, did_you_mean
from rl_llm.overrides import apply_override, explain, read_yaml

__all__ = [
    "VERSIONS",
    "Aggregation",
    "AlgorithmConfig",
    "CheckpointConfig",
    "ComponentConfig",
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
    "load_config",
    "read_config",
    "recipes",
    "value_at",
]  # fmt: skip


class SplitConfig(Section):
    by: str = Field("prompt", description="'prompt', or the column whose hash decides the side of a row")
    tune: float = Field(0.1, gt=0, lt=1, description="share of rows that validate, pick the best policy and stop early")
    test: float = Field(0.1, gt=0, lt=1, description="share of rows seen only before and after training")

    @model_validator(mode="after")
    def _leaves_train(self) -> "SplitConfig":
        if self.tune + self.test >= 1:
            raise ValueError("tune + test leave no rows to train on; lower one of them")
        return self


class TaskConfig(Section):
    data: str = Field(
        "builtin:records",
        description="a JSONL, CSV or Parquet file (may be .gz), 'hub:owner/name' or 'builtin:records'",
    )
    hub_subset: str | None = Field(None, description="configuration name of a Hub data set")
    hub_split: str = Field("train", description="split of a Hub data set to read; sides are made by `split`")
    rows: int | None = Field(None, ge=10, description="read (or generate) at most this many rows")
    prompt: str = Field("{prompt}", description="template over the columns; a column of messages is used as it is")
    columns: dict[str, str] = Field({}, description="name seen by rewards: column in the data, e.g. reference: summary")
    chat: bool = Field(False, description="send a plain prompt as a user message through the chat template")
    system: str | None = Field(None, description="system message put before a chat prompt")
    max_prompt_tokens: int = Field(512, ge=1)
    on_bad_row: Literal["skip", "fail"] = Field(
        "skip", description="bad rows are always reported, then skipped or fatal"
    )
    split: SplitConfig = SplitConfig()


class ScratchConfig(Section):
    """A small GPT-like model (Llama architecture) with a byte-pair tokenizer trained on the task's own text."""

    layers: int = Field(4, ge=1)
    hidden_size: int = Field(128, ge=8)
    heads: int = Field(4, ge=1)
    vocab_size: int = Field(512, ge=64)

    @model_validator(mode="after")
    def _heads_divide(self) -> "ScratchConfig":
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 2 x heads ({2 * self.heads})")
        return self


class LoraConfig(Section):
    r: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0)
    targets: str | list[str] = "all-linear"


class PolicyConfig(Section):
    type: Literal["causal_lm"] = "causal_lm"
    model: str | None = Field(None, description="a Hugging Face folder or Hub name; empty: built from `scratch`")
    scratch: ScratchConfig = ScratchConfig()
    trainable: Literal["all", "last_layers", "lora"] = "all"
    last_layers: int = Field(2, ge=1, description="how many of the last layers train with trainable=last_layers")
    lora: LoraConfig = LoraConfig()
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto: bf16 autocast where it is native")
    gradient_checkpointing: bool = Field(False, description="less memory, one more forward")
    dropout: float = Field(0.0, ge=0, lt=1, description="for warm start; reinforcement learning runs without")

    @field_validator("model")
    @classmethod
    def _whole_path(cls, model: str | None) -> str | None:
        # Workers look for it too, from wherever they run.
        folder = Path(model or "").expanduser()
        return str(folder.absolute()) if model and folder.is_dir() else model


class WarmStartConfig(Section):
    """Training before reinforcement learning; its result is cached and shared by runs with the same settings."""

    pretrain_steps: int = Field(0, ge=0, description="self-supervised: next token on prompts and targets")
    supervised_steps: int = Field(0, ge=0, description="supervised: the target given the prompt")
    target: str = Field("reference", description="column with the text to imitate (a list: one is drawn each time)")
    batch_size: int = Field(32, ge=1)
    max_target_tokens: int = Field(128, ge=1)
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup_steps: int = Field(20, ge=0)


class RolloutConfig(Section):
    engine: Literal["transformers"] = "transformers"
    prompts_per_step: int = Field(8, ge=1)
    samples_per_prompt: int = Field(8, ge=1, description="size of a group")
    rows_per_request: int | None = Field(
        None, ge=1, description="rows decoded together; fixes the numbers, so it does not follow the worker count"
    )
    max_new_tokens: int = Field(64, ge=1)
    min_new_tokens: int = Field(0, ge=0)
    temperature: Scheduled = Field(1.0, description="exploration; a number or {start, end, steps}")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0: no limit")
    stop: list[str] = Field([], description="strings that end a completion")

    @property
    def request_rows(self) -> int:
        """Rows of one request: whole groups, by default as near to 32 rows as they come."""
        return self.rows_per_request or max(32 // self.samples_per_prompt, 1) * self.samples_per_prompt

    @model_validator(mode="after")
    def _consistent(self) -> "RolloutConfig":
        if self.request_rows % self.samples_per_prompt:
            raise ValueError(
                f"rows_per_request {self.request_rows} must be a multiple of "
                f"samples_per_prompt {self.samples_per_prompt}"
            )
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} exceeds max_new_tokens {self.max_new_tokens}")
        ends = (
            [self.temperature.start, self.temperature.end] if isinstance(self.temperature, Ramp) else [self.temperature]
        )
        if min(ends) <= 0:
            raise ValueError("temperature must stay above 0; evaluation is greedy on its own")
        return self


class EvaluationConfig(Section):
    every: int = Field(20, ge=1, description="steps between validations on the tune split")
    prompts: int = Field(128, ge=1, description="tune prompts used; the same ones each time")
    test_prompts: int = Field(512, ge=2, description="test prompts used before and after training")
    temperature: float = Field(0.0, ge=0, description="0: greedy")
    metrics: Components = Field({}, description="components measured but not trained on")
    utility: dict[str, float] | None = Field(
        None, description="metric: weight; default: the run's initial reward weights, and 1 for each extra metric"
    )
    patience: int | None = Field(None, ge=1, description="validations without a better utility that end the run")
    samples: int = Field(3, ge=0, description="completions shown at each validation")
    controls: list[Literal["supervised", "constant_reward"]] = Field(
        [], description="runs made for comparison after the main one, from the same start"
    )


class CheckpointConfig(Section):
    every: int = Field(20, ge=1)
    keep: int = Field(2, ge=1)


class LoggingConfig(Section):
    rollouts: int = Field(200, ge=0, description="rollout tables to keep, newest first")
    tensorboard: bool = True
    wandb_project: str | None = None
    mlflow_experiment: str | None = None


class TrainerConfig(Section):
    steps: int = Field(100, ge=1)
    seed: int = Field(0, ge=0)


class ResourcesConfig(Section):
    num_rollout_workers: int = Field(0, ge=0, description="0: in this process")
    num_reward_workers: int = Field(0, ge=0, description="0: in this process")
    num_learners: int = Field(0, ge=0, description="0: in this process; several share the rows of a step")
    num_cpus_per_rollout_worker: float = Field(1, gt=0)
    num_cpus_per_reward_worker: float = Field(1, gt=0)
    num_cpus_per_learner: float = Field(1, gt=0)
    num_gpus_per_rollout_worker: float = Field(0, ge=0)
    num_gpus_per_learner: float = Field(0, ge=0)
    threads: int = Field(1, ge=1, description="torch threads of every process; changes floats, so set it on its own")
    address: str | None = Field(
        None, description="Ray cluster to join; empty: the one in RAY_ADDRESS, else a local one"
    )
    wait_s: float = Field(120, gt=0, description="how long to wait for room for the actors")
    request_timeout_s: float = Field(
        600, gt=0, description="deadline of a rollout request; then its worker is replaced"
    )
    max_attempts: int = Field(3, ge=1, description="workers a request may bring down before it is given up by name")

    @property
    def uses_ray(self) -> bool:
        return self.num_rollout_workers + self.num_reward_workers + self.num_learners > 0


class RunConfig(Section):
    task: TaskConfig = TaskConfig()
    policy: PolicyConfig = PolicyConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardsConfig
    algorithm: AlgorithmConfig = AlgorithmConfig()
    learner: LearnerConfig = LearnerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    trainer: TrainerConfig = TrainerConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        taken = {"utility", "tokens"} & (set(self.rewards.components) | set(self.evaluation.metrics))
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

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)


VERSIONS = "versions"
"""What a run's config.yaml notes beside the config: the libraries it ran with."""


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
    """The plain mapping in a YAML file or recipe, for `build_config`. Raises `UserError` where there is none."""
    path, where = _find(source)
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{where}: sections such as 'task:' and 'rewards:' are needed, found {type(raw).__name__}")
    # A section whose keys are all commented out has its defaults; a run's own config.yaml also notes versions.
    return {name: {} if section is None else section for name, section in raw.items() if name != VERSIONS}


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
    _expand_components(raw, where)
    for override in overrides:
        apply_override(raw, override, RunConfig)
        _expand_components(raw, f"override {override!r}")
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        lines = [explain(dict(problem), overrides, where, RunConfig) for problem in error.errors()]
        raise UserError("\n".join(dict.fromkeys(lines))) from None


def _expand_components(raw: dict[str, Any], where: str) -> None:
    """Give components their long form, in place: an override leads into it."""
    for section, key in (("rewards", "components"), ("evaluation", "metrics")):
        if isinstance(raw.get(section), dict) and key in raw[section]:
            try:
                raw[section][key] = expand_components(raw[section][key])
            except ValueError as error:
                raise UserError(f"{where}: {section}.{key}: {error}") from None
