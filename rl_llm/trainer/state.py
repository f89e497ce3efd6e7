"""All that a checkpoint holds of the driver; what the learners hold lies beside it."""

import copy
import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rl_llm.algorithms import build_algorithm
from rl_llm.config import RunConfig, build_config, value_at
from rl_llm.errors import UserError, option
from rl_llm.trainer.evaluation import Progress
from rl_llm.trainer.utility import Utility

STATE = "state.json"


@dataclass
class Origin:
    """What a run is made from beside its config, as digests; empty where nobody has taken them. Plain JSON.

    Attributes:
        rows: of the task's rows.
        model: of each file of the model that the config names.
        base: of each file of the warm-started model, where some of its weights never change or the KL refers to it.
        code: of each component.
        changed: by component, how often its code was another one when the run went on.
    """

    rows: str = ""
    model: dict[str, str] = field(default_factory=dict)
    base: dict[str, str] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)

    def other_code(self, earlier: "Origin") -> list[str]:
        """Components whose code is another one than it was in an earlier origin of the run."""
        both = self.code.keys() & earlier.code.keys()
        return sorted(name for name in both if self.code[name] != earlier.code[name])

    def going_on(self, earlier: "Origin") -> "Origin":
        """This origin of a run that had an earlier one: what has changed is counted."""
        changed = dict(earlier.changed)
        for name in self.other_code(earlier):
            changed[name] = changed.get(name, 0) + 1
        return replace(self, changed=changed)


@dataclass
class TrainerState:
    """Where a run is. Plain JSON.

    Attributes:
        steps: that are done, which are also the learner updates behind the weights.
        prompts_drawn: position in the task.
        tokens_trained: of all steps.
        tokens_generated: sampled so far, in rollouts and in evaluations.
        seconds: that the run has taken, earlier starts included.
        before: metrics of the policy before training on the test split; empty until they are measured.
        mixture: see `Mixture.state_dict`.
        learning_rate: the peak of its schedule.
        utility: weights and base statistics.
        progress: the best validation so far.
        config: as `RunConfig.to_dict` gives it. What is configured otherwise on going on has been given anew, and goes
            before what was live.
        origin: what the run is made from beside it.
    """

    steps: int = 0
    prompts_drawn: int = 0
    tokens_trained: int = 0
    tokens_generated: int = 0
    seconds: float = 0.0
    before: dict[str, Any] = field(default_factory=dict)
    mixture: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 0.0
    utility: Utility = field(default_factory=lambda: Utility({}, {}))
    progress: Progress = field(default_factory=Progress)
    config: dict[str, Any] = field(default_factory=dict)
    origin: Origin = field(default_factory=Origin)

    @classmethod
    def of(cls, config: RunConfig, origin: Origin) -> "TrainerState":
        """The state at the beginning of a run."""
        return cls(
            learning_rate=config.learner.lr,
            utility=Utility(utility_weights(config), {}),
            config=config.to_dict(),
            origin=origin,
        )

    def change_utility(self, weights: dict[str, float]) -> None:
        """Other weights; what was best by the old ones is no longer. Raises `UserError` where one has no base."""
        missing = sorted(set(weights) - set(self.utility.base))
        if self.utility.base and missing:
            raise UserError(
                f"evaluation.utility: {', '.join(missing)} was not measured before this run began; leave it out"
            )
        self.utility.weights, self.progress = dict(weights), Progress(best_step=self.progress.best_step)

    def save(self, folder: Path) -> None:
        (folder / STATE).write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, folder: Path) -> "TrainerState":
        """Raises `UserError` for the state of another version."""
        raw = json.loads((folder / STATE).read_text())
        if raw.keys() != {f.name for f in fields(cls)}:
            raise UserError(
                f"{folder} was made by another version of rl-llm, which alone can go on from it; "
                f"begin anew in another {option('output')}"
            )
        kinds = {"utility": Utility, "progress": Progress, "origin": Origin}
        return cls(**{**raw, **{name: kind(**raw[name]) for name, kind in kinds.items()}})

    def run_config(self) -> RunConfig:
        """The config of the run that saved it."""
        return build_config(copy.deepcopy(self.config), where="the checkpoint's config")


def configured(config: RunConfig) -> dict[str, Any]:
    """The config's values of what a run keeps live beside it, as plain JSON."""
    raw = config.to_dict()
    algorithm = build_algorithm(config.algorithm)
    return {
        "weights": raw["rewards"]["weights"],
        "learning_rate": config.learner.lr,
        "utility": config.evaluation.utility,
        # What decides which tensors the learners have.
        "made_of": {
            "policy": {key: raw["policy"][key] for key in ("type", "trainable", "last_layers", "lora")},
            "optimizer": [config.learner.optimizer, config.learner.momentum > 0],
            "value": config.algorithm.value.model if algorithm.advantage == "gae" else None,
        },
    }


def utility_weights(config: RunConfig) -> dict[str, float]:
    """What the utility weighs: as configured, else the initial reward weights and 1 for each extra metric."""
    if config.evaluation.utility is not None:
        return dict(config.evaluation.utility)
    # The utility reads raw values, so a component that is turned round by its scale is turned round here.
    initial = {
        name: math.copysign(1.0, config.rewards.components[name].scale) * value_at(weight, 0)
        for name, weight in config.rewards.weights.items()
    }
    return {**initial, **dict.fromkeys(config.evaluation.metrics, 1.0)}
