import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rich.console
from run_factory import make_run, write_rollouts

from rl_llm.algorithms import build_algorithm
from rl_llm.errors import UserError
from rl_llm.mixture import Mixture
from rl_llm.runs.jsonl import JsonlWriter, read_jsonl
from rl_llm.runs.replay import Replay, replay
from rl_llm.runs.run import load_run


def run_with(
    path: Path, steps: list[dict[str, list[Any]]], groups: list[int], overrides: tuple[str, ...] = (), **how: Any
) -> Path:
    """A run with weights chrf 1 and length 0.3 whose tables hold the advantages that its own mixture gives."""
    make_run(path, steps=len(steps), summary=None, overrides=overrides)
    config = load_run(path).config
    mixture = Mixture(config.rewards)
    for step, values in enumerate(steps, start=1):
        columns = {name: np.array(column, dtype=np.float32).astype(np.float64) for name, column in values.items()}
        mixed = mixture.mix(columns, np.array(groups), step, build_algorithm(config.algorithm).scale)
        write_rollouts(path, step, values, groups, mixed.advantages.tolist(), **how)
    return path


def random_steps(count: int, rows: int, seed: int = 0) -> list[dict[str, list[Any]]]:
    rng = np.random.default_rng(seed)
    steps = [{name: rng.random(rows).tolist() for name in ("chrf", "length")} for _ in range(count)]
    for step in steps:
        step["chrf"][1] = None
        step["chrf"][5] = step["length"][5] = None
    return steps


def shown(result: Replay) -> str:
    console = rich.console.Console(record=True, width=160, file=io.StringIO())
    console.print(result)
    return console.export_text()


GROUPS = [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo", "rloo"])
def test_the_runs_own_weights_change_nothing(tmp_path: Path, combine: str, algorithm: str) -> None:
    overrides = (f"rewards.combine={combine}", f"algorithm.name={algorithm}")
    result = replay(run_with(tmp_path / "run", random_steps(4, 8), GROUPS, overrides), {})
    assert result.flipped == result.other_best == 0
    assert result.run == result.other
    assert result.examples == []
    assert result.rows == 4 * 7
    assert sum(result.run.shares.values()) == pytest.approx(1)


def test_scaling_all_weights_changes_no_sign_and_no_share(tmp_path: Path) -> None:
    result = replay(run_with(tmp_path / "run", random_steps(4, 8), GROUPS), {"chrf": 10, "length": 3})
    assert result.flipped == result.other_best == 0
    assert result.other.shares == pytest.approx(result.run.shares, rel=1e-4)
    assert result.other.reward == pytest.approx(10 * result.run.reward)


@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
def test_opposite_weights_flip_every_advantage(tmp_path: Path, combine: str) -> None:
    overrides = (f"rewards.combine={combine}",)
    path = run_with(tmp_path / "run", random_steps(3, 8), GROUPS, overrides)
    result = replay(path, {"chrf": -1, "length": -0.3})
    assert result.flipped == 1
    assert result.flipped_by_step == {1: 1.0, 2: 1.0, 3: 1.0}
    assert result.other_best == 1


def test_a_known_answer(tmp_path: Path) -> None:
    values = {"chrf": [0.9, 0.1, 0.5, 0.5], "length": [0.0, 1.0, 0.5, 0.5]}
    result = replay(run_with(tmp_path / "run", [values], [7, 7, 7, 7]), {"chrf": 0, "length": 1})
    assert result.flipped == 0.5  # of the other two the advantage is 0 either way
    assert result.run.best == pytest.approx({"chrf": 0.9, "length": 0.0})
    assert result.other.best == pytest.approx({"chrf": 0.1, "length": 1.0})
    assert result.other.shares == pytest.approx({"chrf": 0, "length": 1})
    assert result.run.weights == {"chrf": 1.0, "length": 0.3}
    assert result.other.reward == pytest.approx(0.5)
    (example,) = result.examples
    assert (example.run_best.completion, example.other_best.completion) == ("completion 0", "completion 1")
    assert example.prompt == "prompt of group 7"
    assert example.other_best.values == pytest.approx({"chrf": 0.1, "length": 1.0})


def test_rows_that_tie_count_in_equal_parts(tmp_path: Path) -> None:
    values = {"chrf": [0.9, 0.1, 0.5], "length": [0.0, 1.0, 1.0]}
    result = replay(run_with(tmp_path / "run", [values], [0, 0, 0]), {"chrf": 0})
    assert result.other.best == pytest.approx({"chrf": 0.3, "length": 1.0})


def test_a_weight_not_given_follows_the_runs_own_schedule(tmp_path: Path) -> None:
    path = run_with(tmp_path / "run", random_steps(2, 8), GROUPS)
    lines = read_jsonl(path / "metrics.jsonl")
    lines[1]["weights/length"] = 0.8
    writer = JsonlWriter(path / "metrics.jsonl")
    for line in lines:
        writer.write(line)
    result = replay(path, {"chrf": 2})
    assert result.run.weights == {"chrf": 1.0, "length": 0.8}
    assert result.other.weights == {"chrf": 2.0, "length": 0.8}


def test_a_table_whose_step_was_never_logged_is_left_out(tmp_path: Path) -> None:
    path = run_with(tmp_path / "run", random_steps(2, 8), GROUPS)
    write_rollouts(path, 3, {"chrf": [1.0, 0.0], "length": [0.0, 1.0]}, [0, 0])
    assert list(replay(path, {}).flipped_by_step) == [1, 2]


def test_an_unknown_component_names_the_nearest(tmp_path: Path) -> None:
    path = run_with(tmp_path / "run", random_steps(1, 8), GROUPS)
    with pytest.raises(UserError, match="did you mean 'length'"):
        replay(path, {"lenght": 1.0})


def test_a_run_without_tables_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"logging\.rollouts"):
        replay(make_run(tmp_path / "run", steps=2, summary=None), {"chrf": 2.0})


def test_a_step_without_any_value_has_no_part(tmp_path: Path) -> None:
    nothing = {"chrf": [None] * 4, "length": [None] * 4}
    result = replay(run_with(tmp_path / "run", [nothing], [0, 0, 1, 1]), {"chrf": 2.0})
    assert (result.rows, result.flipped, result.other_best, result.examples) == (0, 0.0, 0.0, [])
    assert shown(result)


def test_at_most_three_examples_those_that_disagree_most(tmp_path: Path) -> None:
    result = replay(run_with(tmp_path / "run", random_steps(6, 8), GROUPS), {"chrf": -1})
    gaps = [example.gap for example in result.examples]
    assert len(gaps) == 3
    assert gaps == sorted(gaps, reverse=True)


def test_it_prints_what_both_prefer(tmp_path: Path) -> None:
    values = {"chrf": [0.9, None, 0.1], "length": [0.0, 1.0, 0.2]}
    path = run_with(tmp_path / "run", [values], [0, 0, 0], conversational=True)
    text = shown(replay(path, {"length": 5, "chrf": 0}))
    for part in ("steps 1 to 1", "user: prompt of group 0", "this run prefers", "completion 1", "chrf -", "length 1"):
        assert part in text
