"""The packaged quickstart, as a user runs it."""

from pathlib import Path

import pytest

from rl_llm.config import load_config
from rl_llm.launch.training import run_training
from rl_llm.runs.console import Console


@pytest.mark.slow
def test_quickstart_learns_what_its_controls_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RL_LLM_CACHE", str(tmp_path / "cache"))
    run = run_training(load_config("quickstart"), tmp_path / "run", console=Console())
    others = [run.summary["before"], *run.summary["controls"].values()]
    assert len(others) == 3
    for metric in ("utility", "facts", "brevity", "chrf"):
        assert run.summary["after"][metric]["low"] > max(other[metric]["high"] for other in others)
