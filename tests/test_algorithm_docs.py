"""docs/algorithms.md: every row of its table runs with exactly its settings; and so does its loss of one's own."""

import re
from pathlib import Path

import numpy as np
import pytest
import tiny
from conftest import Tiny

from rl_llm.config import build_config
from rl_llm.config.overrides import read_yaml

PAGE = (Path(__file__).parent.parent / "docs" / "algorithms.md").read_text()
ROWS = {
    name: settings.split()
    for name, settings in re.findall(r"^\| ([^|]+?) \| `(algorithm\.name=[^`]+)` \|", PAGE, flags=re.M)
}


def assert_runs(tiny_run: Tiny, path: Path, overrides: list[str]) -> None:
    """Two steps with these settings, as the run noted them, are made of updates that are numbers."""
    settings = tiny.settings(
        tiny_run.policy,
        tiny_run.data,
        evaluation={"every": 100, "prompts": 4, "test_prompts": 4},
        checkpoint={"every": 100},
        trainer={"steps": 2},
    )
    run = tiny.train(build_config(settings, overrides), path)
    for override in overrides:
        keys, _, value = override.partition("=")
        found = run.config.model_dump()
        for key in keys.split("."):
            found = found[key]
        assert found == read_yaml(value), keys
    assert (run.status, len(run.metrics), run.metrics["bad_steps"].max()) == ("finished", 2, 0)
    assert np.isfinite(run.metrics.to_numpy(dtype=float)).all()
    assert (run.metrics["grad_norm"] > 0).all()


def test_the_table_has_a_row_for_every_preset() -> None:
    presets = {override.removeprefix("algorithm.name=") for row in ROWS.values() for override in row[:1]}
    assert presets == {"grpo", "dr_grpo", "rloo", "dapo", "gspo", "cispo", "ppo", "reinforce", "reinforce_pp"}


@pytest.mark.parametrize("row", ROWS)
def test_settings_of_a_row_run(tiny_run: Tiny, tmp_path: Path, row: str) -> None:
    assert_runs(tiny_run, tmp_path / "run", ROWS[row])


def test_documented_loss_runs(tiny_run: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [code] = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    (tmp_path / "my_losses.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    [line] = re.findall(r"^rl-llm train my_run.yaml (.*)$", PAGE, flags=re.M)
    assert_runs(tiny_run, tmp_path / "run", line.split())
