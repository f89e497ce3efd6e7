"""What happens to rows a component failed on: masked, imputed, or the end of the run. Never a silent 0."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rl_llm.config import ComponentConfig
from rl_llm.errors import RunFailed
from rl_llm.rewards.component import FAILED, Scores
from rl_llm.table import NOT_APPLICABLE, TIMEOUT

_MAX_PROMPT_IDS = 50


class RewardFailed(RunFailed):
    """A component failed in a way its configuration does not put up with.

    Attributes:
        failures: the records of the step's failures, lines of `failures.jsonl`.
    """

    def __init__(self, message: str, failures: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.failures = failures


@dataclass(frozen=True)
class Resolved:
    """A component's values after its failure policy.

    Attributes:
        values: float64 [N], NaN where the row has no value.
        status: [N], as scored: an imputed row keeps "error" or "timeout".
        failures: lines of `failures.jsonl`, one a kind of failure, and one a kind of failed call whose rows all
            succeeded by themselves ("retried").
    """

    values: np.ndarray
    status: list[str]
    failures: list[dict[str, Any]]


def apply_failure_policy(
    name: str, config: ComponentConfig, scores: Scores, prompt_ids: np.ndarray, step: int
) -> Resolved:
    """Apply a component's `on_failure` to its scores of a whole step.

    Args:
        scores: of all N rows of the step, merged.
        prompt_ids: int [N], for the record.

    Raises:
        RewardFailed: a row failed under `on_failure: raise`, or more than `max_failure_rate` of the rows the component
            applies to failed, whatever the policy.
    """
    status = np.array(scores.status, dtype=object)
    failed = np.isin(status, FAILED)
    rows, applicable = int(failed.sum()), int((status != NOT_APPLICABLE).sum())
    too_many = rows > config.max_failure_rate * applicable
    fatal = rows > 0 and (too_many or config.on_failure == "raise")
    retried = np.array([scores.retried.get(row, "") for row in range(len(status))], dtype=object)
    failures = [
        {
            "step": step,
            "component": name,
            "status": kind,
            "rows": int((of == kind).sum()),
            "outcome": outcome,
            "message": _first_message(scores.errors, kind),
            "prompt_ids": np.unique(prompt_ids[of == kind])[:_MAX_PROMPT_IDS].tolist(),
        }
        for of, outcome in ((status, "raise" if fatal else config.on_failure), (retried, "retried"))
        for kind in FAILED
        if (of == kind).any()
    ]
    if fatal:
        limit = f"more than max_failure_rate {config.max_failure_rate:g} allows" if too_many else "on_failure is raise"
        raise RewardFailed(
            f"component {name!r} failed on {rows} of {applicable} rows ({limit}): {failures[0]['message']}", failures
        )
    return Resolved(imputed(config, scores), scores.status, failures)


def imputed(config: ComponentConfig, scores: Scores) -> np.ndarray:
    """Scores with failed rows imputed where that is the policy: float64 [N], NaN where a row has no value."""
    values = np.array([np.nan if value is None else value for value in scores.values], dtype=np.float64)
    if config.impute is not None:
        values[np.isin(np.array(scores.status, dtype=object), FAILED)] = config.impute
    return values


def apply_failure_policies(
    configs: Mapping[str, ComponentConfig],
    scores: Mapping[str, Scores],
    prompt_ids: np.ndarray,
    step: int,
    note: Callable[[dict[str, Any]], None],
) -> dict[str, Resolved]:
    """`apply_failure_policy` for each of `configs`, raising as it does; `note` gets every failure, fatal ones too."""
    resolved = {}
    for name, config in configs.items():
        try:
            resolved[name] = apply_failure_policy(name, config, scores[name], prompt_ids, step)
        except RewardFailed as error:
            for record in error.failures:
                note(record)
            raise
        for record in resolved[name].failures:
            note(record)
    return resolved


def _first_message(errors: list[str], kind: str) -> str:
    matching = [message for message in errors if message.startswith("TimeoutError") == (kind == TIMEOUT)]
    return (matching or errors or [""])[0]
