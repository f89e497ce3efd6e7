"""What a run left in its directory, as data: finished, running or killed."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from rl_llm.config import RunConfig, build_config, read_config
from rl_llm.errors import UserError, option
from rl_llm.runs.jsonl import read_json, read_jsonl
from rl_llm.runs.writer import evaluation_tables, rollout_tables


class RunFiles:
    """Everything a run left in its directory. Files are read when first asked for; a new `RunFiles` sees newer ones.

    Args:
        path: the run directory.

    Raises:
        UserError: there is no run at `path`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "config.yaml").is_file():
            of_a_run = f"give the {option('output')} of a run"
            raise UserError(f"{self.path} is no run directory (no config.yaml in it); {of_a_run}")

    @cached_property
    def config(self) -> RunConfig:
        """The resolved config, without the library versions that its file also notes."""
        where = self.path / "config.yaml"
        raw = read_config(where)
        return build_config({key: raw[key] for key in RunConfig.model_fields if key in raw}, where=str(where))

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """metrics.jsonl, a row a step and a column a metric; NaN where a step has no such value."""
        frame = pd.DataFrame(read_jsonl(self.path / "metrics.jsonl"))
        return frame.apply(pd.to_numeric) if len(frame) else pd.DataFrame({"step": pd.Series(dtype="int64")})

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """eval.jsonl: `step`, `split`, `label`, `metrics` as `{name: {mean, low, high}}`, `samples`."""
        return read_jsonl(self.path / "eval.jsonl")

    def evaluated(self, label: str, step: int | None = None) -> pa.Table:
        """Each metric's value a prompt in an evaluation, a row a prompt: `prompt_id`, and float64 with null for none.

        Args:
            label: "before", "validation", "after" or "supervised".
            step: the newest with this label by default.

        Raises:
            UserError: there is no such evaluation.
        """
        tables = {at: path for (name, at), path in evaluation_tables(self.path).items() if name == label}
        if not tables or step not in (None, *tables):
            asked = repr(label) if step is None else f"{label!r} of step {step}"
            there = ", ".join(map(str, tables)) or "none"
            raise UserError(f"{self.path} has no evaluation {asked}; those of it: {there}")
        return pq.read_table(tables[max(tables) if step is None else step])

    @cached_property
    def failures(self) -> list[dict[str, Any]]:
        """failures.jsonl: `step`, `component`, `status`, `rows`, `outcome`, `message`, `prompt_ids`."""
        return read_jsonl(self.path / "failures.jsonl")

    @cached_property
    def summary(self) -> dict[str, Any]:
        """summary.json; empty while the run is going on or after it was killed, and where the file is broken."""
        return read_json(self.path / "summary.json") or {}

    @property
    def model(self) -> Path:
        """The folder of the best policy, which `transformers` loads.

        Raises:
            UserError: the run has not saved one yet.
        """
        folder = self.path / "model"
        if not folder.is_dir():
            raise UserError(f"{self.path} has no model/ yet; finish the run with {option('resume', 'True')}")
        return folder

    @property
    def rollout_steps(self) -> list[int]:
        """The steps whose rollout tables were kept, in order."""
        return list(rollout_tables(self.path))

    def rollouts(self, step: int | None = None) -> pa.Table:
        """The rollout table of one step as trained on, or of all kept steps one after the other with a `step` column.

        Raises:
            UserError: no table, or not that step's, was kept.
        """
        kept = self.rollout_steps
        if not kept:
            raise UserError(f"{self.path} has no rollout tables; logging.rollouts says how many a run keeps")
        if step is None:
            tables = [self.rollouts(number) for number in kept]
            numbers = np.repeat(kept, [table.num_rows for table in tables])
            whole = pa.concat_tables(tables, promote_options="default")
            return whole.add_column(0, "step", pa.array(numbers, pa.int64()))
        if step not in kept:
            raise UserError(f"{self.path} has no rollout table of step {step}; kept: {kept[0]} to {kept[-1]}")
        return pq.read_table(rollout_tables(self.path)[step])

    @property
    def status(self) -> str:
        """finished, stopped_early, interrupted or failed; "running or killed" while there is no summary."""
        return str(self.summary.get("status") or "running or killed")
