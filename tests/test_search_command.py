"""`rl-llm search` before anything has started."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Command, refused

import rl_llm
from rl_llm.errors import UserError

SEARCH = {
    "recipe": "own.yaml", "run": {"trainer": {"steps": 18}}, "utility": {"match": 1},
    "space": {"rewards.weights": {"simplex": ["match", "length"]}},
}  # fmt: skip


def written(**changes: Any) -> str:
    Path("which.yaml").write_text(yaml.safe_dump({**SEARCH, **changes}))
    return "which.yaml"


def test_a_dry_run_shows_what_would_be_searched_and_makes_nothing(command: Command) -> None:
    file = written(trials=5)
    before = sorted(Path().rglob("*"))
    said = command("search", file, "concurrent=2", "run.resources.num_rollout_workers=2", "--dry-run")
    assert (said.code, said.err) == (0, "")
    shown = yaml.safe_load(said.out[: said.out.index("\ntask ")])
    assert (shown["trials"], shown["concurrent"], shown["run"]["evaluation"]["every"]) == (5, 2, 2)
    assert shown["run"]["checkpoint"] == {"every": 2, "keep": 2}
    assert "5, random, halving; each asks for {CPU: 1} + {CPU: 1} + {CPU: 1}" in said.out
    assert sorted(Path().rglob("*")) == before


def test_with_a_budget_in_tokens_the_run_says_when_it_is_evaluated_and_few_steps_will_do(command: Command) -> None:
    file = written(tokens=500, run={"trainer": {"steps": 4}, "evaluation": {"every": 3}})
    said = command("search", file, "--dry-run")
    assert (said.code, said.err) == (0, "")
    run = yaml.safe_load(said.out[: said.out.index("\ntask ")])["run"]
    assert (run["trainer"]["steps"], run["evaluation"]["every"], run["checkpoint"]["every"]) == (4, 3, 3)


def test_a_grid_says_how_many_trials_it_has(command: Command) -> None:
    grid = {"learner.lr": {"grid": [1e-4, 1e-3]}, "learner.epochs": {"grid": [1, 2, 3]}}
    said = command("search", written(searcher="grid", space=grid), "--dry-run")
    assert "\ntrials     6, grid, halving; each asks for" in said.out
    assert yaml.safe_load(said.out[: said.out.index("\ntask ")])["trials"] == 6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"space": {"rewards.weights": {"simplex": ["match", "lenght"]}}}, "did you mean 'length'?"),
        ({"space": {"learner.lr": {"uniform": [2, 1]}}}, "the wrong way round"),
        ({"space": {"learner.speed": {"uniform": [1, 2]}}}, "learner.speed"),
        ({"utility": {"macth": 1}}, "did you mean 'match'?"),
        ({"run": {"trainer": {"steps": 4}}}, "run.trainer.steps=9"),
        ({"run": {"trainer": {"steps": 9}, "policy": {"model": "nowhere"}}}, "no folder nowhere"),
        ({"trails": 3}, "trails"),
    ],
)
def test_a_mistake_in_a_search_file_is_a_line_and_starts_nothing(
    command: Command, changes: dict[str, Any], said: str
) -> None:
    file = written(**changes)
    assert said in refused(command, "search", file, "--output", "out")


def test_going_on_needs_to_know_where(command: Command) -> None:
    assert "--resume needs --output" in refused(command, "search", written(), "--resume")


def test_a_search_from_python_takes_the_keys_of_a_file(command: Command) -> None:
    with pytest.raises(UserError, match=r"search\(\): there is no 'trails'; did you mean 'trials'\?"):
        rl_llm.search(written(), trails=3)
    other = {"rewards.weights": {"simplex": ["other", "length"]}}
    with pytest.raises(UserError, match="no component 'other'"):
        rl_llm.search(written(), rewards=["match", "length"], space=other)
    assert not Path("runs").exists()
