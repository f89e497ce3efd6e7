"""All that a checkpoint holds of the driver; what the learners hold lies beside it."""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rl_llm.algorithms import build_algorithm
from rl_llm.config import RunConfig, value_at
from rl_llm.errors import UserError
from rl_llm.trainer.evaluation import Progress, Utility

STATE = "state.json"


@dataclass
class TrainerState:
    """Where a run is. Plain JSON.

    Attributes:
        steps: that are done, which are also the learner updates behind the weights.
        prompts_drawn: position in the task.
        tokens_trained: of all steps.
        seconds: that the run has taken, earlier starts included.
        before: metrics of the policy before training on the test split; empty until they are measured.
        mixture: see `Mixture.state_dict`.
        learning_rate: the peak of its schedule.
        utility: weights and base statistics.
        progress: the best validation so far.
        configured: the config's own values of what may be changed while a run goes on. One that is configured
            otherwise on going on has been given anew, and goes before the live one.
    """

    steps: int = 0
    prompts_drawn: int = 0
    tokens_trained: int = 0
    seconds: float = 0.0
    before: dict[str, Any] = field(default_factory=dict)
    mixture: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 0.0
    utility: Utility = field(default_factory=lambda: Utility({}, {}))
    progress: Progress = field(default_factory=Progress)
    configured: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: RunConfig) -> "TrainerState":
        """The state at the beginning of a run."""
        return cls(
            learning_rate=config.learner.lr,
            utility=Utility(utility_weights(config), {}),
            configured=configured(config),
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
                "begin anew in another --output"
            )
        return cls(**{**raw, "utility": Utility(**raw["utility"]), "progress": Progress(**raw["progress"])})


def configured(config: RunConfig) -> dict[str, Any]:
    """The config's values of what a run keeps live beside it, as plain JSON."""
    raw = config.model_dump(mode="json")
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
