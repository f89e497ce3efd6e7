"""What is measured before the first step, taken from a run that has measured it: several begin with one policy."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rl_llm.config import RunConfig
from rl_llm.config.rewards import OF_THE_MIXTURE
from rl_llm.policies import SamplingParams
from rl_llm.runs.reader import RunFiles
from rl_llm.trainer.evaluation import Evaluation, with_utility
from rl_llm.trainer.utility import Utility


@dataclass(frozen=True)
class Beginning:
    """Evaluations of a policy before training, by label: "validation" and "before".

    Attributes:
        measured: what they depend on beside policy and prompts, see `measures`.
    """

    measured: dict[str, Any]
    evaluations: dict[str, Evaluation]

    @classmethod
    def of(cls, path: Path) -> "Beginning":
        """As a run has measured it. Raises `UserError` where it has not."""
        run = RunFiles(path)
        evaluations = {}
        for label in ("validation", "before"):
            columns = {name: column.to_numpy() for name, column in _columns(run, label).items()}
            line = next(line for line in run.evaluations if (line["step"], line["label"]) == (0, label))
            evaluations[label] = Evaluation(line, columns.pop("prompt_id"), columns)
        return cls(measures(run.config), evaluations)

    def evaluation(self, label: str, utility: Utility) -> Evaluation:
        """As a run with this utility would have measured it; the first one sets the utility's base statistics."""
        return with_utility(self.evaluations[label], utility)

    def serves(self, config: RunConfig) -> bool:
        """Whether a run with this config, from the same policy, would measure the same, bit for bit."""
        return self.measured == measures(config)


def _columns(run: RunFiles, label: str) -> dict[str, Any]:
    table = run.evaluated(label, 0)
    return dict(zip(table.column_names, table.columns, strict=True))


def measures(config: RunConfig) -> dict[str, Any]:
    """All of a config that its first evaluations depend on."""
    evaluation, no_matter = config.evaluation, {*OF_THE_MIXTURE, "cache"}
    params = SamplingParams.of(config.rollout, 1, evaluation.temperature, config.trainer.seed)
    how = asdict(params) if evaluation.temperature else {**asdict(params), "seed": None}
    return {
        "task": config.task.model_dump(),
        "policy": config.policy.model_dump(),
        "components": {name: spec.model_dump(exclude=no_matter) for name, spec in config.measured.items()},
        "engine": config.rollout.engine,
        # Floats follow these.
        "rows": config.rollout.request_rows,
        "threads": config.resources.threads,
        "sampling": how,
        "counts": evaluation.model_dump(include={"prompts", "test_prompts", "samples"}),
    }
