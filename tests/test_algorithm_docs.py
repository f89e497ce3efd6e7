"""docs/algorithms.md: every row of its table, with exactly its settings, learns; and so does its loss of one's own."""

import re
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import Tiny

from rl_llm.config import build_config

PAGE = (Path(__file__).parent.parent / "docs" / "algorithms.md").read_text()
ROWS = {
    name: settings.split()
    for name, settings in re.findall(r"^\| ([^|]+?) \| `(algorithm\.name=[^`]+)` \|", PAGE, flags=re.M)
}


def gold(completions: list[str], **columns: Any) -> list[float]:
    """The share of words that are "gold"; the first policy says any of four colours."""
    return [text.split().count("gold") / max(len(text.split()), 1) for text in completions]


def learned(tiny_run: Tiny, path: Path, overrides: list[str]) -> tuple[float, float]:
    """The mean reward of the first two steps, and of the last two."""
    components: dict[str, Any] = {"gold": {"use": "function:gold"}}
    if any("overlong" in override for override in overrides):
        components["overlong"] = {"args": {"limit": 5, "buffer": 2}}
    settings = tiny.settings(
        tiny_run.policy,
        tiny_run.data,
        rewards={"components": components},
        rollout={"prompts_per_step": 8, "samples_per_prompt": 16, "rows_per_request": 64, "max_new_tokens": 5},
        learner={"lr": 3e-3},
        evaluation={"every": 100, "prompts": 4, "test_prompts": 4},
        checkpoint={"every": 1000},
        logging={"rollouts": 0, "tensorboard": False},
        trainer={"steps": 30},
    )
    run = tiny.train(build_config(settings, overrides), path, functions={"gold": gold})
    reward = run.metrics["reward/gold/mean"]
    return reward.iloc[:2].mean(), reward.iloc[-2:].mean()


def test_the_table_has_a_row_for_every_preset() -> None:
    presets = {override.removeprefix("algorithm.name=") for row in ROWS.values() for override in row[:1]}
    assert presets == {"grpo", "dr_grpo", "rloo", "dapo", "gspo", "cispo", "ppo", "reinforce", "reinforce_pp"}


@pytest.mark.parametrize("row", ROWS)
def test_settings_of_a_row_learn_the_probe_task(tiny_run: Tiny, tmp_path: Path, row: str) -> None:
    first, last = learned(tiny_run, tmp_path / "run", ROWS[row])
    assert first < 0.4
    assert last > 0.8


def test_documented_loss_learns_the_probe_task(tiny_run: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [code] = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    (tmp_path / "my_losses.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    [line] = re.findall(r"^rl-llm train my_run.yaml (.*)$", PAGE, flags=re.M)
    first, last = learned(tiny_run, tmp_path / "run", line.split())
    assert first < 0.4
    assert last > 0.8
