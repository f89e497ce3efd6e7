"""What an evaluation leaves, and a first one that several runs share."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import Tiny
from test_trainer import assert_same_record, opened

from rl_llm.errors import UserError
from rl_llm.runs.run import Run
from rl_llm.trainer.beginning import Beginning


def test_an_evaluation_leaves_its_values_a_prompt(tiny_run: Tiny) -> None:
    run = Run(tiny_run.undisturbed)
    for line in run.evaluations:
        table = run.evaluated(line["label"], line["step"])
        assert {name: pytest.approx(entry["mean"]) for name, entry in line["metrics"].items()} == {
            name: table[name].to_numpy().mean() for name in table.column_names if name != "prompt_id"
        }
    assert run.evaluated("validation").equals(run.evaluated("validation", 6))
    assert run.evaluated("before")["prompt_id"] == run.evaluated("after")["prompt_id"]
    with pytest.raises(UserError, match=r"no evaluation 'validation' of step 3; those of it: 0, 2, 4, 6"):
        run.evaluated("validation", 3)


def test_tokens_generated_are_those_of_rollouts_and_evaluations(tiny_run: Tiny) -> None:
    run = Run(tiny_run.undisturbed)
    state = json.loads((run.path / "checkpoints" / "step-000004" / "state.json").read_text())
    rollouts = sum(len(ids) for step in range(1, 5) for ids in run.rollouts(step)["completion_ids"].to_pylist())
    measured = [("validation", 0), ("before", 0), ("validation", 2), ("validation", 4)]
    evaluations = sum(run.evaluated(*which)["tokens"].to_numpy().sum() for which in measured)
    assert state["tokens_generated"] == rollouts + evaluations


def test_a_run_that_is_given_its_beginning_is_the_run_that_measures_it(
    tiny_run: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beginning = Beginning.of(tiny_run.undisturbed)
    config = tiny_run.config(trainer={"steps": 2}, learner={"lr": 2e-2}, evaluation={"utility": {"length": -1}})
    paths = [tmp_path / "given", tmp_path / "measured"]
    asked: list[str] = []
    for path, given in zip(paths, (beginning, None), strict=True):
        with opened(config, path, beginning=given) as trainer:
            start = trainer.workers.collector.start

            def noted(name: str, *rest: Any, start: Any = start) -> Any:
                asked.append(name)
                return start(name, *rest)

            monkeypatch.setattr(trainer.workers.collector, "start", noted)
            trainer.advance()
        asked.append("")
    assert asked[: asked.index("")] == ["step-1", "step-2", "validation-tune-2"]
    assert asked[asked.index("") + 1 :][:2] == ["validation-tune-0", "before-test-0"]
    assert_same_record(*paths)
    for name, table in tiny.evaluations(paths[0]).items():
        assert table.equals(tiny.evaluations(paths[1])[name])
    first, second = (json.loads((path / "checkpoints/step-000002/state.json").read_text()) for path in paths)
    shared = sum(beginning.evaluations[label].values["tokens"].sum() for label in ("validation", "before"))
    assert (first.pop("tokens_generated") + shared, first.pop("seconds") >= 0) == (second.pop("tokens_generated"), True)
    assert {**first, "seconds": second["seconds"]} == second


@pytest.mark.parametrize(
    ("sections", "serves"),
    [
        ({"rewards": {"weights": {"match": 3}}}, True),
        ({"rewards": {"components": {"match": {"use": "exact"}}}}, False),
        ({"learner": {"lr": 1.0}, "trainer": {"seed": 4}, "evaluation": {"patience": 2}}, True),
        ({"rollout": {"max_new_tokens": 4}}, False),
        ({"evaluation": {"temperature": 0.5}, "trainer": {"seed": 4}}, False),
    ],
)
def test_a_beginning_serves_runs_that_would_measure_the_same(
    tiny_run: Tiny, sections: dict[str, Any], serves: bool
) -> None:
    rewards = {"components": tiny_run.config().model_dump()["rewards"]["components"], **sections.pop("rewards", {})}
    assert Beginning.of(tiny_run.undisturbed).serves(tiny_run.config(rewards=rewards, **sections)) == serves
