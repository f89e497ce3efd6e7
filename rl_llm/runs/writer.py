"""The run directory as it is written: metrics, evaluations, failures, rollout tables, summary."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rl_llm.runs.checkpoint import step_name
from rl_llm.runs.console import Console
from rl_llm.runs.callbacks import Callback, TrainerView
from rl_llm.runs.jsonl import JsonlWriter, to_json


class Journal:
    """Writes what a run does to its directory, its console and its callbacks.

    Args:
        path: the run directory.
        last_step: up to here lines are kept; later ones are dropped, a resumed run writes them again. -1: new.
        keep_rollouts: rollout tables to keep.
    """

    def __init__(
        self, path: Path, last_step: int, keep_rollouts: int, console: Console, callbacks: Sequence[Callback]
    ) -> None:
        self.path, self.console, self.callbacks = path, console, callbacks
        self._keep_rollouts = keep_rollouts
        (path / "rollouts").mkdir(parents=True, exist_ok=True)
        self._metrics = JsonlWriter(path / "metrics.jsonl", last_step)
        self._evaluations = JsonlWriter(path / "eval.jsonl", last_step)
        self._failures = JsonlWriter(path / "failures.jsonl", last_step)
        for table in self._rollouts():
            if table.stem > step_name(max(last_step, 0)):
                table.unlink()

    def _rollouts(self) -> list[Path]:
        return sorted((self.path / "rollouts").glob("step-*.parquet"))

    def rollout_path(self, step: int) -> str | None:
        """Where the rollout table of a step goes, with the oldest one making room; None where none are kept."""
        if self._keep_rollouts == 0:
            return None
        kept = self._rollouts()
        for old in kept[: max(len(kept) - self._keep_rollouts + 1, 0)]:
            old.unlink()
        return str(self.path / "rollouts" / f"{step_name(step)}.parquet")

    def step(self, trainer: TrainerView, metrics: dict[str, Any]) -> None:
        self._metrics.write(metrics)
        self.console.step(metrics)
        for callback in self.callbacks:
            callback.on_step(trainer, metrics)

    def evaluation(self, trainer: TrainerView, line: dict[str, Any]) -> None:
        self._evaluations.write(line)
        self.console.evaluation(line)
        for callback in self.callbacks:
            callback.on_evaluation(trainer, line)

    def failure(self, record: dict[str, Any]) -> None:
        self._failures.write(record)
        if record["outcome"] != "raise":
            rows = f"{record['rows']} row{'s' if record['rows'] > 1 else ''}"
            what = {"mask": "masked", "impute": "imputed", "retried": "fine one by one"}[record["outcome"]]
            self.console.message(f"{record['component']}: {rows} {what}, {record['status']}: {record['message']}")

    def summary(self, summary: dict[str, Any]) -> None:
        (self.path / "summary.json").write_text(to_json(summary) + "\n", encoding="utf-8")

    def close(self) -> None:
        for writer in (self._metrics, self._evaluations, self._failures):
            writer.close()
        self.console.close()
