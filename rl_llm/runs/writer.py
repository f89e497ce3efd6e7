"""The run directory as it is written: metrics, evaluations, failures, rollout tables, summary."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rl_llm.files import replacing, write_text
from rl_llm.runs.callbacks import Callback, TrainerView, last_recorded
from rl_llm.runs.checkpoint import by_step, step_name
from rl_llm.runs.jsonl import MADE_AT_THE_END, JsonlWriter
from rl_llm.values import to_json

LINES = ("metrics", "eval", "failures")
"""The JSON-lines files of a run."""
EVALUATIONS = "evaluations"


class RunWriter(Callback):
    """Writes what a run does to its directory. Lines of steps that are still to come are dropped on starting."""

    def __init__(self) -> None:
        self._files: dict[str, JsonlWriter] = {}

    def on_start(self, trainer: TrainerView) -> None:
        self.close()
        kept = last_recorded(trainer)
        trainer.path.mkdir(parents=True, exist_ok=True)
        self._files = {name: JsonlWriter(trainer.path / f"{name}.jsonl", kept) for name in LINES}
        for step, table in rollout_tables(trainer.path).items():
            if step > kept:
                table.unlink()
        for (label, step), table in evaluation_tables(trainer.path).items():
            if step > kept or label in MADE_AT_THE_END:
                table.unlink()

    def on_step(self, trainer: TrainerView, metrics: dict[str, Any]) -> None:
        self._files["metrics"].write(metrics)

    def on_evaluation(self, trainer: TrainerView, evaluation: dict[str, Any]) -> None:
        values = trainer.evaluation.values
        columns = {name: pa.array(column, pa.float64(), mask=np.isnan(column)) for name, column in values.items()}
        folder = trainer.path / EVALUATIONS
        folder.mkdir(exist_ok=True)
        # The line comes last: where it stands, its values stand too.
        with replacing(folder / "{label}-{split}-{step:06d}.parquet".format(**evaluation)) as aside:
            pq.write_table(pa.table({"prompt_id": trainer.evaluation.prompt_ids, **columns}), aside)
        self._files["eval"].write(evaluation)

    def on_failure(self, trainer: TrainerView, record: dict[str, Any]) -> None:
        self._files["failures"].write(record)

    def on_checkpoint(self, trainer: TrainerView, path: Path) -> None:
        # A checkpoint outlives a power failure; the lines of its steps are to outlive it too.
        for file in self._files.values():
            file.sync()

    def on_end(self, trainer: TrainerView, summary: dict[str, Any]) -> None:
        write_summary(trainer.path, summary)
        self.close()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}


def write_summary(run: Path, summary: dict[str, Any]) -> None:
    write_text(run / "summary.json", to_json(summary) + "\n")


def rollout_table(run: Path, step: int, keep: int) -> Path | None:
    """Where the rollout table of a step goes, with the oldest making room; None where none are kept."""
    if keep == 0:
        return None
    (run / "rollouts").mkdir(parents=True, exist_ok=True)
    kept = list(rollout_tables(run).values())
    for old in kept[: max(len(kept) - keep + 1, 0)]:
        old.unlink()
    return run / "rollouts" / f"{step_name(step)}.parquet"


def rollout_tables(run: Path) -> dict[int, Path]:
    """The rollout tables that were kept, by step in order."""
    return by_step(run / "rollouts", ".parquet")


def evaluation_tables(run: Path) -> dict[tuple[str, int], Path]:
    """The values a prompt of each evaluation, by its label and step, in the order of the steps."""
    found = {}
    for path in (run / EVALUATIONS).glob("*-*-*.parquet"):
        label, _, step = path.stem.split("-", 2)
        if step.isdecimal():
            found[label, int(step)] = path
    return dict(sorted(found.items(), key=lambda item: item[0][1]))
