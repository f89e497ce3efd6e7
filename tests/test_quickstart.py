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


@pytest.mark.slow
def test_no_corner_no_face_and_not_equal_weights_come_near_the_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RL_LLM_CACHE", str(tmp_path / "cache"))
    mixtures = ["3,2,1", "1,1,1", "1,0,0", "0,1,0", "0,0,1", "1,1,0", "1,0,1", "0,1,1"]  # facts, sentence, brevity
    found = {}
    for mixture in mixtures:
        weights = zip(("facts", "sentence", "brevity"), mixture.split(","), strict=True)
        changes = [f"rewards.weights.{name}={weight}" for name, weight in weights]
        run = run_training(load_config("quickstart", ["evaluation.controls=[]", *changes]), tmp_path / mixture)
        found[mixture] = run.summary["after"]["utility"]
    best = found.pop("3,2,1")
    assert best["low"] > 1 + max(other["high"] for other in found.values())
