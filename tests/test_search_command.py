"""`rl-llm search` before anything has started."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Command, refused

import rl_llm
from rl_llm.errors import Interrupted, UserError
from rl_llm.search import launching
from rl_llm.search.config import load_search
from rl_llm.search.following import Followers
from rl_llm.search.launching import plan_search
from rl_llm.search.ledger import DECISIONS, Ledger
from rl_llm.search.plan import make_course

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
        ({"forecast": 7}, "forecast: so few samples a prompt tell nothing; take 8 or more, or 0 for none (given: 7)"),
    ],
)
def test_a_mistake_in_a_search_file_is_a_line_and_starts_nothing(
    command: Command, changes: dict[str, Any], said: str
) -> None:
    file = written(**changes)
    assert said in refused(command, "search", file, "--output", "out")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "which.yaml: keys such as 'recipe:' and 'space:' are needed, found nothing"),
        ("- recipe: own.yaml", "which.yaml: keys such as 'recipe:' and 'space:' are needed, found a list"),
        ("trainer: {steps: 9}", "which.yaml is a run's file; a search is another, with recipe: which.yaml and what"),
        ("recipe: own.yaml\nspace: {}", "space names no setting that varies"),
        ("recipe: other.yaml\nspace: {learner.lr: {uniform: [1, 2]}}", "recipe: other.yaml is a search's file"),
    ],
)
def test_what_is_no_search_file_is_a_line(command: Command, text: str, said: str) -> None:
    Path("other.yaml").write_text(yaml.safe_dump(SEARCH))
    Path("which.yaml").write_text(text)
    error = refused(command, "search", "which.yaml", "--output", "out")
    assert said in error
    assert len(error.splitlines()) == 1


def test_a_search_is_no_recipe_and_no_missing_file(command: Command) -> None:
    said = refused(command, "search", "quickstart")
    assert "no search file 'quickstart'; write one with recipe: quickstart, tune_configs/ has examples" in said
    said = refused(command, "search", "which.yml")
    assert "no search file 'which.yml'; write one, tune_configs/ has examples" in said


def test_going_on_needs_to_know_where(command: Command) -> None:
    assert "--resume needs --output" in refused(command, "search", written(), "--resume")


def interrupt(*given: Any, **more: Any) -> Any:
    raise KeyboardInterrupt


def test_what_a_search_has_come_to_is_in_its_summary_though_it_was_stopped_before_it_went_on(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, path = load_search(written()), Path("out")
    space, plan = plan_search(config, {})
    path.mkdir()
    asked = make_course(config, space, [], Ledger(path / DECISIONS)).entries
    monkeypatch.setattr(launching, "prepare_base", interrupt)
    with pytest.raises(Interrupted, match="at once"):
        launching._run(config, space, plan, path, Followers([], path))
    before = json.loads((path / "summary.json").read_text())
    assert before["trials"] == dict.fromkeys(asked, "going")

    def refuse(*given: Any) -> str:
        raise UserError("another base")

    monkeypatch.setattr(launching, "prepare_base", refuse)
    with pytest.raises(UserError, match="another base"):
        launching._run(config, space, plan, path, Followers([], path))
    assert json.loads((path / "summary.json").read_text()) == before


@pytest.mark.parametrize("meanwhile", ["refuse_no_room", "prepare_base", "prepare", "make_course"])
def test_ctrl_c_before_the_first_trial_says_how_to_go_on(
    command: Command, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    """While room is waited for, in the warm start or the base policy's evaluation, and when all of that is done."""
    file = written()
    space, plan = plan_search(load_search(file), {})
    monkeypatch.setattr(launching, "plan_search", lambda *given: (space, plan))
    monkeypatch.setattr(launching, "connected", lambda *given: nullcontext())
    for name in ("refuse_no_room", "prepare"):
        monkeypatch.setattr(launching, name, lambda *given: None)
    monkeypatch.setattr(launching, meanwhile, interrupt)
    said = command("search", file, "--output", "out")
    assert said.code == 130
    assert "stopped at once" in said.out.splitlines()[-1]
    assert said.out.endswith(" in out; go on with: rl-llm search which.yaml --output out --resume\n")
    if meanwhile == "refuse_no_room":  # nothing is there yet
        assert not Path("out").exists()
    else:
        summary = json.loads(Path("out/summary.json").read_text())
        assert (summary["status"], summary["trials"]) == ("interrupted", {})
        assert Path("out/search.yaml").is_file()
    launching.find_search(load_search(file), space, plan, Path("out"), resume=True)  # it would go on


def test_a_search_from_python_takes_the_keys_of_a_file(command: Command) -> None:
    with pytest.raises(UserError, match=r"search\(\): there is no 'trails'; did you mean 'trials'\?"):
        rl_llm.search(written(), trails=3)
    other = {"rewards.weights": {"simplex": ["other", "length"]}}
    with pytest.raises(UserError, match="no component 'other'"):
        rl_llm.search(written(), rewards=["match", "length"], space=other)
    assert not Path("runs").exists()
