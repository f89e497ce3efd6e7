"""The forecast as a user meets it: the command, from Python, on a recipe's config and on a run."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny
import tiny_rewards
from conftest import Command, Tiny, refused

import rl_llm
from rl_llm.launch.preflight import make_plan
from rl_llm.launch.record import prepare_base
from rl_llm.runs.report.html import write_forecast
from rl_llm.search.preparing import Preparation
from rl_llm.search.sampling import sample_base, samples_of
from rl_llm.trainer.state import TrainerState
from rl_llm.values import to_json

ENOUGH = ["task.split={by: id, tune: 0.3, test: 0.2}", "evaluation.prompts=10"]
WIDE: dict[str, Any] = {
    "task": {"split": {"by": "id", "tune": 0.3, "test": 0.2}},
    "evaluation": {"prompts": 10, "test_prompts": 4, "every": 1},
    "trainer": {"steps": 1},
}


def silent(line: str) -> None:
    """Told of progress."""


def test_the_command_says_what_weights_would_do_and_keeps_the_samples(command: Command, tmp_path: Path) -> None:
    said = command("forecast", "own.yaml", "--samples", 16, "--output", "out", *ENOUGH)
    assert said.code == 0
    lines = said.out.splitlines()
    assert lines[0].split() == ["weighting", "utility", "length", "match", "note"]
    names = [line.split("  ")[0] for line in lines[1:7]]
    assert names[:3] == ["base policy", "equal", "configured: length 1, match 1"]
    assert names[3:5] == ["only length", "only match"]
    assert "never sampled" in said.out
    table = pq.read_table("out/forecast.parquet")
    assert table.num_rows == 160
    assert {"prompt", "completion", "group", "reward/match", "status/length"} <= set(table.column_names)
    found = json.loads(Path("out/forecast.json").read_text())
    assert (found["prompts"], found["samples"]) == (10, 16)
    only = next(point for point in found["points"] if point["name"] == "only match")
    assert only["gains"]["match"]["low"] > 0
    assert "Forecast" in Path("out/forecast.html").read_text()

    before = Path("out/forecast.parquet").read_bytes()
    again = command("forecast", "own.yaml", "--samples", 16, "--output", "out", *ENOUGH, "rewards.weights.length=9")
    assert "serve again" in again.err
    assert Path("out/forecast.parquet").read_bytes() == before
    other = json.loads(Path("out/forecast.json").read_text())
    assert other["base"]["match"] == found["base"]["match"]
    assert other["points"][1]["weights"] == {"match": 1.0, "length": 9.0}
    anew = command("forecast", "own.yaml", "--samples", 16, "--output", "out", *ENOUGH, "trainer.seed=1")
    assert "serve again" not in anew.err
    assert Path("out/forecast.parquet").read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["own.yaml", "--samples", "7"], "--samples 7: a forecast goes up to a KL of log(samples / 4)"),
        (["own.yaml", "--samples", "16", "--kl", "2"], "--kl 2: from 16 samples a prompt"),
        (["own.yaml"], "6 tune prompts: intervals over so few say nothing"),
        (["own.yaml", "rewards.components.match=chrff", *ENOUGH], "did you mean 'chrf'?"),
        (["own.yaml", "--output", "task.jsonl", *ENOUGH], "--output"),
        (["model"], "model is no run directory"),
        (["quickstat"], "did you mean 'quickstart'?"),
    ],
)
def test_a_forecast_that_cannot_be_is_refused_before_it_samples(
    command: Command, arguments: list[str], expected: str
) -> None:
    assert expected in refused(command, "forecast", *arguments)


def test_a_run_keeps_what_it_is_and_its_report_tells_of_the_forecast(
    command: Command, tiny_run: Tiny, tmp_path: Path
) -> None:
    config = tiny_run.config(**WIDE)
    tiny.train(config, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert command("forecast", "run", "--samples", 8).code == 0
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {path.name for path in after.keys() - before.keys()} == {
        "forecast.parquet", "forecast.json", "forecast.html"
    }  # fmt: skip
    assert {path.name for path in before if after[path] != before[path]} == {"report.html"}
    assert "<h2>Forecast</h2>" in (tmp_path / "run" / "report.html").read_text()
    # The first policy, however far the run has come; its statistics are those the run's utility refers to.
    found = samples_of(pq.read_table(tmp_path / "run" / "forecast.parquet"))
    state = TrainerState.load(tmp_path / "run" / "checkpoints" / "step-000001")
    assert found.base == {name: tuple(pair) for name, pair in state.utility.base.items()}
    assert tiny.train(config, tmp_path / "run", resume=True).status == "finished"


def test_the_number_of_workers_changes_no_sample(tiny_run: Tiny, ray_session: None) -> None:
    tables = []
    for resources in ({}, {"num_rollout_workers": 2, "num_reward_workers": 1}):
        plan = make_plan(tiny_run.config(**WIDE, resources=resources), {})
        tables.append(sample_base(plan, str(tiny_run.policy), 8, silent))
    assert tables[0].equals(tables[1])
    assert len(set(tables[0]["sample_id"].to_pylist())) == tables[0].num_rows == 80
    assert min(tables[0]["sample_id"].to_pylist()) > 1 << 61  # far from what training and evaluations draw from


def test_a_search_samples_the_base_it_has_and_makes_no_other(
    tiny_run: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = {"policy": {"model": None, "scratch": tiny.SCRATCH.model_dump()}}
    monkeypatch.setenv("RL_LLM_CACHE", str(tmp_path / "first"))
    warm = {"target": "demonstration", "supervised_steps": 2}
    plan = make_plan(tiny_run.config(**WIDE, **scratch, warm_start=warm), {})
    base = prepare_base(plan, tmp_path, None, silent)
    monkeypatch.setenv("RL_LLM_CACHE", str(tmp_path / "second"))
    Preparation().sample(plan, base, 8, tmp_path / "samples.parquet")
    assert pq.read_table(tmp_path / "samples.parquet").num_rows == 80
    assert not (tmp_path / "second").exists()


def test_rows_and_functions_at_hand_are_forecast_from_python(tiny_run: Tiny, tmp_path: Path) -> None:
    def short(completions: list[str], **columns: Any) -> list[float]:
        return [-float(len(text)) for text in completions]

    found = rl_llm.forecast(
        tiny_run.policy,
        tiny.rows(),
        rewards={"match": tiny_rewards.match, "short": short},
        samples=8,
        output=tmp_path / "out",
        task={"prompt": "{text}", "split": {"by": "id", "tune": 0.3, "test": 0.2}},
        rollout={"max_new_tokens": 4},
        evaluation={"prompts": 10, "utility": {"match": 1.0}},
    )
    assert found.best is not None
    assert found.best.weights["match"] > found.best.weights["short"]
    assert len(found.best_points(3)) == 3
    assert "Best utility: match" in str(found)
    assert "<pre" in found._repr_html_()
    with pytest.raises(rl_llm.UserError, match=r"forecast\(\): there is no 'sample'; did you mean 'samples'"):
        rl_llm.forecast(tiny_run.policy, tiny.rows(), sample=8)


def test_names_are_text_to_the_page(tmp_path: Path) -> None:
    name = "<script>x"
    bounds = {"mean": 0.5, "low": 0.25, "high": 0.75}
    point = {
        "weights": {name: 1.0}, "metrics": {name: bounds}, "gains": {name: bounds}, "kl": 0.5, "tau": 1.0, "ess": 7.5,
        "verdict": "front", "name": f"only {name}",
    }  # fmt: skip
    data = {
        "members": [name], "metrics": {name: 1}, "utility": None, "prompts": 9, "samples": 16, "kl": 0.5, "asked": 0.5,
        "base": {name: bounds}, "points": [point], "best": None, "signal": {name: 0.0}, "fights": [],
    }  # fmt: skip
    (tmp_path / "forecast.json").write_text(to_json(data))
    page = write_forecast(tmp_path).read_text().partition('<script type="application/json"')[0]
    assert name not in page
    assert "&lt;script&gt;x carries no signal" in page
    assert "the front is unranked" in page
